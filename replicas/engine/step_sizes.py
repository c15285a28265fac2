"""How many tokens steps should have, from what steps of each size took."""

from typing import NamedTuple

from ranklet.replicas.engine.forecast import Forecast

_BRIEF_S, _LONG_S = 0.02, 0.1  # of a step on the CPU, unless longer steps compute more tokens a second
_MOST_BESIDE = 2  # size of the longest step, in steps beside others, if that is longer
_FIRST = 2048  # tokens of the first step on the CPU


class StepSizes(NamedTuple):
    """Numbers of prompt tokens at which a step is closed, None for no limit, and what else depends on the device.

    Attributes:
        enough: size above which steps are not faster per token. A step without decodes is closed there, unless more
            tokens wait than fit into the largest step.
        beside: size up to which flooding flows fill a step while others have requests.
        longest: size at which every step is closed.
        apart: whether flooding flows stay out of the steps of others, though not out of two steps in turn.
        allowance: tokens that a flow may have waiting before it floods; None for those of the largest step.
        gathers: whether texts may wait for others to start with (`gathering.py`). On the CPU, prompts cost no launches.
    """

    enough: int | None = None
    beside: int | None = None
    longest: int | None = None
    apart: bool = False
    allowance: int | None = None
    gathers: bool = True


def gpu_sizes(forecast: Forecast) -> StepSizes:
    return StepSizes(forecast.enough_tokens(), forecast.small_tokens())


def cpu_sizes(forecast: Forecast) -> StepSizes:
    """Return sizes of steps on the CPU, where the largest one may take seconds and no step is launched behind another.

    A request waits for the running step, and for those that waited within the allowance. So the allowance is a small
    step.
    """
    brief, long = forecast.brief_tokens(_BRIEF_S), forecast.brief_tokens(_LONG_S)
    if brief is None or long is None:
        return StepSizes(None, _FIRST, _FIRST, True, _FIRST, gathers=False)
    beside = max(brief, forecast.small_tokens(long) or 0)
    longest = max(long, _MOST_BESIDE * beside)
    return StepSizes(None, beside, longest, True, beside, gathers=False)
