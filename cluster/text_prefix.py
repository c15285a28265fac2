"""What calls of texts tell routers: hashes of their prompts' pages, and the room that they need."""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ranklet.cluster.message import InferenceCall
from ranklet.replicas.engine.params import GenerateParams
from ranklet.routing.hint import TextHint
from ranklet.routing.prefix import page_hashes, prefix_root

# Clients that set no max_tokens allow thousands of tokens, and few texts have as many.
_LONGEST_OUTPUT: Final = 512


def call_pages(call: InferenceCall[GenerateParams], ids: NDArray[np.int32]) -> list[int]:
    """Return the hashes of the full pages of a sequence that begins with a prompt of the call."""
    adapter = call.adapter
    name, revision = (None, None) if adapter is None else (adapter.name, adapter.requested_revision)
    return page_hashes(prefix_root(name, revision, call.params.cache_salt), ids)


def text_hint(call: InferenceCall[Any]) -> TextHint | None:
    """Return what the router needs to know of a call; None if it makes no text."""
    params = call.params
    if not isinstance(params, GenerateParams):
        return None
    pages = call_pages(call, call.prompts()[0])
    return TextHint(pages, call.texts, call.work + call.texts * min(params.max_tokens, _LONGEST_OUTPUT))
