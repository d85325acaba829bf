"""How fast background work may go: a token bucket that also waits for guests."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

GUEST_QUIET = 0.05
"""Seconds without a guest fault after which background work goes on."""
GUEST_PATIENCE = 1.0
"""Seconds that guests can hold one piece of background work up, so that it ends some day."""


class Pace:
    """``rate`` bytes per second, in bursts of at most a second. ``stop`` ends every wait."""

    def __init__(self, rate: int, quiet_for: Callable[[], float], stop: threading.Event) -> None:
        self._rate = rate
        self._quiet_for = quiet_for
        self._stop = stop
        self._tokens = float(rate)
        self._last = time.monotonic()

    def spend(self, nbytes: int) -> None:
        """Wait until ``nbytes`` more may be moved. For one thread."""
        now = time.monotonic()
        self._tokens = min(float(self._rate), self._tokens + (now - self._last) * self._rate) - nbytes
        self._last = now
        if self._tokens < 0:
            self._stop.wait(-self._tokens / self._rate)
        give_up = time.monotonic() + GUEST_PATIENCE
        while self._quiet_for() < GUEST_QUIET and time.monotonic() < give_up:
            if self._stop.wait(GUEST_QUIET / 5):
                return
