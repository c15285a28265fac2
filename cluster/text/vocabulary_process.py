"""Compares vocabularies: `python -m ranklet.cluster.text.vocabulary_process BASE ADAPTER MEMORY_BYTES`.

Parsing the files of a large tokenizer holds the interpreter for half a second, in which a replica would answer nothing.
The files come with an adapter, so this process of its own has limits.
"""

import contextlib
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

from ranklet.cluster.text.vocabulary import BaseVocabulary
from ranklet.replicas.errors import Unavailable

_PROGRAM = "ranklet.cluster.text.vocabulary_process"
_MEMORY_BYTES = 4 << 30  # of address space


def differences_within(
    base: Path, adapter: Path, time_s: float = 30.0, memory_bytes: int = _MEMORY_BYTES
) -> tuple[str, ...]:
    """Return `BaseVocabulary(base).differences(adapter)`, or that the process ended early.

    Raises:
        Unavailable: it takes too much time, perhaps since the machine is busy.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", _PROGRAM, str(base), str(adapter), str(memory_bytes)]
    try:
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, timeout=time_s)
        return tuple(json.loads(done.stdout))
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"comparing the adapter's tokenizer with the base model's takes {time_s:g} s") from error
    except (subprocess.CalledProcessError, ValueError):
        return ("the tokenizer's files: expected files that can be compared with the base model's, got others",)


def main() -> None:
    base, adapter, memory_bytes = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    with contextlib.suppress(ValueError, OSError):  # not every system limits memory
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    json.dump(BaseVocabulary(base).differences(adapter), sys.stdout)


if __name__ == "__main__":
    main()
