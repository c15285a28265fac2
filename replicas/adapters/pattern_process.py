"""Program that matches the patterns of an adapter's config as PEFT 0.21 does. `match_patterns` runs it.

Usage: python -I pattern_process.py CPU_LIMIT_S MEMORY_LIMIT_BYTES

Reads one JSON object: {"names": [...], "patterns": [[field, text], ...]}. Writes one JSON line for each pattern:
{"found": [[index of a name, layer], ...]} or {"error": reason}. A name counts for the first pattern of a field that
matches it. The kernel ends the process at the CPU limit. Imports the standard library only, so that it starts fast.
"""

import json
import re
import resource
import signal
import sys
import warnings
from collections.abc import Callable

NO_LAYER = -1  # a match of a `layers_pattern` in which the group `idx` takes no part, and of patterns of other fields


def compile_as_peft(field: str, text: str) -> Callable[[str], re.Match[str] | None]:
    """Compile the regular expression that PEFT makes of a pattern of a field of `adapter_config.json`."""
    if field in ("rank_pattern", "alpha_pattern"):
        return re.compile(rf"(.*\.)?({text})$").match
    if field == "layers_pattern":
        return re.compile(rf"(?:^|.*?\.){text}\.(?P<idx>\d+)\.").match
    return re.compile(text).fullmatch


def match(field: str, text: str, names: dict[int, str]) -> dict[str, object]:
    """Match a pattern against names by index and remove those that it matches. Returns the reply."""
    try:
        test = compile_as_peft(field, text)
        matches = {i: found for i, name in names.items() if (found := test(name)) is not None}
    except re.error as error:
        return {"error": f"expected a regular expression, got: {error}"}
    except (MemoryError, RecursionError, OverflowError) as error:
        return {"error": f"expected a regular expression that can be matched, got: {type(error).__name__}"}
    for i in matches:
        del names[i]
    has_layer = field == "layers_pattern"
    return {"found": [(i, layer_of(found) if has_layer else NO_LAYER) for i, found in matches.items()]}


def layer_of(found: re.Match[str]) -> int:
    return NO_LAYER if found["idx"] is None else int(found["idx"])


def main() -> None:
    cpu_limit_s, memory_limit_bytes = float(sys.argv[1]), int(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_AS, (memory_limit_bytes, memory_limit_bytes))
    signal.setitimer(signal.ITIMER_PROF, cpu_limit_s)  # SIGPROF has no handler here: it ends the process
    warnings.simplefilter("ignore")  # FutureWarning: a set that a later Python may read otherwise
    request = json.load(sys.stdin)
    rest: dict[str, dict[int, str]] = {}  # names that no pattern of the field has matched yet
    for field, text in request["patterns"]:
        reply = match(field, text, rest.setdefault(field, dict(enumerate(request["names"]))))
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
