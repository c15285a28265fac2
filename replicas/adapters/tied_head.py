"""The head of a tied model whose adapter ties its LoRA to that of the token embedding."""

from dataclasses import replace

import torch

from ranklet.replicas.adapters.adapter import AdapterWeights, LoraWeight
from ranklet.replicas.adapters.findings import Checked
from ranklet.replicas.adapters.tensor_names import EMBEDDING_MODULE, HEAD_MODULE
from ranklet.replicas.model.modules import EMBED_TOKENS, LM_HEAD


def tied(adapter: AdapterWeights, scaling: float) -> Checked[AdapterWeights]:
    """Give the head the LoRA of the token embedding: A and B change places and are transposed.

    PEFT saves that of the head as well, but loads only one of them if they differ.
    """
    source = adapter.weights.get(EMBEDDING_MODULE)
    if source is None:
        return adapter
    shared = LoraWeight(
        source.flat, source.b_offset, source.a_offset, source.rank, source.out_features, source.in_features, scaling,
        transposed=True,
    )  # fmt: skip
    own = adapter.weights.get(HEAD_MODULE)
    if own is not None and not (torch.equal(own.a, shared.a) and torch.equal(own.b, shared.b)):
        yield f"{LM_HEAD}: expected the LoRA of {EMBED_TOKENS}, since ensure_weight_tying ties them, got another one"
    return replace(adapter, weights={**adapter.weights, HEAD_MODULE: own or shared})
