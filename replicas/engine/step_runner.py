"""Launches planned steps: those with pages and those without."""

from collections.abc import Sequence

from ranklet.replicas.engine.launched import LaunchedStep
from ranklet.replicas.engine.paged_runner import PagedRunner
from ranklet.replicas.engine.plan import StepPlan
from ranklet.replicas.engine.planned_spans import PlannedSpans
from ranklet.replicas.engine.runner import Runner


class StepRunner:
    """Launches the steps of one engine.

    Attributes:
        paged: None if the engine keeps no keys and values.
    """

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.paged: PagedRunner | None = None

    def launch(self, plan: StepPlan, slots: Sequence[int | None]) -> LaunchedStep:
        """Start a committed step. On CUDA it returns while the device works.

        Args:
            slots: pool slot of the adapter of each of `plan.parts`; None for the base model.
        """
        if plan.uses_pages:
            assert self.paged is not None, "a plan without a space for pages uses none"
            return self.paged.launch(plan, slots)
        planned = PlannedSpans.of(plan, slots)
        return self.runner.launch(planned.spans, planned.slots)
