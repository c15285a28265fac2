"""Makes the template of a causal reranker of its chat template, as sentence-transformers makes the prompt of a pair."""

from collections.abc import Mapping
from typing import Final

from ranklet.cluster.reranking import DOCUMENT, QUERY, Reranking
from ranklet.cluster.text.render_process import Renderer
from ranklet.cluster.text.template import MAX_TEMPLATE_CHARS, ChatTemplate
from ranklet.replicas.errors import InvalidRequest
from ranklet.replicas.model.logit_score import LogitScore

_REMEDY: Final = 'Put {"rerank": {"template": "..."}} into ranklet.json'
_PROBE: Final = (" First  text\n", " Second <b>text</b> ")  # a template that changes texts changes these
_GENERATION: Final = "add_generation_prompt"
_CUTS: Final = "restore_suffix"  # of sentence-transformers: how prompts that are too long are cut


def pair_template(score: LogitScore, source: str | None, tokens: Mapping[str, str], renderer: Renderer) -> str:
    """Return a template with the names of a query and a document.

    Args:
        source: the chat template.
        tokens: texts of special tokens by the names that templates use.

    Raises:
        InvalidRequest: the chat template cannot be used; the message says why.
    """
    if source is None:
        raise InvalidRequest(f"1_LogitScore: expected a chat template for pairs, found none. {_REMEDY}")
    chat = ChatTemplate(source, tokens, renderer)
    generates = bool(score.arguments.get(_GENERATION))
    arguments = {name: value for name, value in score.arguments.items() if name not in (_GENERATION, _CUTS)}

    def rendered(query: str, document: str) -> str:
        return chat.prompt(score.messages(query, document), add_generation_prompt=generates, arguments=arguments)

    template = rendered(QUERY, DOCUMENT)
    is_sound = len(template) <= MAX_TEMPLATE_CHARS and template.count(QUERY) == template.count(DOCUMENT) == 1
    if not is_sound or rendered(*_PROBE) != Reranking(template).fill(*_PROBE):
        raise InvalidRequest(
            f"chat template: expected a prompt of at most {MAX_TEMPLATE_CHARS} characters with the texts of the roles "
            f"query and document as they are. {_REMEDY}"
        )
    return template
