"""How fast background work may go: a token bucket that also waits for guests."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from glidefs.core.figures import OPS

if TYPE_CHECKING:
    from glidefs.volume.volume import Volume

GUEST_QUIET = 0.05
"""Seconds without a guest fault after which background work goes on."""
GUEST_PATIENCE = 1.0
"""Longest time in seconds that guests can hold up one piece of background work."""


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


BURST_RATE = 128 << 20
"""Bytes that a guest writes per second from which on its uploads step back..."""
BURST_SHARE = 8
"""...to one pack at a time, with pauses of this many times what the last one took."""
BURST_GAP = 1.0
"""Seconds without such a rate that end a burst."""
_SAMPLE = 0.05


class Burst:
    """Is a volume being written so fast that its upload should wait? For the thread that uploads it.

    An upload takes as much CPU time as the writes that it follows, and more of the disk. A burst that
    the log can take is better served first: its upload comes after it, or when it turns out to be
    no burst (``hurried``: the logs of the host fill; or a write has waited as long as it may anyway).
    """

    def __init__(self, volume: Volume, patience: float, hurried: Callable[[], bool]) -> None:
        self._volume = volume
        self._hurried = hurried
        self._patience = patience
        self._bytes, self._since = self._written(), time.monotonic()
        self._fast_until: float | None = None

    def _written(self) -> int:
        return self._volume.core.stats().bytes[OPS.index("write")]

    def lasts(self) -> bool:
        """Whether the upload should step back now. Raises Closed."""
        volume = self._volume
        if volume.awaited or volume.closing or self._hurried() or not self._is_fast():
            return False
        info = volume.core.info()
        return not info.parked and info.dirty_age < self._patience

    def _is_fast(self) -> bool:
        """Whether guests wrote at such a rate in the last second or so."""
        if self._fast_until is None:
            time.sleep(_SAMPLE)
        now = time.monotonic()
        if self._fast_until is None or now - self._since >= _SAMPLE:
            written = self._written()
            fast = written - self._bytes >= BURST_RATE * (now - self._since)
            self._bytes, self._since = written, now
            self._fast_until = now + BURST_GAP if fast else self._fast_until or now
        return now < self._fast_until

    def step_back(self, took: float) -> None:
        """Wait after a piece of work of ``took`` seconds, while the burst lasts. Raises Closed."""
        until = time.monotonic() + BURST_SHARE * took
        while time.monotonic() < until and self.lasts():
            time.sleep(_SAMPLE)
