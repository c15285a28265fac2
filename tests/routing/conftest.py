"""Ray 2.60 uses a pydantic feature that warns on import; the suite turns warnings into errors."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import ray.serve  # noqa: F401  # imported here first, so that it does not warn later
