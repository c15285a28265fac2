"""The modules of the base model whose weights DoRA and trained biases of adapters refer to."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class BaseLinears:
    """The modules of a base model that LoRA may target.

    Attributes:
        with_bias: names of the modules that have a bias.
        read: returns weight [out, in] and bias of a layer's module, on any device; for `EMBEDDING`, the token embedding
            [V, H], and for `HEAD` the language-model head. None where the weights are not at hand.
    """

    with_bias: frozenset[str] = frozenset()
    read: Callable[[int, str], tuple[Tensor, Tensor | None]] | None = None
