"""The program that checks grammars: `python -m ranklet.replicas.grammar.check_worker FD TIME_S MEMORY_BYTES`.

FD is the file descriptor of a socket to the gateway, which ends this process if it is late.
"""

from typing import Any

from llguidance import LLTokenizer

from ranklet.replicas.bounded_process import answer_questions
from ranklet.replicas.grammar.grammar import Grammar
from ranklet.replicas.grammar.refusal import refusal_of

_tokenizer = LLTokenizer("byte")


def answer(request: dict[str, Any]) -> dict[str, str | None]:
    try:
        return {"error": refusal_of(Grammar(request["kind"], request["text"]), _tokenizer)}
    except (MemoryError, RecursionError) as exceeded:
        return {"error": f"it is too large: {type(exceeded).__name__}"}


if __name__ == "__main__":
    answer_questions(answer)
