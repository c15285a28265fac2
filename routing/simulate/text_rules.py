"""Routing rules for texts that leave out what ranklet's rule uses."""

from collections.abc import Sequence
from dataclasses import replace

from ranklet.routing.hint import TextHint
from ranklet.routing.simulate.conversations import SimulatedText
from ranklet.routing.simulate.engine import SimulatedEngine, SimulatedRequest
from ranklet.routing.simulate.rules import GlobalRule, RankletRule

_MAX_IMBALANCE = 8  # open requests more than at the least busy of two replicas, from which on prefixes do not count


class AdapterOnly(RankletRule):
    """ranklet's rule without prefixes."""

    def hint(self, request: SimulatedRequest) -> TextHint | None:
        hint = request.hint()
        return None if hint is None else replace(hint, pages=())


class PrefixOnly(GlobalRule):
    """The replica that was sent the longest prefix of the prompt's text, unless it is too busy; else the idler of two.

    This is the rule of routers that know texts but no adapters. It sees every queue without delay.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self._holders: dict[int, dict[int, None]] = {}

    def set_replicas(self, engines: Sequence[SimulatedEngine | None], now_s: float) -> None:
        super().set_replicas(engines, now_s)
        self._holders.clear()

    def choose(self, request: SimulatedRequest, now_s: float) -> tuple[int, Sequence[int]]:
        assert isinstance(request, SimulatedText)
        pages = request.plain[: len(request.prompt_pages)]
        chosen = self.shorter_of_two(self.ranks)
        for page in reversed(pages):
            if page in self._holders:
                best = min(self._holders[page], key=self.open_requests)
                if self.open_requests(best) <= self.open_requests(chosen) + _MAX_IMBALANCE:
                    chosen = best
                break
        for page in pages:
            self._holders.setdefault(page, {})[chosen] = None
        return chosen, ()
