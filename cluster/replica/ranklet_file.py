"""Reads ranklet's own settings of an adapter, from `ranklet.json` beside its weights."""

import json
from pathlib import Path
from typing import Any, Final, NamedTuple

from ranklet.cluster.reranking import DOCUMENT, QUERY, Reranking
from ranklet.cluster.text.tool_format import FORMATS
from ranklet.replicas.adapters.reference import RANKLET_FILE
from ranklet.replicas.grammar.constraint import RESPONSE_FORMAT, Constraint, refusal, response_format
from ranklet.replicas.model.tokenizer_files import is_id
from ranklet.replicas.regular_file import read_regular

_MAX_BYTES: Final = 1 << 20
_TOOL_FORMAT: Final = "tool_format"
_RERANK: Final = "rerank"
_TEMPLATE: Final = "template"
_TOKENS: Final = ("false_token_id", "true_token_id")  # the names of sentence-transformers' LogitScore
_KEYS: Final = (RESPONSE_FORMAT, _TOOL_FORMAT, _RERANK)
_MAX_TEMPLATE_CHARS: Final = 1 << 16


class RankletFile(NamedTuple):
    """The settings.

    Attributes:
        constraint: what the texts must be, unless the request says it.
        tool_format: name of the format in which the adapter writes calls of tools.
        reranking: how the prompts of a reranker are made.
    """

    constraint: Constraint | None = None
    tool_format: str | None = None
    reranking: Reranking | None = None


def read_ranklet_file(folder: Path) -> RankletFile:
    """Return the settings of an adapter's folder.

    Raises:
        InvalidRequest: the file is not as expected; the message says how.
    """
    path = folder / RANKLET_FILE
    if not path.exists():
        return RankletFile()
    try:
        content = json.loads(read_regular(path, _MAX_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise refusal(RANKLET_FILE, f"expected JSON, got: {error}") from error
    if not isinstance(content, dict):
        raise refusal(RANKLET_FILE, "expected an object")
    unknown = next((name for name in content if name not in _KEYS), None)
    if unknown is not None:
        raise refusal(RANKLET_FILE, f"expected {', '.join(_KEYS)} only, got {unknown!r:.100}")
    return RankletFile(
        _constraint(content.get(RESPONSE_FORMAT)), _tool_format(content.get(_TOOL_FORMAT)),
        _reranking(content.get(_RERANK)),
    )  # fmt: skip


def _constraint(found: Any) -> Constraint | None:
    if found is None:
        return None
    field = f"{RESPONSE_FORMAT} of the adapter's {RANKLET_FILE}"
    if not isinstance(found, dict):
        raise refusal(field, "expected an object")
    return response_format(found, field)


def _tool_format(found: Any) -> str | None:
    if found is not None and found not in tuple(FORMATS):
        field = f"{_TOOL_FORMAT} of the adapter's {RANKLET_FILE}"
        raise refusal(field, f"expected one of {', '.join(FORMATS)}, got {found!r:.100}")
    return None if found is None else str(found)


def _reranking(found: Any) -> Reranking | None:
    if found is None:
        return None
    field = f"{_RERANK} of the adapter's {RANKLET_FILE}"
    if not isinstance(found, dict) or found.keys() - {_TEMPLATE, *_TOKENS}:
        raise refusal(field, f"expected an object with {', '.join((_TEMPLATE, *_TOKENS))}, got {found!r:.100}")
    template = found.get(_TEMPLATE)
    if template is not None:
        sound = isinstance(template, str) and len(template) <= _MAX_TEMPLATE_CHARS
        if not sound or template.count(QUERY) != 1 or template.count(DOCUMENT) != 1:
            raise refusal(
                f"{_TEMPLATE} in {field}",
                f"expected a text of at most {_MAX_TEMPLATE_CHARS} characters with {QUERY} and {DOCUMENT} once each, "
                f"got {template!r:.100}",
            )
    first, second = (found.get(name) for name in _TOKENS)
    if first is None and second is None:
        return Reranking(template)
    if first is None or second is None or not (is_id(first) and is_id(second)) or first == second:
        got = f"{first!r:.100} and {second!r:.100}"
        raise refusal(f"{' and '.join(_TOKENS)} in {field}", f"expected two different token ids, got {got}")
    return Reranking(template, (first, second))
