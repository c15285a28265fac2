"""The linear modules of the base model, which DoRA and trained biases of adapters refer to."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class BaseLinears:
    """The linear modules in the layers of a base model.

    Attributes:
        with_bias: names of the modules that have a bias.
        read: returns weight [out, in] and bias of a layer's module, on any device; None where the weights are not at
            hand.
    """

    with_bias: frozenset[str] = frozenset()
    read: Callable[[int, str], tuple[Tensor, Tensor | None]] | None = None
