"""Logprobs of prompt tokens. The head computes chunks of rows, since logits of all rows would take too much memory.

Letters: R rows, H hidden width.
"""

import torch
from torch import Tensor

from ranklet.kernels.batch import LoraBatch
from ranklet.kernels.row_subset import check_rows, row_range
from ranklet.kernels.stack import LinearStack
from ranklet.replicas.model.lm_head import LmHead
from ranklet.replicas.model.sampler import TokenLogprobs, logprobs_of

CHUNK_ROWS = 1024  # logits of 1,024 rows and a vocabulary of 151,936 take 622 MB


def prompt_logprobs(
    head: LmHead,
    rows: Tensor,  # [R, H], after the final norm
    targets: Tensor,  # int32 [R]: the token that follows each row
    top: int,
    stack: LinearStack | None = None,
    lora: LoraBatch | None = None,
    *,
    chunk_rows: int = CHUNK_ROWS,
) -> TokenLogprobs:
    """Return the logprob of each row's target and, if `top` is not 0, the largest logprobs of each row.

    Each chunk gets the LoRA batch of exactly its rows, so each row keeps its own adapter.

    Args:
        stack: the LoRA slots of the head.
        lora: the batch of exactly these rows; tiles are made here for each chunk.

    Raises:
        ValueError: `rows` does not have the batch's number of rows.
    """
    if lora is not None:
        check_rows(rows, lora)
    found = []
    for start in range(0, len(rows), chunk_rows):
        chunk = slice(start, min(start + chunk_rows, len(rows)))
        batch = None if lora is None else row_range(lora, chunk.start, chunk.stop).with_tiles(rows.device)
        found.append(logprobs_of(head.logits(rows[chunk], stack, batch), targets[chunk], top))
    if len(found) == 1:
        return found[0]
    if not found:
        return logprobs_of(head.logits(rows), targets, top)
    ids = [part.top_ids for part in found if part.top_ids is not None]
    values = [part.top_logprobs for part in found if part.top_logprobs is not None]
    return TokenLogprobs(
        torch.cat([part.logprobs for part in found]),
        torch.cat(ids) if ids else None,
        torch.cat(values) if values else None,
    )
