"""Streams of texts while processes die and change. Each must be that of a request without faults, token for token."""

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import httpx
import numpy as np
import orjson

from tests.cluster.service import TIMEOUT_S
from tests.cluster.text_client import COMPLETIONS

_SAMPLING: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0, "repetition_penalty": 1.3},
    {"temperature": 0.9},
    {"temperature": 1.1, "top_p": 0.9, "frequency_penalty": 0.5},
    {"temperature": 0.8, "n": 2, "logprobs": 1},
)


def stream_requests(models: Sequence[str], count: int, longest: int) -> list[dict[str, Any]]:
    """Return different requests for texts of a fourth of `longest` tokens up to `longest`."""
    rng = np.random.default_rng(3)
    return [
        {
            "model": models[i % len(models)],
            "prompt": rng.integers(3, 1000, int(rng.integers(4, 150))).tolist(),
            "max_tokens": int(rng.integers(longest // 4, longest + 1)),
            "ignore_eos": True,
            "seed": i,
            "return_token_ids": True,
            **_SAMPLING[i % len(_SAMPLING)],
        }
        for i in range(count)
    ]


@dataclass
class ReceivedText:
    """A choice: its token ids, its text, why it ended, and how many of its tokens came with logprobs."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    reason: str | None = None
    scored: int = 0

    def add(self, choice: dict[str, Any]) -> None:
        assert self.reason is None, "a chunk after the last one of its choice"
        self.tokens += choice["token_ids"]
        self.text += choice["text"]
        self.reason = choice["finish_reason"]
        self.scored += len((choice["logprobs"] or {"tokens": ()})["tokens"])


@dataclass
class ReceivedStream:
    """What came of one request.

    Attributes:
        error: message of an error event or status; "" for a stream that has its end.
        pause_s: longest time between two events, after the first.
    """

    texts: dict[int, ReceivedText] = field(default_factory=dict)
    usage: dict[str, Any] = field(default_factory=dict)
    error: str = "the stream has no end"
    pause_s: float = 0.0

    def add(self, event: dict[str, Any]) -> None:
        self.usage = event.get("usage") or self.usage
        for choice in event["choices"]:
            self.texts.setdefault(choice["index"], ReceivedText()).add(choice)

    def verdict(self, expected: "ReceivedStream") -> str:
        """Return right, wrong, failed, or which part is wrong."""
        if self.error:
            same = all(
                text.tokens == expected.texts[index].tokens[: len(text.tokens)] for index, text in self.texts.items()
            )
            return "failed" if same else "failed, with wrong tokens"
        if self.texts != expected.texts:
            return "wrong"
        counts = ("prompt_tokens", "completion_tokens", "total_tokens")
        return "right" if all(self.usage[name] == expected.usage[name] for name in counts) else "wrong usage"


async def receive(
    http: aiohttp.ClientSession, fields: dict[str, Any], on_open: Callable[[str], object] = lambda replica: None
) -> ReceivedStream:
    """Send one request and read its stream.

    Args:
        on_open: called with the id of the stream's first replica, once there is a token.
    """
    seen, last_s = ReceivedStream(), 0.0
    body = {**fields, "stream": True, "stream_options": {"include_usage": True}}
    try:
        async with http.post(COMPLETIONS, json=body) as answer:
            if answer.status != 200:
                seen.error = f"{answer.status}: {await answer.text()}"
                return seen
            if (replica := answer.headers.get("x-ranklet-replica")) is None:
                seen.error = "the answer has no x-ranklet-replica"
                return seen
            on_open(replica)
            async for line in answer.content:
                if not line.startswith(b"data: "):
                    continue
                now_s = time.monotonic()
                seen.pause_s, last_s = max(seen.pause_s, now_s - (last_s or now_s)), now_s
                if line == b"data: [DONE]\n":
                    seen.error = "" if seen.usage else "the stream has no usage"
                    return seen
                event = orjson.loads(line[6:])
                if "error" in event:
                    seen.error = event["error"]["message"]
                    return seen
                seen.add(event)
    except (aiohttp.ClientError, TimeoutError) as error:
        seen.error = f"{type(error).__name__}: {error}"
    return seen


class StreamLoad:
    """Keeps a number of streams open, from the first `start` on.

    Attributes:
        verdicts: how many streams were right, wrong or failed.
        errors: of failed streams.
        opened: how many streams began on each replica.
        pause_s: longest pause of any stream.
    """

    def __init__(self, url: str, requests: Sequence[dict[str, Any]]) -> None:
        self._url = url
        self._requests = requests
        with ThreadPoolExecutor() as pool:
            self._expected = list(pool.map(self._whole, requests))
        self.clear()

    def clear(self) -> None:
        self.verdicts: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.opened: Counter[str] = Counter()
        self.pause_s = 0.0

    def _whole(self, fields: dict[str, Any]) -> ReceivedStream:
        answer = httpx.post(self._url + COMPLETIONS, json=fields, timeout=TIMEOUT_S, trust_env=False)
        assert answer.status_code == 200, answer.text
        seen = ReceivedStream(error="")
        seen.add(answer.json())
        return seen

    @contextmanager
    def running(self, streams: int = 64, most: int = 1 << 30) -> Iterator[None]:
        """Keep streams open during the body. Those that are open at its end, end themselves.

        Args:
            most: number of streams to start.
        """
        stop = threading.Event()
        thread = threading.Thread(target=lambda: asyncio.run(self._run(streams, most, stop)))
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    async def _run(self, streams: int, most: int, stop: threading.Event) -> None:
        turns = iter(range(most))

        async def keep(http: aiohttp.ClientSession) -> None:
            for turn in turns:
                if stop.is_set():
                    return
                at = turn % len(self._requests)
                seen = await receive(http, self._requests[at], lambda replica: self.opened.update([replica]))
                self.verdicts[seen.verdict(self._expected[at])] += 1
                self.pause_s = max(self.pause_s, seen.pause_s)
                if seen.error:
                    self.errors[seen.error] += 1

        timeout = aiohttp.ClientTimeout(total=None, sock_read=TIMEOUT_S)
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(self._url, connector=connector, timeout=timeout) as http:
            await asyncio.gather(*(keep(http) for _ in range(streams)))

    @property
    def ended(self) -> int:
        return sum(self.verdicts.values())
