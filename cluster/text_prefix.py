"""What calls of texts tell routers: hashes of their prompts' pages, and the room that they need."""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ranklet.cluster.message import InferenceCall
from ranklet.replicas.adapters.invocation import first_adapted
from ranklet.replicas.engine.params import GenerateParams
from ranklet.routing.hint import TextHint
from ranklet.routing.prefix import page_hashes, prefix_root

# Clients that set no max_tokens allow thousands of tokens, and few texts have as many.
_LONGEST_OUTPUT: Final = 512


def call_pages(call: InferenceCall[GenerateParams], ids: NDArray[np.int32]) -> list[int]:
    """Return the hashes of the full pages of a sequence that begins with the first prompt of the call."""
    adapter, salt = call.adapter, call.params.cache_salt
    base = prefix_root(None, None, salt)
    if adapter is None:
        return page_hashes(base, ids)
    root = prefix_root(adapter.name, adapter.requested_revision, salt)
    if adapter.invocation is None:
        return page_hashes(root, ids)
    return page_hashes(root, ids, base, first_adapted(call.prompts()[0], adapter.invocation))


def text_hint(call: InferenceCall[Any]) -> TextHint | None:
    """Return what the router needs to know of a call; None if it makes no text."""
    params = call.params
    if not isinstance(params, GenerateParams):
        return None
    pages = call_pages(call, call.prompts()[0])
    return TextHint(pages, call.texts, call.work + call.texts * min(params.max_tokens, _LONGEST_OUTPUT))
