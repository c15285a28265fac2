"""The room for large bodies is bounded, shared fairly, and free again at the end."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ranklet.cluster.ingress.body_room import BodyRoom
from ranklet.replicas.errors import Saturated

STEPS = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 400)), max_size=60)


@given(STEPS)
def test_the_room_is_never_exceeded_and_is_free_in_the_end(steps: list[tuple[int, int]]) -> None:
    room = BodyRoom(1000, small=10)
    sizes = [0] * 6
    with contextlib.ExitStack() as stack:
        shares = [stack.enter_context(room.share("abc"[number % 3])) for number in range(6)]
        for number, more in steps:
            with contextlib.suppress(Saturated):
                shares[number].grow(sizes[number] + more)
                sizes[number] += more
            assert room.held.total() == sum(size for size in sizes if size > 10) <= 1000
    assert room.held.total() == 0


def test_an_owner_that_holds_much_leaves_room_to_others() -> None:
    room = BodyRoom(1000, small=10)
    with room.share("greedy") as first, room.share("greedy") as second, room.share("other") as other:
        first.grow(500)
        with pytest.raises(Saturated, match=r"expected at most 800 bytes .* got 900\. Try again"):
            second.grow(400)
        second.grow(300)
        other.grow(160)
        with pytest.raises(Saturated, match="at most 160 bytes"):
            other.grow(161)
        first.release()
        other.grow(500)


def test_small_bodies_always_have_room() -> None:
    room = BodyRoom(1000, small=10)
    with room.share("a") as large:
        large.grow(800)
        for _ in range(500):
            with room.share("a") as small:
                small.grow(10)
    assert not room.held
