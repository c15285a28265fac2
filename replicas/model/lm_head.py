"""The language-model head: computes logits of hidden states, with the LoRA of each row's adapter.

Letters: R rows, H hidden width, V vocabulary. V may be larger than the tokenizer's vocabulary; logits of ids without a
token stay as the model computes them.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ranklet.kernels.batch import LoraBatch
from ranklet.kernels.logits import logits
from ranklet.kernels.stack import LinearStack
from ranklet.replicas.model.architecture import Architecture
from ranklet.replicas.model.checkpoint import Checkpoint
from ranklet.replicas.model.modules import LM_HEAD

_WEIGHT = f"{LM_HEAD}.weight"


@dataclass(frozen=True, slots=True)
class LmHead:
    """The head of a causal language model.

    Attributes:
        weight: [V, H]; the token embedding itself if the model has no other head.
        padded: `weight` followed by rows of zeros, which makes products faster; None if there are none.
        ties: whether the config ties the head to the token embedding. Adapters with `ensure_weight_tying` depend on it.
    """

    weight: Tensor
    ties: bool
    padded: Tensor | None = None

    def logits(
        self,
        rows: Tensor,  # [R, H], after the final norm
        stack: LinearStack | None = None,
        lora: LoraBatch | None = None,
    ) -> Tensor:
        """Return the logits of the rows, float32 [R, V].

        Args:
            stack: the LoRA slots of the head.
            lora: the batch of exactly these rows; see `kernels.row_subset`.
        """
        weight = self.weight if self.padded is None else self.padded
        return logits(rows, weight, stack, lora, columns=len(self.weight))


@lru_cache(maxsize=256)  # reading rows waits for the device
def logit_difference(head: LmHead, first: int, second: int) -> NDArray[np.float32]:
    """Return the row whose product with a state is the second token's logit less the first one's: float32 [1, H]."""
    rows = head.weight[[first, second]].float().cpu()
    found: NDArray[np.float32] = (rows[1:] - rows[:1]).numpy()
    return found


@dataclass(frozen=True, slots=True)
class MissingHead:
    """A model without a head computes embeddings only; `reason` says why it cannot generate text."""

    reason: str


def read_lm_head(
    checkpoint: Checkpoint, config: Any, architecture: Architecture, embedding: Tensor, padded: Tensor
) -> LmHead | MissingHead:
    """Return the head of a model. A model that is neither tied nor a causal language model costs no memory for one.

    Args:
        embedding: the token embedding [V, H].
        padded: the token embedding followed by rows of zeros.

    Raises:
        ModelError: the head has another shape than the token embedding.
    """
    ties = bool(config.tie_word_embeddings)
    is_causal = architecture.name.endswith("ForCausalLM")
    if checkpoint.has(_WEIGHT) and (ties or is_causal):
        own = checkpoint.read_padded(_WEIGHT, (architecture.vocab, architecture.hidden))
        # As in transformers: a checkpoint with two different tensors is not tied, whatever its config says.
        if not ties or not torch.equal(own, padded):
            return LmHead(own[: architecture.vocab], ties, own)
    if ties:
        return LmHead(embedding, ties, padded)
    if is_causal:
        return MissingHead(
            f"the base model cannot generate text: its checkpoint has no {_WEIGHT}, and tie_word_embeddings is false"
        )
    return MissingHead(
        f"the base model cannot generate text: expected an architecture with a language-model head, got "
        f"{architecture.name}"
    )
