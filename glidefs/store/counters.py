"""The counters of a patient store."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Mapping

import msgspec


class StoreMetrics(msgspec.Struct, frozen=True):
    """Counters since the start. The maps are by operation; bytes are payload; state is the worse one.

    ``errors`` counts failed attempts, ``retries`` those that were tried again, ``waiting`` the
    calls that hold no place and wait (for a place, a retry, or the store). ``seconds`` is the time that
    all attempts took; ``last_error`` is of ``last_error_at`` (unix seconds), empty and 0 where none failed.
    """

    requests: Mapping[str, int]
    errors: Mapping[str, int]
    retries: Mapping[str, int]
    bytes_in: int
    bytes_out: int
    waiting: int
    breaker: str
    down_seconds: float
    seconds: Mapping[str, float] = {}
    last_error: str = ""
    last_error_at: float = 0.0


class Counters:
    """What is counted, by the attempts of all lanes."""

    def __init__(self) -> None:
        # Guards the counters, for the time of an addition.
        self.lock = threading.Lock()
        self.requests: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.retries: Counter[str] = Counter()
        self.bytes_in = 0
        self.bytes_out = 0
        self.waiting = 0
        self.seconds: Counter[str] = Counter()
        self.last_error = ""
        self.last_error_at = 0.0

    def count(
        self, op: str, started: float, *, failed: str = "", again: bool = False, got: int = 0, sent: int = 0
    ) -> None:
        """Add an attempt that began at ``started`` (of ``time.monotonic()``), and the bytes that it moved.

        ``failed``: why, or empty.
        """
        took = time.monotonic() - started
        with self.lock:
            self.requests[op] += 1
            self.seconds[op] += took  # type: ignore[assignment]  # a Counter counts fractions, too
            self.errors[op] += bool(failed)  # a series from the first request on
            if failed:
                self.last_error, self.last_error_at = failed, time.time()
            self.retries[op] += again
            self.bytes_in += got
            self.bytes_out += sent

    def wait(self, change: int) -> None:
        """One more or one less waits without a place."""
        with self.lock:
            self.waiting += change
