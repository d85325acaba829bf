"""Boot profiles: the blocks that a fork touches, in first-touch order, become its base's hot set.

Every first touch of a block that is not in the write log is a fault, as nothing is mapped when a
fork is opened. While a profile runs nothing is read ahead or prefetched for that volume, so the
sequence of its faults is the sequence of first touches.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from glidefs.formats.manifest import Root

if TYPE_CHECKING:
    from glidefs.volume.volume import Volume

IDLE = 5.0
"""Seconds without a new block after which a boot counts as done."""
_STEP = 0.1


class Recorder:
    """First touches of a volume: block to the root that was in use then. ``_lock`` guards the table."""

    def __init__(self, volume: Volume) -> None:
        self._volume = volume
        self._lock = threading.Lock()
        self._touched: dict[int, Root] = {}
        self.last = time.monotonic()

    def note(self, first: int, count: int) -> None:
        """A guest waits for these blocks."""
        root, now = self._volume.root, time.monotonic()
        with self._lock:
            for block in range(first, first + count):
                if block not in self._touched:
                    self._touched[block] = root
                    self.last = now

    def touched(self) -> dict[int, Root]:
        """A copy, in first-touch order."""
        with self._lock:
            return dict(self._touched)


@contextmanager
def recording(volume: Volume) -> Iterator[Recorder]:
    """Record the faults of ``volume`` inside the context."""
    recorder = Recorder(volume)
    volume.on_fault = recorder.note
    try:
        yield recorder
    finally:
        volume.on_fault = None


def wait(
    volume: Volume,
    recorder: Recorder,
    *,
    stop_after: float | None,
    idle: float | None,
    cancelled: Callable[[], bool],
) -> None:
    """Return after ``stop_after`` seconds, or ``idle`` seconds after the last new block.

    Idleness counts from the first block on. Ends early when ``cancelled`` or the volume closes.
    """
    began = time.monotonic()
    while not cancelled() and not volume.closing:
        now = time.monotonic()
        if stop_after is not None and now - began >= stop_after:
            return
        if idle is not None and now - recorder.last >= idle and recorder.touched():
            return
        time.sleep(_STEP)
