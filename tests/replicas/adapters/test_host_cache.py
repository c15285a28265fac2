"""The host cache keeps its byte budget and its LRU order."""

from collections import OrderedDict

import torch
from hypothesis import given
from hypothesis import strategies as st

from ranklet.replicas.adapters.host_cache import HostCache
from ranklet.replicas.adapters.packed import PackedAdapter, PackedLayout
from ranklet.replicas.adapters.reference import AdapterRef

REFS = [AdapterRef(f"a{index}", f"/{index}", "1") for index in range(6)]


def packed(elements: int) -> PackedAdapter:
    return PackedAdapter(1, torch.zeros(elements), PackedLayout(()), {}, ())


calls = st.lists(
    st.tuples(st.sampled_from(["put", "get", "drop"]), st.sampled_from(REFS), st.integers(0, 40)), max_size=60
)


@given(calls, st.integers(0, 400))
def test_the_cache_evicts_the_least_recently_used_within_its_budget(
    made: list[tuple[str, AdapterRef, int]], budget: int
) -> None:
    cache, model = HostCache(budget), OrderedDict[AdapterRef, PackedAdapter]()
    for call, key, elements in made:
        if call == "put":
            new = packed(elements)
            cache.put(key, new)
            if key not in model and new.nbytes <= budget:
                model[key] = new
                while sum(each.nbytes for each in model.values()) > budget:
                    model.popitem(last=False)
        elif call == "get":
            assert cache.get(key) is model.get(key)
            if key in model:
                model.move_to_end(key)
        else:
            cache.drop(key)
            model.pop(key, None)
        assert cache.refs() == tuple(model)
        assert cache.nbytes == sum(each.nbytes for each in model.values()) <= budget
        assert all((each in cache) == (each in model) for each in REFS)
