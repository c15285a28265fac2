"""A simulated replica that makes texts, in steps of decodes with pieces of prompts beside them."""

from bisect import insort
from collections import Counter
from dataclasses import dataclass, field
from typing import cast

from ranklet.routing.prefix import PAGE_TOKENS
from ranklet.routing.prefix_log import PrefixLog
from ranklet.routing.simulate.conversations import SimulatedText
from ranklet.routing.simulate.engine import SimulatedEngine, SimulatedRequest, Speed
from ranklet.routing.simulate.pages import SimulatedPages
from ranklet.routing.speed import SpeedMeter

_SLOWDOWN = 0.8  # a step of decodes may take this much longer with prompts, as `decode_slowdown` says
_LEAST_TOKENS = 256  # of prompts beside few decodes
_BURST, _BURST_TEXTS = 0.05, 4  # texts that can start, from which on a step takes as many prompts as it can
_BURST_TOKENS = 8192
_DEFAULT_WORK_PER_S = 100_000.0


@dataclass(frozen=True, slots=True)
class TextSpeed(Speed):
    """The speed of Qwen3-0.6B's shapes with LoRA on one H200.

    Fitted to decode-step-h200.json (each of its steps within 14 %), generate-h200.json and generate-h200-gaps.json.
    """

    step_s: float = 0.00111  # of decodes, whatever their number
    decode_s: float = 5.79e-6  # of one decode without context
    read_s: float = 2.43e-8  # for each token of its context
    adapter_s: float = 2.82e-5  # for each adapter in a step
    most_adapters: int = 32  # beyond which a step takes no longer
    mixed_s: float = 0.00133  # further time of a step of decodes with prompts
    attend: float = 2e-4  # further work of a prompt's token for each token before it
    rows: int = 256
    kv_tokens: int = 1_000_000

    def text_s(self, answer: float, context: float) -> float:
        """Return the device time of an answer in full steps, without its prompt."""
        shared_s = (self.step_s + self.adapter_s * self.most_adapters) / self.rows
        return answer * (self.decode_s + self.read_s * (context + answer / 2) + shared_s)


@dataclass(slots=True, eq=False)
class SimulatedTextEngine(SimulatedEngine):
    """One replica. `running` are the texts that hold pages, in the order in which they started.

    Attributes:
        begun: texts that the last step gave their first token.
        preemptions: so far.
        work_s: device time, without the part of a step that does not depend on its size.
        news: pages that routers are told of.
        measured: the speed as a real replica measures it.
    """

    begun: list[SimulatedText] = field(default_factory=list)
    preemptions: int = 0
    work_s: float = 0.0
    news: PrefixLog = field(default_factory=PrefixLog)
    measured: SpeedMeter = field(default_factory=SpeedMeter)
    pages: SimulatedPages = field(init=False)
    decodes: int = 0
    _steps: int = 0
    _context: int = 0  # tokens before all decodes
    _ends: list[tuple[int, int, SimulatedText]] = field(default_factory=list)  # the next to end last
    _adapters: "Counter[str | None]" = field(default_factory=Counter)  # of decodes
    _prompts: list[SimulatedText] = field(default_factory=list)  # texts that have started, without a token yet
    _completed: list[SimulatedText] = field(default_factory=list)  # prompts that the running step completes
    _step: tuple[int, int, float] | None = None  # prompt tokens and decodes of the running step, and its time

    def __post_init__(self) -> None:
        self.pages = SimulatedPages(self.text_speed.kv_tokens // PAGE_TOKENS)

    @property
    def text_speed(self) -> TextSpeed:
        return cast(TextSpeed, self.speed)

    @property
    def open_requests(self) -> int:
        return len(self.queue) + len(self.running)

    @property
    def work_per_s(self) -> float:
        return self.measured.work_per_s or _DEFAULT_WORK_PER_S

    @property
    def waiting_work(self) -> float:
        return self.queued_tokens * self.measured.uncached_share

    @property
    def outstanding(self) -> float:
        return self.waiting_work + self.decodes * self.measured.text_work

    @property
    def step_length_s(self) -> float:
        """Return the time of the running step, and 0 without one."""
        return self._step[2] if self._step else 0.0

    def start_batch(self, now_s: float) -> float | None:
        if self._step is not None:
            return None
        speed, decodes = self.text_speed, self.decodes
        alone_s = own_s = 0.0
        if decodes:
            own_s = decodes * speed.decode_s + self._context * speed.read_s
            alone_s = own_s + speed.step_s + speed.adapter_s * min(len(self._adapters), speed.most_adapters)
        tokens, prompt_s = self._take_prompts(now_s, self._budget_s(alone_s))
        if not decodes and not tokens:
            return None
        fixed_s = (speed.mixed_s if decodes else speed.launch_s) if tokens else 0.0
        step_s = alone_s + prompt_s + fixed_s
        self.work_s += own_s + prompt_s
        self.busy_s += step_s
        self._step = tokens, decodes, step_s
        return step_s

    def _budget_s(self, alone_s: float) -> float:
        """Return how long the prompts of the next step may take."""
        speed = self.text_speed
        if not self.decodes:
            return 2 * _BURST_TOKENS / speed.tokens_per_s
        can_start = min(len(self.queue), speed.rows - len(self.running))
        if can_start >= max(_BURST * self.decodes, _BURST_TEXTS):
            return 2 * _BURST_TOKENS / speed.tokens_per_s
        return max(_SLOWDOWN * alone_s - speed.mixed_s, _SLOWDOWN * _LEAST_TOKENS / speed.tokens_per_s)

    def _take_prompts(self, now_s: float, budget_s: float) -> tuple[int, float]:
        """Take pieces of prompts into the step, oldest first. Returns their tokens and time."""
        tokens, left_s = 0, budget_s
        for text in self._prompts:
            piece, left_s = self._piece(text, left_s)
            tokens += piece
            if left_s <= 0:
                break
        skipped: list[SimulatedRequest] = []
        computing = {text.pages[n] for text in self._prompts if (n := len(text.held)) < len(text.prompt_pages)}
        while self.queue and left_s > 0 and len(self.running) < self.text_speed.rows:
            text = cast(SimulatedText, self.queue.popleft())
            is_ready = text.adapter is None or text.adapter in self.resident
            if not is_ready or not computing.isdisjoint(text.prompt_pages):  # it can share pages that are computed now
                skipped.append(text)
                continue
            if not self._start(text, now_s):
                skipped.append(text)
                break
            if (n := len(text.held)) < len(text.prompt_pages):
                computing.add(text.pages[n])
            piece, left_s = self._piece(text, left_s)
            tokens += piece
        self.queue.extendleft(reversed(skipped))
        self._prompts = [text for text in self._prompts if text.missing]
        return tokens, budget_s - left_s

    def _piece(self, text: SimulatedText, left_s: float) -> tuple[int, float]:
        """Return the tokens of a prompt that fit into the time that is left, and the time that is left then."""
        speed, start = self.text_speed, text.known - text.missing
        fit = int(left_s * speed.tokens_per_s / (1 + speed.attend * (start + text.missing / 2)))
        piece = min(text.missing, max(fit, PAGE_TOKENS))
        text.missing -= piece
        if not text.missing:
            self._completed.append(text)
        return piece, left_s - piece * (1 + speed.attend * (start + piece / 2)) / speed.tokens_per_s

    def _start(self, text: SimulatedText, now_s: float) -> bool:
        prompt = text.pages[: (text.known - 1) // PAGE_TOKENS]
        held = prompt[: self.pages.match(prompt)]
        new = text.known / PAGE_TOKENS - len(held)
        if new + len(held) + len(self.running) > self.pages.available and self.running:
            return False
        self.pages.use(held)
        self.pages.grow(new)
        self.pages.evict()
        text.held, text.missing = held, text.known - len(held) * PAGE_TOKENS
        if text.cached is None:
            text.cached = len(held) * PAGE_TOKENS
            self.measured.add_prompt(text.tokens, text.cached)
        if text.adapter is not None:
            self._use(text.adapter, now_s)
        self.running.append(text)
        self._prompts.append(text)
        return True

    def finish_step(self, now_s: float) -> list[SimulatedText]:
        """End the running step. Returns the texts that have ended."""
        assert self._step is not None
        tokens, decodes, step_s = self._step
        self._step = None
        self._steps += 1
        self.done_tokens += tokens + decodes
        self.measured.add_step(tokens, decodes, step_s)
        self._context += decodes
        self.pages.grow(decodes / PAGE_TOKENS)
        ended = []
        while self._ends and self._ends[-1][0] <= self._steps:
            text = self._ends.pop()[2]
            self._end(text, now_s)
            ended.append(text)
        self.begun, completed, self._completed = [], self._completed, []
        for text in completed:
            if self._begin(text, now_s):
                ended.append(text)
        while not self.pages.evict():
            self._preempt(now_s)
        return ended

    def _begin(self, text: SimulatedText, now_s: float) -> bool:
        """Give a text its first token after its prompt. Returns whether it is its last."""
        full = text.pages[: text.known // PAGE_TOKENS]
        more = full[len(text.held) :]
        self.pages.use(more)
        self.pages.grow(-len(more))
        text.held = full
        left = text.answer - (text.known - text.tokens) - 1
        if text.known == text.tokens:
            text.first_s = now_s
            self.begun.append(text)
            self.queued_tokens -= text.tokens
            found = (text.cached or 0) // PAGE_TOKENS
            self.news.add((*full[found - 1 : found], *full[-1:]))
        if left <= 0:
            self._finish(text, now_s)
            return True
        text.started, text.end_step = self._steps, self._steps + left
        insort(self._ends, (text.end_step, text.id, text), key=lambda end: (-end[0], -end[1]))
        self.decodes += 1
        self._context += text.known
        self._adapters[text.adapter] += 1
        return False

    def _stop_decoding(self, text: SimulatedText) -> int:
        """Returns the number of tokens that it was given since it started."""
        made = self._steps - text.started
        self.decodes -= 1
        self._context -= text.known + made
        self._adapters[text.adapter] -= 1
        if not self._adapters[text.adapter]:
            del self._adapters[text.adapter]
        return made

    def _end(self, text: SimulatedText, now_s: float) -> None:
        text.known += self._stop_decoding(text)
        self._finish(text, now_s)

    def _finish(self, text: SimulatedText, now_s: float) -> None:
        self.running.remove(text)
        self.pages.grow(len(text.held) - text.known / PAGE_TOKENS)
        more = text.pages[len(text.held) :]
        self.pages.use(more)
        self.pages.release(text.pages, now_s)
        self.news.add(text.pages[-1:])
        kept = text.tokens + text.answer - (text.cached or 0)
        self.measured.add_text(text.answer, kept, max(now_s - text.first_s, 1e-3))

    def _preempt(self, now_s: float) -> None:
        """Take the pages of the text that started last, which is computed again."""
        text = cast(SimulatedText, self.running.pop())
        self.preemptions += 1
        if text in self._prompts:
            self._prompts.remove(text)
        else:
            self._ends.remove((text.end_step, text.id, text))
            text.known += self._stop_decoding(text)
        self.pages.grow(len(text.held) - text.known / PAGE_TOKENS)
        self.pages.release(text.held, now_s)
        text.held = ()
        self.queue.appendleft(text)
        if text.adapter is not None:
            self.waiting[text.adapter] += 1
