"""Metrics of the texts that one gateway answers, under names of ranklet and those of vLLM that other tools read."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Literal

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from ranklet.cluster.ingress.histogram import AdapterHistogram, WeightedHistogram
from ranklet.cluster.labels import BASE, LATENCY_BUCKETS_S, OTHER, AdapterLabels

CancelReason = Literal["client_gone", "slow_reader", "error"]
CANCEL_REASONS: tuple[CancelReason, ...] = ("client_gone", "slow_reader", "error")
FINISH_REASONS = ("stop", "length")
_GAP_BUCKETS_S = (0.001, 0.002, 0.003, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.25, 1.0, 5.0)
_TEXT_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
_TOP_FIELDS = 30
_LONGEST_FIELD = 40


class TextMetrics(Collector):
    """Metrics of requests for text. Its methods may be called on any thread.

    A request that reached a replica ends with one call of `finished` or of `cancelled`. A refusal is neither:
    `ranklet_requests_total` counts it. `label` is a value that `labels` returned when the request's model was known.

    Args:
        model: name of the base model, for the label `model_name` of vLLM's metrics.
    """

    def __init__(self, registry: CollectorRegistry, labels: AdapterLabels, model: str) -> None:
        self._labels = labels
        self._model = model
        self._first_token = AdapterHistogram(LATENCY_BUCKETS_S)
        self._gap = WeightedHistogram(_GAP_BUCKETS_S)
        self._seconds = WeightedHistogram(_TEXT_BUCKETS_S)
        self._prompt_lengths = WeightedHistogram(_TOKENS)
        self._text_lengths = WeightedHistogram(_TOKENS)
        counter = partial(Counter, registry=registry)
        self._prompt_tokens = counter(
            "ranklet_text_prompt_tokens_total",
            "Prompt tokens of texts, those from the prefix cache included",
            ["adapter"],
        )
        self._generated_tokens = counter(
            "ranklet_text_generated_tokens_total", "Tokens of texts that were answered whole", ["adapter"]
        )
        self._choices = counter(
            "ranklet_text_choices_total", "Choices of texts, by finish reason", ["adapter", "reason"]
        )
        self._cancelled = counter(
            "ranklet_text_cancelled_total", "Requests whose text ended early, by reason", ["adapter", "reason"]
        )
        self._success = counter(
            "vllm:request_success_total", "Choices of texts, by finish reason", ["model_name", "finished_reason"]
        )
        self._ignored = counter("ranklet_ignored_fields_total", "Fields of requests that had no effect", ["field"])
        for reason in FINISH_REASONS:  # a rate misses the first event of a series that does not start at 0
            self._choices.labels(BASE, reason)
            self._success.labels(model, reason)
        for cancel_reason in CANCEL_REASONS:
            self._cancelled.labels(BASE, cancel_reason)
        self._fields = AdapterLabels(_TOP_FIELDS, self._ignored.remove)
        registry.register(self)

    def first_token(self, label: str, seconds: float) -> None:
        """Record the time from a request's headers to its first token, once a request whose tokens are streamed."""
        self._first_token.observe(self._labels.current(label), seconds)

    def tokens(self, count: int, seconds: float) -> None:
        """Record tokens of a streamed choice that arrive together, except its first ones.

        There is no label: adapters share the steps of a replica.

        Args:
            count: number of tokens, at least 1.
            seconds: time since the tokens before them. Each token counts with an equal part of it.
        """
        self._gap.observe(seconds / count, count)

    def finished(
        self, label: str, reasons: Sequence[str], seconds: float, prompt_tokens: int, generated_tokens: int
    ) -> None:
        """Record a request whose text is whole, streamed or not.

        Args:
            reasons: the finish reason of each choice.
            seconds: time from the request's headers to the end of its answer.
            prompt_tokens: as in `usage`.
            generated_tokens: tokens of all choices, as in `usage`.
        """
        label = self._labels.current(label)
        self._seconds.observe(seconds)
        self._prompt_tokens.labels(label).inc(prompt_tokens)
        self._generated_tokens.labels(label).inc(generated_tokens)
        self._prompt_lengths.observe(prompt_tokens)
        self._text_lengths.observe(generated_tokens)
        for reason in reasons:
            self._choices.labels(label, reason).inc()
            self._success.labels(self._model, reason).inc()

    def cancelled(self, label: str, reason: CancelReason) -> None:
        """Record a request whose text ended early."""
        self._cancelled.labels(self._labels.current(label), reason).inc()

    def ignored_field(self, name: str) -> None:
        """Record a field of a request, for text or embeddings, that had no effect."""
        self._ignored.labels(self._fields.label(name) if 0 < len(name) <= _LONGEST_FIELD else OTHER).inc()

    def drop(self, label: str) -> None:
        """Remove the series of an adapter that lost its label."""
        self._first_token.drop(label)
        for counter in (self._prompt_tokens, self._generated_tokens, self._choices, self._cancelled):
            counter.remove_by_labels({"adapter": label})

    def collect(self) -> Iterable[Metric]:
        first = HistogramMetricFamily(
            "ranklet_text_first_token_seconds",
            "From a request's headers to the first token of its streamed text",
            labels=["adapter"],
        )
        for label, state in self._first_token.by_label().items():
            first.add_metric([label], state.buckets, state.total)
        yield first
        of_all = {
            "ranklet_text_token_gap_seconds": "Time between streamed tokens of a choice",
            "ranklet_text_duration_seconds": "From a request's headers to the end of its text",
        }
        gaps, durations = self._gap.state(), self._seconds.state()
        for (name, about), state in zip(of_all.items(), (gaps, durations), strict=True):
            yield HistogramMetricFamily(name, about, state.buckets, state.total)
        for name, about, state in (
            ("time_to_first_token_seconds", "Time to the first token", self._first_token.all()),
            ("inter_token_latency_seconds", "Time between tokens", gaps),
            ("e2e_request_latency_seconds", "From a request to the end of its text", durations),
            ("request_prompt_tokens", "Prompt tokens of a request", self._prompt_lengths.state()),
            ("request_generation_tokens", "Generated tokens of a request", self._text_lengths.state()),
        ):
            family = HistogramMetricFamily(f"vllm:{name}", about, labels=["model_name"])
            family.add_metric([self._model], state.buckets, state.total)
            yield family
