"""What a text costs at each replica beyond the wait: prompt tokens that are not cached, and room for more of them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ranklet.routing.fleet import Fleet, Vector
from ranklet.routing.hint import TextHint
from ranklet.routing.policy import Policy
from ranklet.routing.prefix import PAGE_TOKENS, PrefixTable
from ranklet.routing.rendezvous import mix
from ranklet.routing.report import StateReport, limited_age_s

_WRONG_SHARE = 0.5  # an entry is dropped if less than this part of the expected tokens was cached


class TextCost(NamedTuple):
    """The costs of one text call.

    Attributes:
        cost: float64 [replicas], in seconds.
        work: of the whole call at the replica that must compute the fewest tokens.
        uncached: float64 [replicas], prompt tokens that each replica must compute.
        longest: indices of the one or two replicas that have most of the prompt; empty if many have.
        next_page: hash of the first page that no replica is known to have; None if there is none.
    """

    cost: Vector
    work: float
    uncached: Vector
    longest: Sequence[int]
    next_page: int | None


class TextCosts:
    """The costs of texts, by what a router knows of the replicas' key-value caches."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._table = PrefixTable()
        self._expected: dict[int, tuple[TextHint, int, float]] = {}  # by request: replica and cached tokens

    def set_members(self) -> None:
        self._table.set_members(member.id for member in self._fleet.members)
        self._expected.clear()

    def cost(self, hint: TextHint, tokens: float, policy: Policy) -> TextCost:
        """Return the costs of a call with this number of prompt tokens."""
        fleet, found = self._fleet, self._table.match(hint.pages)
        if found is None:
            known, least, uncached = 0, tokens, np.full(len(fleet), tokens)
        else:
            known, least = found.pages, max(tokens - found.pages * PAGE_TOKENS, 1.0)
            uncached = np.maximum(tokens - found.tokens, 1.0)
        # By its own rate, a replica that computes long prompts, in large steps, would draw still more of them.
        cost = uncached * (policy.uncached_factor / fleet.mean_rate)
        if found is None and hint.pages:  # all routers choose the same home
            cost *= 1.0 + mix(fleet.salts ^ np.uint64(hint.pages[0])) / 2.0**64
        if hint.room > fleet.texts.least_free_tokens:
            cost += fleet.texts.room_s(hint.room - tokens + uncached)
        if hint.texts > fleet.texts.least_free_texts:
            cost += fleet.texts.places_s(hint.texts)
        longest = () if found is None else found.longest
        next_page = hint.pages[known] if known < len(hint.pages) else None
        return TextCost(cost, least + hint.texts * fleet.texts.work, uncached, longest, next_page)

    def work(self, hint: TextHint, uncached: float, policy: Policy) -> float:
        """Return the work of a call that delays others."""
        return uncached + policy.running_text_share * hint.texts * self._fleet.texts.work

    def add(self, request: int, hint: TextHint, i: int, cached_tokens: float, now_s: float) -> None:
        """Note that replica `i` is sent a call, and should find this much of its prompt in its cache."""
        self._expected[request] = hint, i, cached_tokens
        self._table.add(hint.pages, i, now_s)
        self._fleet.texts.add(i, hint.texts)

    def complete(self, request: int, replica: str | None, cached_tokens: int | None) -> None:
        """Note the end of a call. Drop what turned out to be wrong."""
        expected = self._expected.pop(request, None)
        if expected is None or replica is None or cached_tokens is None:
            return
        hint, i, tokens = expected
        if self._fleet.members[i].id == replica and cached_tokens < _WRONG_SHARE * tokens:
            self._table.drop(hint.pages, i, cached_tokens)

    def on_report(self, report: StateReport, now_s: float, age_s: float) -> None:
        """Store what a replica has told of its prefixes."""
        news, told_s = report.prefixes, now_s - limited_age_s(age_s)
        if news is not None and news.is_possible():
            self._table.learn(report.replica, news.pages, told_s - news.kept_s, told_s)
