"""Read-ahead: which blocks to fetch before a sequential reader asks for them.

Like the page cache of Linux (mm/readahead.c) it grows a window while faults follow each other and leaves
markers inside it: the first block of each piece is in the block cache but not mapped, so its cheap fault
tells that the reader has come this far, and that the next piece is due.

How far ahead is enough follows from what is measured, as congestion windows do (Cardwell et al., "BBR",
2016): what the store delivers at most, times the least time that a piece takes. See :class:`Pace`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator

import msgspec

FIRST_WINDOW = 4
"""Blocks of the first window."""
LEAST_GOAL = 8 << 20
"""Bytes of a window that may always be: a store that is near has no delay to go by."""
_SLACK = 2
_HEADROOM = 2.0
_SLOT = 0.1
"""Seconds over which a rate is measured."""
_FORGET = 0.9
"""What is left of the best rate after each slot, and the other way round of the least delay."""


class Window(msgspec.Struct, frozen=True):
    """Fetch ``count`` blocks from ``first``, all but ``marker`` mapped."""

    first: int
    count: int
    marker: int


class Pace:
    """What pieces of read-ahead take, on this host. Not thread-safe; the caller locks."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._slot_began = 0.0
        self._slot_bytes = 0
        self.rate = 0.0
        """Bytes per second, the most that came lately."""
        self.delay = 0.0
        """Seconds from the request for a piece to its last byte, the least lately."""

    def landed(self, nbytes: int, seconds: float) -> None:
        """A piece came, ``seconds`` after it was asked for."""
        now = self._clock()
        self.delay = min(seconds, self.delay * 1.01) if self.delay else seconds
        if now - self._slot_began > 10 * _SLOT:  # nobody read ahead for a while
            self._slot_began, self._slot_bytes = now - min(seconds, _SLOT), 0
        self._slot_bytes += nbytes
        took = now - self._slot_began
        if took >= _SLOT:
            self.rate = max(self._slot_bytes / took, self.rate * _FORGET)
            self._slot_began, self._slot_bytes = now, 0

    def goal(self) -> int:
        """Bytes that should be on their way or here before the reader."""
        return max(LEAST_GOAL, int(_HEADROOM * self.rate * self.delay))


class ReadAhead:
    """The state of one volume: one reader that moves forward. Not thread-safe; the caller locks."""

    __slots__ = ("ahead", "markers", "position", "window")

    def __init__(self) -> None:
        self.position = -1
        """The block behind the last fault."""
        self.ahead = 0
        """The block behind the last window."""
        self.window = 0
        self.markers: list[int] = []
        """Of the pieces that the reader has not come to, ascending."""

    def on_fault(
        self, first: int, count: int, limit: int, end: int, *, piece: int = 16, goal: int | None = None
    ) -> list[Window]:
        """The pieces to fetch after a fault.

        In blocks: ``limit`` is the largest window, ``end`` the size of the volume, ``piece`` what one request
        fetches, ``goal`` how large the window should become (None: ``limit``).
        """
        stop = first + count
        sequential = self.position >= 0 and self.position <= first <= max(self.position + _SLACK, self.ahead)
        if not sequential:
            if first <= self.position < stop + limit and self.window:
                return []  # a straggler of the same reader
            self.position, self.ahead, self.window = stop, stop, 0
            self.markers.clear()
            return []
        self.position = max(self.position, stop)
        self.ahead = max(self.ahead, stop)
        reached = not self.markers
        while self.markers and stop > self.markers[0]:
            del self.markers[0]
            reached = True
        if limit <= 0 or not reached or self.ahead >= end:
            return []
        # Towards the goal by doubling, from there by nothing; it may also have become smaller.
        wanted = limit if goal is None else min(goal, limit)
        self.window = min(max(2 * self.window, FIRST_WINDOW), max(wanted, FIRST_WINDOW), limit)
        return self._pieces(self.position + self.window, end, piece)

    def _pieces(self, until: int, end: int, piece: int) -> list[Window]:
        """Cut what is missing up to ``until`` into pieces; one that would be short waits."""
        found: list[Window] = []
        size = max(min(piece, self.window // 4), FIRST_WINDOW)
        until = min(until, end)
        while self.ahead < until and (until - self.ahead >= size or until == end or not self.markers):
            count = min(size, until - self.ahead)
            found.append(Window(self.ahead, count, self.ahead))
            self.markers.append(self.ahead)
            self.ahead += count
        return found


def runs_of(blocks: Iterable[int], longest: int) -> Iterator[tuple[int, int]]:
    """(first, count) of runs of at most ``longest`` neighbours among ``blocks``, ascending; twice is once."""
    first = count = 0
    for block in sorted(set(blocks)):
        if count and block == first + count and count < longest:
            count += 1
            continue
        if count:
            yield first, count
        first, count = block, 1
    if count:
        yield first, count
