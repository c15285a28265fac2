"""What is kept of each request: counts, a line in the log, a span. Never its texts, and never a key."""

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from opentelemetry import propagate, trace
from opentelemetry.trace import Span, SpanKind, Status, StatusCode

from ranklet.cluster.config import Requests
from ranklet.cluster.ingress.answers import Embeddings
from ranklet.cluster.ingress.metrics import GatewayMetrics
from ranklet.cluster.ingress.status import RecentRequests

UNRESOLVED = "unknown"  # label of requests refused before their adapter was known

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")

logger = logging.getLogger("ray.serve.requests")


@dataclass
class RequestRecord:
    """One request, filled in as it becomes known."""

    span: Span
    began_s: float = field(default_factory=time.perf_counter)
    label: str = UNRESOLVED
    model: str = ""  # the adapter's name or the base's
    prompts: int = 0
    tokens: int = 0
    answer: Embeddings | None = None
    status: int = 200
    code: str = ""
    message: str = ""


class Observer:
    """Keeps what one gateway's requests came to.

    Args:
        requests: which of them have a line in the log; Serve's JSON encoding makes its fields columns.
    """

    def __init__(self, metrics: GatewayMetrics, recent: RecentRequests, requests: Requests, gateway: str) -> None:
        self._metrics = metrics
        self._recent = recent
        self._requests = requests
        self._tracer = _tracer(gateway)

    def begin(self, headers: Mapping[str, str]) -> RequestRecord:
        """A request has come."""
        context = propagate.extract(headers)
        return RequestRecord(self._tracer.start_span("POST /v1/embeddings", context, SpanKind.SERVER))

    def left(self, outcome: RequestRecord) -> None:
        """Its client has gone before the answer."""
        self._metrics.client_gone.inc()
        outcome.span.set_status(Status(StatusCode.ERROR, "the client has gone"))
        outcome.span.end()

    def answered(self, outcome: RequestRecord) -> None:
        """It has been answered, or refused."""
        seconds = time.perf_counter() - outcome.began_s
        self._recent.answered(outcome.status, outcome.code, outcome.message)
        self._metrics.answered(outcome.label, outcome.status, outcome.code, seconds)
        refused = outcome.status >= 400
        logged = self._requests == "all" or (self._requests == "refused" and refused)
        if logged or outcome.span.is_recording():
            fields = _fields(outcome, seconds)
            if logged:
                said = " ".join(f"{name}={value}" for name, value in fields.items())
                logger.log(logging.WARNING if outcome.status >= 500 else logging.INFO, said, extra=fields)
            self._traced(outcome, fields)
        outcome.span.end()

    def _traced(self, outcome: RequestRecord, fields: Mapping[str, str | int | float]) -> None:
        """Its span's attributes; below it one for the wait in the replica's queue and one for the batch."""
        span = outcome.span
        span.set_attributes({f"ranklet.{name}": value for name, value in fields.items()})
        span.set_attribute("http.response.status_code", outcome.status)
        if outcome.status >= 500:
            span.set_status(Status(StatusCode.ERROR, outcome.code))
        if outcome.answer is None:
            return
        below = trace.set_span_in_context(span)
        done = outcome.answer.came_ns
        computed = done - int(outcome.answer.compute_s * 1e9)
        waited = computed - int(outcome.answer.queue_s * 1e9)
        self._tracer.start_span("queue", below, start_time=waited).end(computed)
        self._tracer.start_span("compute", below, start_time=computed).end(done)


def _fields(outcome: RequestRecord, seconds: float) -> dict[str, str | int | float]:
    fields: dict[str, str | int | float] = {"status": outcome.status, "total_ms": round(seconds * 1e3, 2)}
    if outcome.code:
        fields["code"] = outcome.code
    if outcome.model:
        fields |= {"model": outcome.model, "prompts": outcome.prompts, "tokens": outcome.tokens}
    if outcome.answer is not None:
        answer = outcome.answer
        fields |= {name.removeprefix("x-ranklet-"): value for name, value in answer.headers.items()}
        fields["answered_by"] = fields.pop("replica")  # Serve's own log says `replica` of whoever writes the line
        fields |= {"queue_ms": round(answer.queue_s * 1e3, 2), "compute_ms": round(answer.compute_s * 1e3, 2)}
    return fields


def _tracer(gateway: str) -> trace.Tracer:
    """One that exports to the collector that the environment names; else OpenTelemetry's own, which does nothing."""
    if not any(os.environ.get(name) for name in _ENDPOINTS):
        return trace.get_tracer("ranklet")
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        logger.warning("spans are not exported: %s. pip install 'ranklet[otel]'", error)
        return trace.get_tracer("ranklet")
    named = {"service.name": os.environ.get("OTEL_SERVICE_NAME", "ranklet"), "service.instance.id": gateway}
    provider = TracerProvider(resource=Resource.create(named))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider.get_tracer("ranklet")
