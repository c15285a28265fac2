"""Compares answers with those of the reference."""

from concurrent.futures import Future, ThreadPoolExecutor

from tests.demo.chat import MAX_TOKENS, ChatAnswer
from tests.demo.client import EmbeddedTexts
from tests.demo.models import DemoModel
from tests.demo.reference import Reference, Vectors


class Comparison:
    """Reference answers, computed in a thread while Ray starts.

    Args:
        pool: of one thread, because all computations share the model whose adapter PEFT switches.
    """

    def __init__(self, pool: ThreadPoolExecutor, served: DemoModel, sent: list[EmbeddedTexts]) -> None:
        self._pool = pool
        self._reference: Future[Reference] = pool.submit(Reference, served)
        self._vectors: Future[Vectors] = pool.submit(lambda: self._reference.result().vectors(sent))

    def vectors(self) -> Vectors:
        return self._vectors.result()

    def reference(self) -> Reference:
        return self._reference.result()

    def is_right(self, answer: ChatAnswer, question: str) -> bool:
        """Compare each token, the text and the end of an answer. Notes the number of right tokens in it."""
        reference = self.reference()
        answer.right = self._pool.submit(reference.equal_tokens, answer.model, question, answer.tokens).result()
        ended = answer.tokens[-1:] == [reference.eos]
        is_ended_well = answer.finish_reason == "stop" if ended else len(answer.tokens) == MAX_TOKENS
        is_text_right = answer.text == reference.decode(answer.tokens)
        return answer.right == len(answer.tokens) and is_ended_well and is_text_right
