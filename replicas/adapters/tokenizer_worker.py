"""The program that compares tokenizers which are the base model's but for added tokens.

Usage: `python -m ranklet.replicas.adapters.tokenizer_worker FD TIME_S MEMORY_BYTES`. FD is the file descriptor of a
socket to the replica or the engine, which ends this process if it is late.
"""

from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from ranklet.replicas.adapters.revision import marks_of
from ranklet.replicas.adapters.tokenizer_check import BaseTokenizer
from ranklet.replicas.bounded_process import answer_questions
from ranklet.replicas.errors import AdapterNotFound

_base = lru_cache(1)(BaseTokenizer)


def answer(question: dict[str, str]) -> dict[str, Any]:
    """Return the result, None if the files must be parsed, and the marks that the adapter's folder has afterwards."""
    folder, marks = Path(question["adapter"]), ""
    found = _base(Path(question["base"])).compare_similar(folder)
    with suppress(AdapterNotFound):
        marks = marks_of(folder)
    return {"compared": None if found is None else found.as_json(), "marks": marks}


if __name__ == "__main__":
    answer_questions(answer)
