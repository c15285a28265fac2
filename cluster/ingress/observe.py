"""Records each request in metrics, the log and a trace. Records neither texts nor keys."""

import logging
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

from opentelemetry import propagate, trace
from opentelemetry.trace import Span, SpanKind, Status, StatusCode

from ranklet.cluster.config import Requests
from ranklet.cluster.ingress.answers import JoinedAnswer
from ranklet.cluster.ingress.frame_queue import ReaderTooSlow
from ranklet.cluster.ingress.metrics import GatewayMetrics
from ranklet.cluster.ingress.status import RecentRequests
from ranklet.cluster.labels import UNKNOWN
from ranklet.replicas.errors import InternalError, InvalidRequest, RankletError

_MAX_IGNORED = 20
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")

logger = logging.getLogger("ray.serve.requests")


@dataclass
class RequestRecord:
    """One inference request. Fields are set as soon as their values are known.

    Attributes:
        label: value of the `adapter` label in metrics.
        model: name of the adapter or base model.
        is_generating: whether replicas have been asked for text.
        output_tokens: number of generated tokens; None before the first of them.
        first_token_s: time until the first of them arrived.
        reasons: why each choice ended, once all have.
        message: message of the error, for the status page.
        is_text: whether text is requested. `TextMetrics` has the time of texts, which depends on their length.
    """

    span: Span
    began_s: float = field(default_factory=time.perf_counter)
    label: str = UNKNOWN
    model: str = ""
    prompts: int = 0
    tokens: int = 0
    output_tokens: int | None = None
    first_token_s: float | None = None
    reasons: Sequence[str] | None = None
    is_generating: bool = False
    answer: JoinedAnswer | None = None
    status: int = 200
    code: str = ""
    message: str = ""
    is_text: bool = False

    def on_tokens(self, count: int) -> bool:
        """Record generated tokens. Returns whether they are the first."""
        is_first = self.output_tokens is None
        if is_first:
            self.first_token_s = time.perf_counter() - self.began_s
        self.output_tokens = (self.output_tokens or 0) + count
        return is_first

    def refused(self, error: RankletError) -> None:
        self.status, self.code = error.status, error.code
        # The message of an invalid request may contain the client's text.
        self.message = f"in {error.param}" if isinstance(error, InvalidRequest) else error.message

    def failed(self) -> None:
        self.status, self.code = InternalError.status, InternalError.code


class Observer:
    """Records the requests of one gateway.

    Args:
        requests: which requests are logged. With Serve's JSON encoding, each field of a line has a key of its own.
        gateway: id of the gateway.
    """

    def __init__(self, metrics: GatewayMetrics, recent: RecentRequests, requests: Requests, gateway: str) -> None:
        self._metrics = metrics
        self._recent = recent
        self._requests = requests
        self._tracer = _tracer(gateway)

    def begin(self, operation: str, headers: Mapping[str, str]) -> RequestRecord:
        """Start a request's span. It is a child of the client's span if the headers name one."""
        return RequestRecord(self._tracer.start_span(operation, propagate.extract(headers), SpanKind.SERVER))

    def on_model(self, record: RequestRecord, model: str, *, is_adapter: bool) -> None:
        """Set the model of a request, and its label in metrics."""
        record.model, record.label = model, self._metrics.labels.label(model if is_adapter else None)

    def on_ignored(self, fields: Iterable[str]) -> None:
        """Count unknown fields of a request, up to a limit: a client may send any number."""
        for name in islice(fields, _MAX_IGNORED):
            self._metrics.text.ignored_field(name)

    def on_first_token(self, record: RequestRecord) -> None:
        """Record the first token of a streamed text."""
        if record.first_token_s is not None:
            self._metrics.text.first_token(record.label, record.first_token_s)

    def on_gap(self, tokens: int, seconds: float) -> None:
        """Record the time between streamed tokens, see `TextMetrics.tokens`."""
        self._metrics.text.tokens(tokens, seconds)

    def on_disconnect(self, record: RequestRecord) -> None:
        """Record a request whose client disconnected before the end of the answer."""
        self._metrics.client_gone.inc()
        if record.is_generating:
            self._metrics.text.cancelled(record.label, "client_gone")
        record.span.set_status(Status(StatusCode.ERROR, "the client disconnected"))
        record.span.end()

    def on_answer(self, record: RequestRecord) -> None:
        seconds = time.perf_counter() - record.began_s
        self._recent.on_answer(record.status, record.code, record.message)
        self._metrics.on_answer(record.label, record.status, record.code, None if record.is_text else seconds)
        if record.is_text:
            self._count_text(record, seconds)
        logged = self._requests == "all" or (self._requests == "refused" and record.status >= 400)
        if logged or record.span.is_recording():
            fields = _fields(record, seconds)
            if logged:
                line = " ".join(f"{name}={value}" for name, value in fields.items())
                logger.log(logging.WARNING if record.status >= 500 else logging.INFO, line, extra=fields)
            self._trace(record, fields)
        record.span.end()

    def _count_text(self, record: RequestRecord, seconds: float) -> None:
        text, made = self._metrics.text, record.output_tokens
        if record.status >= 400:
            if made is not None:
                text.cancelled(record.label, "slow_reader" if record.code == ReaderTooSlow.code else "error")
        elif record.reasons is not None:
            text.finished(record.label, record.reasons, seconds, record.tokens, made or 0)

    def _trace(self, record: RequestRecord, fields: Mapping[str, str | int | float]) -> None:
        """Set the span's attributes, and add child spans for the replica's queue and for the batch."""
        span = record.span
        span.set_attributes({f"ranklet.{name}": value for name, value in fields.items()})
        span.set_attribute("http.response.status_code", record.status)
        if record.status >= 500:
            span.set_status(Status(StatusCode.ERROR, record.code))
        if record.answer is None:
            return
        parent = trace.set_span_in_context(span)
        end_ns = record.answer.completed_ns
        compute_ns = end_ns - int(record.answer.compute_s * 1e9)
        queue_ns = compute_ns - int(record.answer.queue_s * 1e9)
        self._tracer.start_span("queue", parent, start_time=queue_ns).end(compute_ns)
        self._tracer.start_span("compute", parent, start_time=compute_ns).end(end_ns)


def _fields(record: RequestRecord, seconds: float) -> dict[str, str | int | float]:
    fields: dict[str, str | int | float] = {"status": record.status, "total_ms": round(seconds * 1e3, 2)}
    if record.code:
        fields["code"] = record.code
    if record.model:
        fields |= {"model": record.model, "prompts": record.prompts, "tokens": record.tokens}
    if record.output_tokens is not None and record.first_token_s is not None:
        fields |= {"output_tokens": record.output_tokens, "first_token_ms": round(record.first_token_s * 1e3, 2)}
    if record.answer is not None:
        answer = record.answer
        fields |= {name.removeprefix("x-ranklet-"): value for name, value in answer.headers.items()}
        fields["answered_by"] = fields.pop("replica")  # in Serve's log, `replica` is the process that writes the line
        fields |= {"queue_ms": round(answer.queue_s * 1e3, 2), "compute_ms": round(answer.compute_s * 1e3, 2)}
        if answer.first_piece_s is not None:
            fields["engine_first_token_ms"] = round(answer.first_piece_s * 1e3, 2)
    return fields


def _tracer(gateway: str) -> trace.Tracer:
    """Return a tracer for the collector that the environment names; without one, a tracer that does nothing."""
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
    resource = {"service.name": os.environ.get("OTEL_SERVICE_NAME", "ranklet"), "service.instance.id": gateway}
    provider = TracerProvider(resource=Resource.create(resource))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider.get_tracer("ranklet")
