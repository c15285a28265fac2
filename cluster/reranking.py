"""How an adapter's folder makes a prompt of a query and a document."""

import re
from dataclasses import dataclass
from typing import Final

QUERY: Final = "{query}"
DOCUMENT: Final = "{document}"


@dataclass(frozen=True)
class Reranking:
    """The key `rerank` of an adapter's `ranklet.json`.

    Attributes:
        template: contains `{query}` and `{document}` once each; None makes a pair of them, as the tokenizer does.
        tokens: the false and the true token, whose logits after the prompt are compared; None for a classifier.
    """

    template: str | None = None
    tokens: tuple[int, int] | None = None

    def fill(self, query: str, document: str) -> str:
        """Return the prompt of the template. Texts that contain names in braces stay as they are."""
        assert self.template is not None, "only templates are filled"
        texts = {QUERY: query, DOCUMENT: document}
        return re.sub("|".join(map(re.escape, texts)), lambda found: texts[found[0]], self.template)
