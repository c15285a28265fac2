"""What flooding flows may take of the steps, so that the requests of others wait for short steps. No clock."""

from dataclasses import dataclass

from ranklet.replicas.engine.fair_queue import FairQueue
from ranklet.replicas.engine.plan import StepPlan
from ranklet.replicas.engine.sequence import Sequence
from ranklet.replicas.engine.step_sizes import StepSizes

# After a step with a flow within its allowance, such flows are expected to send more within this number of steps. The
# second number is for steps apart, on the CPU: there, a long step costs others more than short steps cost the flood.
_REMEMBERED_STEPS, _REMEMBERED_APART = 8, 64
_COSTED_STEPS = 1000  # steps that a flood's texts last, so that a lull in between starts few of them


@dataclass(slots=True)
class StepLimits:
    """How much prompts may take of one step, while it is planned.

    Attributes:
        most: tokens at which the step is closed.
        longest: tokens of prompts at which a text's piece ends; None if only the budget bounds it.
        beside: tokens of prompts up to which flooding flows fill the step if others have requests.
        others: whether flows within their allowance have requests, or are expected to.
        apart: whether flooding flows stay out of this step if it has requests of others.
    """

    queue: FairQueue
    most: int
    longest: int | None
    beside: int
    others: bool
    apart: bool

    def closes(self, sequence: Sequence, prompts: int) -> bool:
        """Return whether a step with so many tokens of prompts is closed to a sequence and those after it."""
        return self.others and prompts >= self.beside and self.queue.floods(sequence)

    def leaves_out(self, sequence: Sequence, plan: StepPlan) -> bool:
        """Return whether a sequence waits for the next step, because this one is of others."""
        if self.apart and plan.parts and self.queue.floods(sequence):
            plan.leaves_flood = True
            return True
        return False

    def most_text(self, sequence: Sequence) -> int | None:
        if self.longest is None:
            return None
        return self.beside if self.others and self.queue.floods(sequence) else self.longest

    def take(self, sequence: Sequence) -> None:
        floods = self.queue.floods(sequence)
        self.others = self.others or not floods
        self.apart = self.apart and not floods  # it came first in the fair order


class FloodRules:
    """Makes the limits of each step, from `StepSizes` and from the steps before."""

    def __init__(self, queue: FairQueue, max_tokens: int) -> None:
        self._queue = queue
        self._max_tokens = max_tokens
        self._sizes = StepSizes()
        self._beside_others = 0  # further steps in which flows within their allowance may have requests
        self._flood_waited = False  # whether the last step left flooding flows out
        self._mean_cost, self._costed = 0.0, 0
        self.waited_cost = 0.0  # of steps since the last one with decodes

    @property
    def mean_cost(self) -> float:
        """Cost of the last steps in which flooding flows had a share."""
        return self._mean_cost

    @property
    def expects_others(self) -> bool:
        """Whether flows within their allowance have had requests in the last steps."""
        return self._beside_others > 0

    def set_sizes(self, sizes: StepSizes) -> None:
        self._sizes = sizes
        self._queue.allowance = sizes.allowance or self._max_tokens

    def limits(self, decodes: int) -> StepLimits:
        sizes = self._sizes
        longest = sizes.longest or self._max_tokens
        most = min(self._max_tokens if decodes else self._target_tokens(), longest + decodes)
        beside = min(sizes.beside or longest, longest)
        apart = sizes.apart and not self._flood_waited
        return StepLimits(self._queue, most, sizes.longest, beside, self._beside_others > 0, apart)

    def _target_tokens(self) -> int:
        enough = self._sizes.enough
        backlog = self._queue.work > self._max_tokens
        if backlog and self._beside_others:
            backlog = self._queue.work_within() > self._max_tokens
        return self._max_tokens if backlog or enough is None else min(enough, self._max_tokens)

    def commit(self, plan: StepPlan) -> None:
        """Count a step whose sequences are still in the queue."""
        others = any(not self._queue.floods(part.sequence) for part in plan.parts)
        remembered = _REMEMBERED_APART if self._sizes.apart else _REMEMBERED_STEPS
        self._beside_others = remembered if others else max(0, self._beside_others - 1)
        self._flood_waited = plan.leaves_flood
        self.waited_cost = self.waited_cost + plan.cost if plan.cost is not None and not plan.decodes else 0.0
        if plan.cost is not None:
            self._costed = min(self._costed + 1, _COSTED_STEPS)
            self._mean_cost += (plan.cost - self._mean_cost) / self._costed
