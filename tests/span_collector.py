"""A collector of OpenTelemetry: takes OTLP over HTTP on a loopback port and keeps the spans that it got."""

from __future__ import annotations

import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1 import trace_pb2
from servers import Serving
from waiting import wait_for


class Got(NamedTuple):
    """A span as it came. Times in nanoseconds, ids in hexadecimal."""

    name: str
    begin: int
    end: int
    attributes: dict[str, Any]
    trace: str
    id: str
    parent: str
    kind: int
    failed: bool
    resource: dict[str, Any]

    @property
    def took(self) -> float:
        """Seconds."""
        return (self.end - self.begin) / 1e9


class Collector(Serving):
    """Answers ``status``. ``spans`` are all that came, ``requests`` how many requests brought them."""

    def __init__(self, port: int = 0) -> None:
        self.spans: list[Got] = []
        self.requests = 0
        self.status = 200
        self.headers: dict[str, str] = {}
        """Of the last request."""
        owner = self

        class Handler(BaseHTTPRequestHandler):
            """Its connections."""

            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                data = self.rfile.read(int(self.headers["Content-Length"]))
                owner.headers = dict(self.headers.items())
                owner.take(self.path, data)
                self.send_response(owner.status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                """Nothing."""

        server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{server.server_address[1]}/v1/traces"
        super().__init__(server)

    def take(self, path: str, data: bytes) -> None:
        assert path == "/v1/traces"
        self.requests += 1
        if self.status != 200:
            return
        for of in ExportTraceServiceRequest.FromString(data).resource_spans:
            resource = plain(of.resource.attributes)
            self.spans += [got(span, resource) for scope in of.scope_spans for span in scope.spans]

    def roots(self, name: str) -> list[Got]:
        """Spans of this name that are no part of another one of ours."""
        ids = {span.id for span in self.spans}
        return [span for span in self.spans if span.name == name and span.parent not in ids]

    def parts(self, of: Got) -> list[Got]:
        """The children of a span, in their order."""
        return sorted((span for span in self.spans if span.parent == of.id), key=lambda span: span.begin)

    def wait(self, name: str, count: int = 1) -> list[Got]:
        """The roots of this name, once so many have come."""
        return wait_for(lambda: found if len(found := self.roots(name)) >= count else None, f"spans {name}")  # type: ignore[return-value]


def got(span: trace_pb2.Span, resource: dict[str, Any]) -> Got:
    assert span.start_time_unix_nano <= span.end_time_unix_nano <= time.time_ns()
    return Got(
        span.name,
        span.start_time_unix_nano,
        span.end_time_unix_nano,
        plain(span.attributes),
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        span.kind,
        span.status.code == trace_pb2.Status.STATUS_CODE_ERROR,
        resource,
    )


def plain(attributes: Any) -> dict[str, Any]:
    """Attributes of a message."""
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in attributes}
