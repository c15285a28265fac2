"""Ray 2.60 uses a pydantic feature that warns while it is imported; the suite makes errors of warnings."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import ray.serve  # noqa: F401  # imported here first, so that it does not warn later
