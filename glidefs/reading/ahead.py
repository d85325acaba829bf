"""Read-ahead: which blocks to fetch before a sequential reader asks for them.

Like the page cache of Linux (mm/readahead.c) it grows a window while faults follow each other and
leaves a marker inside it: here one block that is in the block cache but not mapped, whose cheap
fault tells that the reader has come this far and that the next window is due.
"""

from __future__ import annotations

import msgspec

FIRST_WINDOW = 4
"""Blocks of the first window."""
_SLACK = 2


class Window(msgspec.Struct, frozen=True):
    """Fetch ``count`` blocks from ``first``, all but ``marker`` mapped."""

    first: int
    count: int
    marker: int


class ReadAhead:
    """The state of one volume: one reader that moves forward. Not thread-safe; the caller locks."""

    __slots__ = ("ahead", "marker", "position", "window")

    def __init__(self) -> None:
        self.position = -1
        """The block behind the last fault."""
        self.ahead = 0
        """The block behind the last window."""
        self.window = 0
        self.marker = -1

    def on_fault(self, first: int, count: int, limit: int, end: int) -> Window | None:
        """The window to fetch after a fault, if any.

        ``limit`` is the largest window and ``end`` the size of the volume, in blocks.
        """
        stop = first + count
        sequential = self.position >= 0 and self.position <= first <= max(self.position + _SLACK, self.ahead)
        if not sequential:
            if first <= self.position < stop + limit and self.window:
                return None  # a straggler of the same reader
            self.position, self.ahead, self.window, self.marker = stop, stop, 0, -1
            return None
        self.position = max(self.position, stop)
        self.ahead = max(self.ahead, stop)
        reached = self.marker < 0 or stop > self.marker
        if limit <= 0 or not reached or self.ahead >= end:
            return None
        self.window = min(max(2 * self.window, FIRST_WINDOW), limit)
        size = min(self.window, end - self.ahead)
        window = Window(self.ahead, size, self.ahead + size // 2)
        self.ahead += size
        self.marker = window.marker
        return window
