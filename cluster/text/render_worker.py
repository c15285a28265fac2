"""The program that renders chat templates: `python -m ranklet.cluster.text.render_worker FD TIME_S MEMORY_BYTES`.

FD is the file descriptor of a socket to the gateway. Requests and replies are JSON: this process may run a template
that breaks out of the sandbox, so the gateway unpickles nothing of it.

A template comes with an adapter. No check of Jinja's operations can bound it within the gateway's process: one
operation in C, such as printing nested lists, may take hours or all memory while it holds the interpreter. So a process
of its own renders, with limited memory, and the gateway ends it if it is late.
"""

import math
import resource
import signal
import sys
import time
from functools import partial
from types import FrameType
from typing import Any

from ranklet.cluster.text.template_language import reason_of, render
from ranklet.replicas.bounded_process import answer_questions

_REPEAT_S = 0.1  # in case a template's code has caught the first alarm
_SPARE_CPU_S = 2


class OutOfTimeError(BaseException):
    """No `except Exception` of Jinja's code may catch it."""


class Alarm:
    """Raises OutOfTimeError in the main thread `time_s` after it was set."""

    def __init__(self, time_s: float) -> None:
        self.time_s = time_s
        self._is_set = False
        signal.signal(signal.SIGALRM, self._ring)

    def __enter__(self) -> None:
        # The kernel ends the process if an operation in C takes longer and the gateway is gone.
        spent = math.ceil(time.process_time() + self.time_s) + _SPARE_CPU_S
        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        resource.setrlimit(resource.RLIMIT_CPU, (spent if hard == resource.RLIM_INFINITY else min(spent, hard), hard))
        self._is_set = True
        signal.setitimer(signal.ITIMER_REAL, self.time_s, _REPEAT_S)

    def __exit__(self, *error: object) -> None:
        self._is_set = False
        signal.setitimer(signal.ITIMER_REAL, 0)

    def _ring(self, number: int, frame: FrameType | None) -> None:
        if self._is_set:
            raise OutOfTimeError


def answer(request: dict[str, Any], alarm: Alarm) -> dict[str, Any]:
    """Return the text, or the error and whether the process must end.

    CPython and Jinja are not safe where memory runs out: later templates have failed with errors of the interpreter.
    """
    try:
        with alarm:
            return {"text": render(request["source"], request["variables"], request["max_chars"])}
    except OutOfTimeError:
        return {"error": f"it takes more than {alarm.time_s:g} s", "ends": True}
    except Exception as error:
        return {"error": reason_of(error), "ends": isinstance(error, MemoryError | RecursionError | SystemError)}


if __name__ == "__main__":
    answer_questions(partial(answer, alarm=Alarm(float(sys.argv[2]))))
