"""The helper process of `PatternMatcher`: matches regular expressions under limits of CPU time and memory.

Usage: python -I pattern_process.py CPU_LIMIT_S MEMORY_LIMIT_BYTES

Reads one JSON line for each request: {"names": [...], "patterns": [[shape, regex], ...]}. Writes one JSON line for each
pattern: {"found": [[index of the name, layer], ...]} or {"error": reason}. The kernel ends the process when a request
takes more CPU time than the limit. Imports the standard library only.
"""

import json
import re
import resource
import signal
import sys
import warnings


def match(shape: str, regex: str, names: list[str]) -> dict[str, object]:
    try:
        compiled = re.compile(regex)
        test = compiled.fullmatch if shape == "full" else compiled.match
        found = [(i, result) for i, result in enumerate(map(test, names)) if result is not None]
        return {"found": [[i, layer_of(result) if shape == "layer" else 0] for i, result in found]}
    except re.error as error:
        return {"error": f"expected a regular expression, got: {error}"}
    except (MemoryError, RecursionError, OverflowError) as error:
        return {"error": f"expected a regular expression that can be matched, got: {type(error).__name__}"}


def layer_of(result: re.Match[str]) -> int:
    return -1 if result["idx"] is None else int(result["idx"])


def main() -> None:
    cpu_limit_s, memory_limit_bytes = float(sys.argv[1]), int(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_AS, (memory_limit_bytes, memory_limit_bytes))
    warnings.simplefilter("ignore")  # FutureWarning: a set that a later Python may read otherwise
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, cpu_limit_s)  # SIGPROF has no handler here: it ends the process
        request = json.loads(line)
        for shape, regex in request["patterns"]:
            sys.stdout.buffer.write(json.dumps(match(shape, regex, request["names"])).encode() + b"\n")
            sys.stdout.buffer.flush()
        signal.setitimer(signal.ITIMER_PROF, 0)


if __name__ == "__main__":
    main()
