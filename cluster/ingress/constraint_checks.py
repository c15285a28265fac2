"""Checks at a gateway that what texts must be can be enforced, before a replica gets the request."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

from ranklet.cluster.ingress.fair_budget import FairBudget
from ranklet.replicas.engine.limits import RequestLimits
from ranklet.replicas.grammar.checker import GrammarChecker
from ranklet.replicas.grammar.constraint import Constraint


class ConstraintChecks:
    """Checks one grammar at a time, in a process of its own, off the event loop."""

    def __init__(self) -> None:
        self.checker = GrammarChecker()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._turns = FairBudget(1, jobs=1)

    def is_known(self, constraint: Constraint | None, limits: RequestLimits) -> bool:
        """Return whether a constraint is known to be enforceable. If not, `check` must come first.

        Raises:
            InvalidRequest: it is known not to be.
        """
        if constraint is None or constraint.grammar is None:
            return True
        if limits.no_grammar is not None:
            raise constraint.refusal(limits.no_grammar)
        _refuse_for(self.checker.quick_refusal(constraint.grammar), constraint)
        return self.checker.knows(constraint.grammar)

    async def check(self, constraint: Constraint, owner: str) -> None:
        """Check a constraint. Owners take turns.

        Raises:
            InvalidRequest: it cannot be enforced.
        """
        assert constraint.grammar is not None, "`is_known` comes first"
        async with self._turns.spend(owner, 1):
            found = await asyncio.get_running_loop().run_in_executor(
                self._thread, self.checker.refusal, constraint.grammar
            )
        _refuse_for(found, constraint)


def _refuse_for(reason: str | None, constraint: Constraint) -> None:
    if reason is not None:
        raise constraint.refusal(reason)
