"""A token sequence of a request, and its progress."""

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
    """A token sequence and its progress.

    Attributes:
        ids: int32 [length]. A task may replace it by a longer one between two passes.
        flow: the adapter's name, which owns a share of the queue; "" for the base model.
        index: position among the sequences of the request.
        need: the next pass, which starts behind the computed tokens.
        computed: number of leading tokens that earlier passes computed.
        passes: number of completed passes.
        passed_over: number of steps that this sequence did not fit into although its adapter was ready.
        solo: whether it must run in a step of its own, because an earlier step with it failed.
        slot: pool slot of the adapter; None for the base model.
        holds_slot: whether `slot` is reserved, from the first pass until the sequence is done.
        turn: sort key in the queue.
    """

    ids: NDArray[np.int32]
    adapter: AdapterRef | None
    flow: str
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


def flow_of(adapter: AdapterRef | None) -> str:
    return adapter.name if adapter else ""
