"""The program that compares tokenizers which are the base model's but for added tokens.

Usage: `python -m ranklet.replicas.adapters.tokenizer_worker FD TIME_S MEMORY_BYTES`. FD is the file descriptor of a
socket to the replica or the engine, which ends this process if it is late.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any

from ranklet.replicas.adapters.tokenizer_check import BaseTokenizer
from ranklet.replicas.bounded_process import answer_questions

_base = lru_cache(1)(BaseTokenizer)


def answer(question: dict[str, str]) -> dict[str, Any]:
    found = _base(Path(question["base"])).compare_similar(Path(question["adapter"]))
    return {"compared": None if found is None else found.as_json()}


if __name__ == "__main__":
    answer_questions(answer)
