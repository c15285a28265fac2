"""Sequences for tests of the queue and the scheduler, made through requests as the engine makes them."""

from collections.abc import Sequence as Many
from math import inf
from typing import Any

import numpy as np
from hypothesis import strategies as st

from ranklet.replicas.adapters.reference import AdapterInfo, AdapterRef
from ranklet.replicas.engine.plan import Need
from ranklet.replicas.engine.request import AnswerSink, Request
from ranklet.replicas.engine.sequence import Sequence
from ranklet.replicas.engine.step_cost import StepCost
from ranklet.replicas.model.heads import PoolingHead
from ranklet.replicas.model.pooling import Pooling

given_costs = st.builds(
    StepCost, step=st.sampled_from((0.0, 50.0, 300.0)), mixed=st.sampled_from((0.0, 30.0, 300.0)),
    read=st.sampled_from((0.0, 0.2)), attend=st.sampled_from((0.0, 0.01, 1.0)),
    windows=st.sampled_from((((1.0, inf),), ((0.5, 30), (0.5, inf)))),
)  # fmt: skip
HEAD = PoolingHead(Pooling())


class OnePassTask:
    """Computes all tokens once and drops the output."""

    choices = 1
    is_slow = False

    def prepare(self, sequences: Many[Sequence]) -> None:
        pass

    def start(self, sequence: Sequence, adapter: AdapterInfo | None) -> None:
        pass

    def need(self, sequence: Sequence) -> Need:
        return Need(len(sequence.ids), HEAD)

    def accept(self, sequence: Sequence, output: Any) -> tuple[Any, bool]:
        return None, True

    def result(self) -> None:
        return None


def make_sequence(
    tokens: int, adapter: AdapterRef | None = None, key_name: str = "", *, solo: bool = False, cancelled: bool = False
) -> Sequence:
    prompts, sink = [np.zeros(tokens, np.int32)], AnswerSink(lambda result: None)
    request = Request(OnePassTask(), prompts, adapter, sink, key_name=key_name)
    (sequence,) = request.sequences
    sequence.solo, sequence.cancelled = solo, cancelled
    return sequence
