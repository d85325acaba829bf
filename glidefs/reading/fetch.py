"""Payloads from packs: neighbours in one pack are read with one ranged GET, several GETs in parallel."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from typing import NamedTuple

from glidefs.formats.pack import PackEntry
from glidefs.store.base import Buffer, ObjectStore

_SMALL = 256 << 10
"""Shorter reads get memory that the heap has at hand."""
_KEPT = 8


class Wanted(NamedTuple):
    """A payload to fetch: pack key and entry."""

    key: str
    entry: PackEntry


class Range(NamedTuple):
    """One ranged GET and the payloads in it."""

    key: str
    offset: int
    length: int
    parts: tuple[Wanted, ...]


Payloads = dict[tuple[str, int], memoryview]
"""Stored payloads by pack key and offset."""


def plan_ranges(wanted: Iterable[Wanted], gap: int, limit: int) -> list[Range]:
    """Group payloads into ranges: at most ``gap`` unused bytes between two, ``limit`` bytes each."""
    ranges: list[Range] = []
    parts: list[Wanted] = []
    start = end = 0
    for part in sorted(set(wanted), key=lambda part: (part.key, part.entry.offset)):
        entry = part.entry
        stop = entry.offset + entry.stored
        if parts and (parts[0].key != part.key or entry.offset - end > gap or max(stop, end) - start > limit):
            ranges.append(Range(parts[0].key, start, end - start, tuple(parts)))
            parts = []
        if not parts:
            start = end = entry.offset
        parts.append(part)
        end = max(end, stop)
    if parts:
        ranges.append(Range(parts[0].key, start, end - start, tuple(parts)))
    return ranges


class Buffers:
    """Large buffers, kept from one fetch for the next.

    New memory costs a page fault for every 4 KiB of it, and Python takes those with its lock held.
    A deque's append and pop are atomic, so there is no lock here.
    """

    def __init__(self, size: int) -> None:
        """``size``: bytes of each, the length of the longest range."""
        self._size = size
        self._free: deque[bytearray] = deque(maxlen=_KEPT)

    @contextlib.contextmanager
    def lend(self, ranges: Sequence[Range]) -> Iterator[list[memoryview | None]]:
        """Room for each range, None for a short one; inside of the context only."""
        taken: list[bytearray] = []
        room: list[memoryview | None] = []
        for r in ranges:
            if not _SMALL < r.length <= self._size:
                room.append(None)
                continue
            try:
                taken.append(self._free.pop())
            except IndexError:
                taken.append(bytearray(self._size))
            room.append(memoryview(taken[-1])[: r.length])
        try:
            yield room
        finally:
            self._free.extend(taken)


def fetch(
    store: ObjectStore,
    ranges: Sequence[Range],
    helpers: Executor | None,
    room: Sequence[memoryview | None] | None = None,
) -> Payloads:
    """Read all ranges, into ``room`` if given; the calling thread takes its share. Raises the first error."""
    payloads: Payloads = {}
    jobs = list(zip(ranges, room or [None] * len(ranges), strict=True))
    futures: list[tuple[Range, Future[Buffer]]] = []
    if helpers is not None:
        futures = [(r, helpers.submit(_read, store, r, into)) for r, into in jobs[1:]]
        jobs = jobs[:1]
    error: BaseException | None = None
    for r, into in jobs:
        try:
            _split(r, _read(store, r, into), payloads)
        except BaseException as caught:
            error = caught
            break
    # Wait for all of them, whatever happened: they write to what the caller lent.
    for r, future in futures:
        if error is not None and future.cancel():
            continue
        try:
            _split(r, future.result(), payloads)
        except BaseException as caught:
            error = error or caught
    if error is not None:
        raise error
    return payloads


def _read(store: ObjectStore, r: Range, into: memoryview | None) -> Buffer:
    return store.get_range(r.key, r.offset, r.length, into)


def _split(r: Range, data: Buffer, out: Payloads) -> None:
    view = memoryview(data)
    for part in r.parts:
        start = part.entry.offset - r.offset
        out[part.key, part.entry.offset] = view[start : start + part.entry.stored]
