"""CPU time of one routing decision, with reporting replicas, Zipf-distributed adapters and requests in flight.

It is the CPU time of the thread: of other processes on the machine, it only has what they take from the caches. With
texts, each adapter has a system prompt of 23 pages, which half of its holders have cached; each text continues a
conversation with 12 more pages that one replica has. At every replica, a text waits for others to end.
"""

from statistics import median
from time import thread_time
from typing import Any

import numpy as np

from ranklet.routing.affinity import Affinity
from ranklet.routing.fleet import Fleet, Member
from ranklet.routing.hint import TextHint
from ranklet.routing.prefix import PAGE_TOKENS, page_hashes, prefix_root
from ranklet.routing.report import Holdings, PrefixNews, QueueLoad, StateReport
from tests.bench import report

_CHOICES = 20_000
_SLOTS = 64
_IN_FLIGHT = 200
_RATE = 300_000.0


def row(replicas: int, adapters: int, *, text: bool = False) -> dict[str, Any]:
    """Time `choose`, and the bookkeeping of one request and one report."""
    now_s, fleet, names = 0.0, Fleet(), [f"adapter-{i}" for i in range(adapters)]
    affinity = Affinity(fleet=fleet, clock=lambda: now_s)
    affinity.set_members([Member(f"r{i}", i) for i in range(replicas)])
    for i in range(replicas):
        held = frozenset(names[(i * _SLOTS + k) % adapters] for k in range(_SLOTS))
        holdings = Holdings(0, held, frozenset(), frozenset(), _SLOTS, len(held), 64)
        load = QueueLoad(0, 0, _RATE, 0, 0, 0.0, 20 * text, 1000.0 * text, free_texts=-text, ended_per_s=100.0)
        affinity.on_report(StateReport(f"r{i}", load, holdings, ("me", "you")), "me")
        if text:
            known = tuple(page for name in held if (hash(name) + i) % 2 for page in _pages(name)[22:23])
            news = PrefixNews((*known, *(_pages(name, i)[34] for name in held)))
            affinity.on_report(StateReport(f"r{i}", load, holdings, ("me", "you"), {}, news), "me")
    weights = np.arange(1, adapters + 1) ** -1.1
    drawn = np.random.default_rng(0).choice(adapters, _CHOICES, p=weights / weights.sum()).tolist()
    hints = [TextHint(_pages(names[each], k % replicas), 1, 2500) if text else None for k, each in enumerate(drawn)]
    choose_s, rest_s = [], []
    for k, which in enumerate(drawn):
        now_s = k / 5000
        began_s = thread_time()
        choice = affinity.choose(names[which], 2300 if text else 512, text=hints[k])
        chosen_s = thread_time()
        fleet.add_request(k, choice.order[0], 512, now_s)
        fleet.complete_request(k - _IN_FLIGHT)
        fleet.update_load(f"r{choice.order[0]}", QueueLoad(k, 1000, _RATE, k, 512 * k), now_s)
        rest_s.append(thread_time() - chosen_s)
        choose_s.append(chosen_s - began_s)
    choose_us, rest_us = np.array(choose_s[_CHOICES // 2 :]) * 1e6, np.array(rest_s[_CHOICES // 2 :]) * 1e6
    return {
        "replicas": replicas, "adapters": adapters, "choose_us": float(choose_us.mean()),
        "choose_p50_us": float(median(choose_us)), "choose_p99_us": float(np.percentile(choose_us, 99)),
        "sent_answered_heard_us": float(rest_us.mean()),
    }  # fmt: skip


def text_row(replicas: int, adapters: int) -> dict[str, Any]:
    """Time choices for texts, and for embeddings before and after them, of which the faster run counts."""
    before, found, after = (row(replicas, adapters, text=text) for text in (False, True, False))
    plain_us = {name: min(before[name], after[name]) for name in ("choose_us", "choose_p50_us")}
    return found | {
        "embedding_us": plain_us["choose_us"], "embedding_p50_us": plain_us["choose_p50_us"],
        "p50 by embedding": found["choose_p50_us"] / plain_us["choose_p50_us"],
    }  # fmt: skip


def _pages(name: str, conversation: int = 0) -> list[int]:
    """Return the pages of a system prompt and of one of its conversations."""
    return [hash((name, page)) for page in range(23)] + [hash((name, page, conversation)) for page in range(12)]


def prefix_row(pages: int) -> dict[str, Any]:
    """Time the hashes of a prompt's pages."""
    ids = np.random.default_rng(0).integers(0, 150_000, pages * PAGE_TOKENS + 9).astype(np.int32)
    root, times_s = prefix_root("adapter", "revision", ""), []
    for _ in range(2000):
        began_s = thread_time()
        page_hashes(root, ids)
        times_s.append(thread_time() - began_s)
    return {"pages": pages, "hash_p50_us": median(times_s) * 1e6, "hash_us": sum(times_s) / len(times_s) * 1e6}


def main() -> None:
    parser = report.parser(__doc__)
    options = parser.parse_args()
    rows = [row(replicas, adapters) for replicas, adapters in ((4, 256), (64, 1000), (1000, 1000), (1000, 10_000))]
    report.save("policy", rows, options.out)
    report.save("policy-text", [text_row(replicas, 1000) for replicas in (64, 1000)], options.out)
    report.save("policy-prefix", [prefix_row(pages) for pages in (24, 128, 512)], options.out)


if __name__ == "__main__":
    main()
