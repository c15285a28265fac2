"""One token sequence of a request on its way through the device."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ranklet.replicas.adapters.reference import AdapterRef
from ranklet.replicas.engine.plan import Need

if TYPE_CHECKING:
    from ranklet.replicas.engine.request import Request


@dataclass(slots=True, eq=False)
class Sequence:
    """A token sequence and the state of its passes.

    Attributes:
        ids: int32 [length]. A task may replace it by a longer one between two passes.
        index: position among the sequences of the request.
        need: the next pass.
        computed: leading tokens that no later pass computes again.
        passes: completed passes.
        passed_over: steps that were planned past this sequence although its adapter was ready.
        solo: runs in a step of its own, because a step that it was in has failed.
        slot: pool slot of its adapter, held from its first pass until it is done; None for the base model.
        holds_slot: whether `slot` is held.
        turn: sort key in the queue.
    """

    ids: NDArray[np.int32]
    adapter: AdapterRef | None
    arrived_s: float
    request: "Request"
    index: int = 0
    need: Need = field(init=False)
    computed: int = 0
    passes: int = 0
    compute_s: float = 0.0
    passed_over: int = 0
    solo: bool = False
    cancelled: bool = False
    slot: int | None = None
    holds_slot: bool = False
    turn: tuple[float, int] = field(default=(0.0, 0), init=False)

    @property
    def flow(self) -> str:
        """Whose share of the queue it counts for: the adapter's name, whatever the revision; "" for the base model."""
        return flow_of(self.adapter)


def flow_of(adapter: AdapterRef | None) -> str:
    return adapter.name if adapter else ""
