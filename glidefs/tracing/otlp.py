"""Our spans as OpenTelemetry's, over OTLP/HTTP: the only module that imports it.

Headers, certificates, compression and sampling are set as with any program: by the environment variables of
OpenTelemetry's SDK (``OTEL_EXPORTER_OTLP_HEADERS``, ``OTEL_TRACES_SAMPLER``). It says what goes wrong to its
loggers, again and again: that is kept here, for a line of ours.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from glidefs.tracing.spans import ERROR, Span, Value
from glidefs.version import version

TIMEOUT = 5
"""Seconds that sending a batch may take, with its retries."""
MAX_TROUBLE = 200
"""Characters of what went wrong that are kept."""


class Sender:
    """Sends spans. For one thread."""

    def __init__(self, endpoint: str, node: str) -> None:
        self._trouble = _Trouble()
        process: dict[str, Value] = {
            "service.name": "glidefs",
            "service.version": version(),
            "service.instance.id": node,
            "process.pid": os.getpid(),
        }
        provider = TracerProvider(resource=Resource.create(process), shutdown_on_exit=False)
        self._ended = _Ended()
        provider.add_span_processor(self._ended)
        self._tracer = provider.get_tracer("glidefs", version())
        self._exporter = OTLPSpanExporter(endpoint, timeout=TIMEOUT)

    def send(self, spans: Sequence[Span]) -> str:
        """Make and send them. Empty, or why it failed."""
        self._trouble.first = ""
        for span in spans:
            self._make(span, _context_of(span))
        made, self._ended.spans = self._ended.spans, []
        try:
            if not made or self._exporter.export(made) is SpanExportResult.SUCCESS:
                return ""
        except Exception as error:  # earlier versions raise where nobody listens
            return _short(str(error))
        return self._trouble.first or "the collector did not take them"

    def _make(self, span: Span, context: Context) -> None:
        made = self._tracer.start_span(
            span.name,
            context,
            SpanKind.INTERNAL if span.answers is None else SpanKind.SERVER,
            span.attributes,
            start_time=span.begin,
        )
        if ERROR in span.attributes:
            made.set_status(StatusCode.ERROR, str(span.attributes[ERROR]))
        within = set_span_in_context(made, context)
        for child in span.children:
            self._make(child, within)
        made.end(span.end)


def _context_of(span: Span) -> Context:
    """What it is a part of elsewhere. Source: W3C Trace Context."""
    return TraceContextTextMapPropagator().extract(span.answers or {}, Context())


class _Ended(SpanProcessor):
    """Keeps what is to be sent: those that are sampled."""

    def __init__(self) -> None:
        self.spans: list[ReadableSpan] = []

    def on_end(self, span: ReadableSpan) -> None:
        self.spans.append(span)


class _Trouble(logging.Handler):
    """In place of OpenTelemetry's log: the first line about what is being sent."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.first = ""
        logger = logging.getLogger("opentelemetry")
        logger.propagate = False
        logger.handlers[:] = [self]

    def emit(self, record: logging.LogRecord) -> None:
        self.first = self.first or _short(record.getMessage())


def _short(trouble: str) -> str:
    """On one line; of errors around each other, as where a connection fails, the innermost."""
    system = re.search(r"\[Errno \d+\] [\w ,]+", trouble)
    return system[0] if system else " ".join(trouble.split())[:MAX_TROUBLE].rstrip(".")
