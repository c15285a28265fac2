"""An OpenTelemetry collector that stores the spans it receives."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.http_server import http_server


@dataclass
class Collector:
    """Stores spans received at `url`, in OTLP over HTTP."""

    url: str
    spans: list[Span] = field(default_factory=list)

    def spans_of(self, trace: str) -> list[Span]:
        """Return the spans of one trace, given its id in hexadecimal."""
        return [span for span in self.spans if span.trace_id.hex() == trace]


@contextmanager
def collecting() -> Iterator[Collector]:

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:  # the name that http.server requires
            request = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["content-length"])))
            collector.spans += [
                span for each in request.resource_spans for scope in each.scope_spans for span in scope.spans
            ]
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http_server(Handler) as port:
        collector = Collector(f"http://127.0.0.1:{port}")
        yield collector
