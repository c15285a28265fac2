"""Ray 2.60 uses a pydantic feature that warns while it is imported; the suite makes errors of warnings."""

import warnings

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import ray.serve  # noqa: F401  # imported here first, so that it does not warn later

from ranklet.routing import affinity


@pytest.fixture
def routes(monkeypatch: pytest.MonkeyPatch) -> affinity.Affinity:
    """A router's choices that share nothing with other tests; `affinity.current()` gives them."""
    made = affinity.Affinity()
    monkeypatch.setattr(affinity, "_CURRENT", made)
    return made
