"""Spans on their way to a collector: a queue with an end, and the thread that empties it.

Whoever has a span appends it and goes on. The thread begins with the first span, and with it the imports of
OpenTelemetry, a quarter of a second of CPU time. What a collector does not take is lost, and counted.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from importlib.util import find_spec

from glidefs.errors import ConfigError
from glidefs.tracing.spans import Span

MOST_WAITING = 1000
"""Spans, each with its children."""
MOST_AT_ONCE = 250
LINGER = 1.0
"""Seconds in which more of them may come and go together."""
SAY_EVERY = 60.0
"""Seconds between two lines about spans that are lost."""
FLUSH = 1.0
"""Seconds for what is left when the process ends."""

log = logging.getLogger(__name__)


class Exporter:
    """A sink whose spans go to the collector at ``endpoint``, as those of the host ``node``.

    ``_changed`` guards all that changes.
    """

    def __init__(self, endpoint: str, node: str) -> None:
        """Raises ConfigError where OpenTelemetry is not installed."""
        _check_packages()
        self._endpoint = endpoint
        self._node = node
        self._changed = threading.Condition()
        self._waiting: list[Span] = []
        self._thread: threading.Thread | None = None
        self._closing = False
        self._lost = 0
        self._said = float("-inf")

    def put(self, span: Span) -> None:
        """Take a span. Any thread; never waits, never raises."""
        with self._changed:
            if self._closing:
                return
            if len(self._waiting) >= MOST_WAITING:
                self._lost += 1
                return
            self._waiting.append(span)
            if self._thread is None:
                with contextlib.suppress(RuntimeError):  # there is no room for a thread: the next one tries
                    thread = threading.Thread(target=self._run, name="glide-spans", daemon=True)
                    thread.start()
                    self._thread = thread
            self._changed.notify()

    def close(self, patience: float = FLUSH) -> None:
        """Take no more, and send what is left within ``patience`` seconds. Safe to call twice."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(patience)

    def _run(self) -> None:
        try:
            from glidefs.tracing.otlp import Sender

            sender = Sender(self._endpoint, self._node)
            while batch := self._next():
                self._say(len(batch), sender.send(batch))
        except Exception:
            log.exception("no spans are sent any more; restart the daemon to try again")
            with self._changed:
                self._closing = True

    def _next(self) -> list[Span]:
        """Some that wait; empty at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing)
            if not self._closing:
                self._changed.wait_for(lambda: self._closing, LINGER)
            batch, self._waiting = self._waiting[:MOST_AT_ONCE], self._waiting[MOST_AT_ONCE:]
        return batch

    def _say(self, count: int, trouble: str) -> None:
        """A batch was sent, or not because of ``trouble``: say what was lost, once in a while."""
        now = time.monotonic()
        with self._changed:
            self._lost += count if trouble else 0
            if not self._lost or now - self._said < SAY_EVERY:
                return
            lost, self._lost, self._said = self._lost, 0, now
        log.warning(
            "%d spans did not reach %s: %s; start the collector, or correct [telemetry] otlp_endpoint",
            lost,
            self._endpoint,
            trouble or "they came faster than they were sent",
        )


def _check_packages() -> None:
    """Raises ConfigError where one is missing. They are not imported: that takes long."""
    try:
        found = find_spec("opentelemetry.sdk.trace") and find_spec("opentelemetry.exporter.otlp.proto.http")
    except ImportError:
        found = None
    if found is None:
        raise ConfigError(
            "[telemetry] otlp_endpoint: OpenTelemetry is not installed; pip install 'glidefs[telemetry]', "
            "or leave the key out"
        )
