"""Reads the tokenizer of a folder in a process of its own: `python -m ranklet.replicas.model.tokenizer_reader FOLDER`.

transformers imports torch, which takes most of a gateway's memory and is of no use once the tokenizer is read.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from ranklet.replicas.bounded_process import child_environment
from ranklet.replicas.errors import InternalError, ModelError
from ranklet.replicas.model.tokenizer import load_backend

_PROGRAM = "ranklet.replicas.model.tokenizer_reader"


def read_backend(folder: Path) -> Any:
    """Return the `tokenizers.Tokenizer` of a folder, as `load_backend` does.

    Raises:
        ModelError: the folder has no fast tokenizer.
        InternalError: the process failed.
    """
    from tokenizers import Tokenizer

    command = [sys.executable, "-m", _PROGRAM, str(folder)]
    done = subprocess.run(command, env=child_environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise InternalError(f"{folder}: the process that reads the tokenizer failed: {done.stderr[-2000:]}")
    reply = json.loads(done.stdout)
    if "error" in reply:
        raise ModelError(reply["error"])
    return Tokenizer.from_str(reply["tokenizer"])


def main(folder: str) -> None:
    try:
        reply = {"tokenizer": load_backend(Path(folder)).to_str()}
    except ModelError as error:
        reply = {"error": str(error)}
    sys.stdout.write(json.dumps(reply))


if __name__ == "__main__":
    main(*sys.argv[1:])
