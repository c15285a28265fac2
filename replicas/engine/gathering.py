"""Lets texts wait for a few steps of decodes, so that one step computes several of their prompts together. No clock.

A step with decodes takes longer once it has a prompt, however short (`StepCost.mixed`). While texts wait for rows, rows
become free one by one, and each step would have a prompt. So texts wait as long as the rows that stay empty cost less
than one such step costs more. That is the cheapest number of prompts at any rate at which rows become free. Prompts of
embeddings and prompts of which a piece is computed wait for nothing, and texts start beside them.
"""

from ranklet.replicas.engine.holders import Holders
from ranklet.replicas.engine.plan import StepPlan
from ranklet.replicas.engine.step_cost import PromptBudget

MOST_STEPS = 4  # for which a text waits


class Gathering:
    """Counts the steps without the texts that wait.

    Attributes:
        is_on: whether texts may wait.
    """

    def __init__(self) -> None:
        self.is_on = True
        self._steps = 0
        self._cost = 0.0

    def leave_prompts(self, plan: StepPlan, budget: PromptBudget, holders: Holders, texts: int) -> None:
        """Take the prompts out of a plan if they wait for others.

        Args:
            texts: number of texts that wait for a row, those that the plan starts included; 0 if rows are left.
        """
        if not (self.is_on and plan.decodes and plan.parts and texts > len(plan.parts)) or plan.passed:
            return
        if any(not part.sequence.is_new_text for part in plan.parts):
            return
        cost = budget.decodes_cost * len(plan.parts) / len(plan.decodes)
        is_cheap = self._steps < MOST_STEPS and self._cost + cost <= budget.costs.mixed
        if is_cheap and budget.has_space_for_more(len(plan.parts)) and not holders.prompts():
            plan.leave_prompts(cost)

    def commit(self, plan: StepPlan) -> None:
        if plan.empty_rows_cost:
            self._steps += 1
            self._cost += plan.empty_rows_cost
        else:
            self._steps, self._cost = 0, 0.0
