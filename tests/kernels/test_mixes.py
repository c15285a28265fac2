"""Mixes of adapters."""

import subprocess
import sys
from collections import Counter

import pytest

from ranklet.kernels.mixes import MIXES, assign, exponent


def test_mixes_distribute_requests_as_named() -> None:
    made = {mix: Counter(assign(mix, requests=200, adapters=50)) for mix in MIXES}
    assert all(counts.total() == 200 and set(counts) <= set(range(50)) for counts in made.values())
    assert made["distinct"] == Counter(dict.fromkeys(range(50), 4))
    assert made["identical"] == Counter({0: 200})
    most = {mix: max(counts.values()) for mix, counts in made.items()}
    assert most["skewed"] > 2 * most["uniform"]
    assert 4 < most["uniform"] < 20
    assert assign("distinct", 5, 9) == [0, 1, 2, 3, 4]


def test_zipf_frequency_falls_with_rank_to_the_power_of_alpha() -> None:
    counts = Counter(assign("zipf:1", 100_000, 10))
    for rank in range(1, 10):
        assert counts[0] / counts[rank] == pytest.approx(rank + 1, rel=0.1)


def test_skewed_and_uniform_are_zipf_mixes() -> None:
    assert assign("skewed", 500, 9, seed=3) == assign("zipf:1.5", 500, 9, seed=3)
    assert assign("uniform", 500, 9, seed=3) == assign("zipf:0", 500, 9, seed=3)
    assert assign("zipf:1", 500, 9, seed=3) != assign("zipf:1", 500, 9, seed=4)


@pytest.mark.parametrize("mix", ["zipf", "zipf:", "zipf:a", "zipf:-1", "zipf:nan", "zipf:inf", "normal", ""])
def test_an_unknown_mix_is_refused(mix: str) -> None:
    with pytest.raises(ValueError, match="zipf:ALPHA"):
        exponent(mix)
    with pytest.raises(ValueError, match="zipf:ALPHA"):
        assign(mix, 3, 3)


def test_mixes_import_no_torch() -> None:
    code = "import sys, ranklet.kernels.mixes; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=30)
    assert done.stdout.strip() == "False"
