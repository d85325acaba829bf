"""A circuit breaker that parks callers instead of failing them.

Closed: every call goes through. A run of failures opens it: then calls wait, and one of them at a
time goes through as a probe, at most a second after the last; the first that succeeds closes the
breaker and frees all. A store that comes back is thus noticed within about a second, and one that
is down sees about one request a second, however many are waiting.

A probe may hang where packets vanish. So it holds the probe's place for a second only; then the
next one may start beside it.

pybreaker was considered: its ``call`` holds one lock for as long as the guarded function runs, which would
serialise all requests to the store, and its open state raises where ours must wait.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

CLOSED = "closed"
OPEN = "open"
HALF_OPEN = "half-open"

_FIRST_PROBE = 0.1
_QUIET = 3.0
"""Seconds without a failure after which nobody asks any more. Waiting calls get a probe each second."""
_SLICE = 0.25
"""Longest uninterrupted wait in seconds, so that a cancellation is seen in time."""


class Breaker:
    """``threshold`` failures without a success between them open it; ``probe_every`` is in seconds."""

    def __init__(self, threshold: int = 5, probe_every: float = 1.0) -> None:
        self._threshold = threshold
        self._probe_every = probe_every
        # Guards everything below; waiters sleep on it.
        self._changed = threading.Condition()
        self._failures = 0
        self._open = False
        self._delay = _FIRST_PROBE
        self._next_probe = 0.0
        self._probing = 0
        self._opened_at = 0.0
        self._opened_on = 0.0
        self._last_failure = 0.0
        self._reason = ""

    @property
    def state(self) -> str:
        """``closed``, ``open`` or ``half-open`` (a probe is on its way)."""
        with self._changed:
            if not self._open:
                return CLOSED
            return HALF_OPEN if self._probing else OPEN

    @property
    def is_closed(self) -> bool:
        """Without a lock, for the hot path: a stale answer costs one request."""
        return not self._open

    @property
    def open_for(self) -> float:
        """Seconds since it opened, 0 while closed."""
        with self._changed:
            return time.monotonic() - self._opened_at if self._open else 0.0

    def opened(self) -> tuple[float, str] | None:
        """When it opened (unix seconds) and why the last call failed; None while closed."""
        with self._changed:
            return (self._opened_on, self._reason) if self._open else None

    def enter(self, until: float | None, cancelled: Callable[[], bool]) -> bool:
        """Wait for permission to call. True if the call is a probe, which :meth:`leave` wants to know.

        ``until`` is a time of the monotonic clock, None for no limit. Raises TimeoutError when it
        passes, InterruptedError when ``cancelled`` becomes true.
        """
        if self.is_closed:
            return False
        with self._changed:
            while self._open:
                now = time.monotonic()
                if cancelled():
                    raise InterruptedError
                if until is not None and now >= until:
                    raise TimeoutError
                if now >= self._next_probe:
                    self._probing += 1
                    self._next_probe = now + self._probe_every
                    return True
                wait = min(self._next_probe - now, _SLICE)
                self._changed.wait(wait if until is None else min(wait, max(until - now, 0.0)))
            return False

    def leave(self, probe: bool, ok: bool | None, reason: str = "") -> bool:
        """Report a call: it worked, it failed for ``reason``, or (None) it says nothing about the store.

        True if the breaker opened or closed by that.
        """
        if ok and not probe and not self._open and not self._failures:
            return False  # nothing to change: the hot path takes no lock
        with self._changed:
            was_open = self._open
            if probe:
                self._probing -= 1
            if ok:
                self._close()
            elif ok is None:
                if probe:
                    self._next_probe = min(self._next_probe, time.monotonic())
                    self._changed.notify()
            else:
                self._fail(probe, reason)
            return self._open != was_open

    def hear(self, hurry: bool) -> bool:
        """A call that goes through another breaker worked. True if this one closed by that.

        Whoever waits here probes, at once if ``hurry``. Where nobody asked for some seconds the next
        call finds out by itself.
        """
        with self._changed:
            if not self._open:
                return False
            now = time.monotonic()
            if not self._probing and now - self._last_failure > _QUIET:
                self._close()
                return True
            if hurry:
                self._next_probe = min(self._next_probe, now)
                self._changed.notify()
            return False

    def _close(self) -> None:
        self._failures = 0
        self._open = False
        self._delay = _FIRST_PROBE
        self._changed.notify_all()

    def _fail(self, probe: bool, reason: str) -> None:
        self._reason = reason
        self._last_failure = time.monotonic()
        if probe:
            self._schedule()
            return
        self._failures += 1
        if self._failures >= self._threshold and not self._open:
            self._open = True
            self._opened_at = self._last_failure
            self._opened_on = time.time()
            self._delay = _FIRST_PROBE
            self._schedule()

    def _schedule(self) -> None:
        """Set the time of the next probe; early ones come sooner, all with jitter."""
        self._next_probe = time.monotonic() + self._delay * random.uniform(0.5, 1.0)
        self._delay = min(self._delay * 2, self._probe_every)
