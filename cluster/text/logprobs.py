"""Logprobs of tokens in the formats of OpenAI's API."""

from collections.abc import Iterable, Sequence
from typing import Any, Final

from ranklet.cluster.text.choice import TokenRecord
from ranklet.cluster.text.token_bytes import TokenBytes

MIN_LOGPROB: Final = -9999.0  # JSON has no infinity


class LogprobsFormat:
    """Renders the records of tokens.

    Args:
        as_ids: write tokens as `token_id:5`.
    """

    def __init__(self, token_bytes: TokenBytes, *, as_ids: bool = False) -> None:
        self._bytes = token_bytes
        self._as_ids = as_ids

    def completion(self, records: Sequence[TokenRecord]) -> dict[str, Any]:
        """Return the `logprobs` of a choice of /v1/completions.

        The best alternatives to a token include the token itself. Those with equal texts share an entry, which has the
        larger logprob.
        """
        return {
            "tokens": [self.shown(record.id) for record in records],
            "token_logprobs": [_finite(record.logprob) for record in records],
            "top_logprobs": [self._best(record) for record in records],
            "text_offset": [record.offset for record in records],
        }

    def chat(self, records: Iterable[TokenRecord]) -> dict[str, Any]:
        """Return the `logprobs` of a choice of /v1/chat/completions."""
        content = [
            self._token(record.id, record.logprob)
            | {"top_logprobs": [self._token(token, logprob) for token, logprob in record.top]}
            for record in records
        ]
        return {"content": content, "refusal": None}

    def shown(self, token: int) -> str:
        r"""Return a token's text; `bytes:\xf0\x9f` if it is no valid UTF-8."""
        if self._as_ids:
            return f"token_id:{token}"
        content = self._bytes[token]
        try:
            return content.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)

    def _token(self, token: int, logprob: float | None) -> dict[str, Any]:
        return {"token": self.shown(token), "logprob": _finite(logprob), "bytes": list(self._bytes[token])}

    def _best(self, record: TokenRecord) -> dict[str, float] | None:
        if record.logprob is None:
            return None
        best: dict[str, float] = {}
        for token, logprob in ((record.id, record.logprob), *record.top):
            text = self.shown(token)
            best[text] = max(logprob, best.get(text, MIN_LOGPROB))
        return best


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, MIN_LOGPROB)
