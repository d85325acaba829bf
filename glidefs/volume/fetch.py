"""Payloads from packs: neighbours in one pack are read with one ranged GET, several GETs in parallel."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future
from typing import NamedTuple

from glidefs.formats.pack import PackEntry
from glidefs.store.base import ObjectStore


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


def fetch(store: ObjectStore, ranges: list[Range], helpers: Executor | None) -> Payloads:
    """Read all ranges; the calling thread takes its share. Raises the first error."""
    payloads: Payloads = {}
    futures: list[tuple[Range, Future[bytes]]] = []
    if helpers is not None:
        futures = [(r, helpers.submit(_read, store, r)) for r in ranges[1:]]
        ranges = ranges[:1]
    error: BaseException | None = None
    for r in ranges:
        try:
            _split(r, _read(store, r), payloads)
        except BaseException as caught:
            error = caught
            break
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


def _read(store: ObjectStore, r: Range) -> bytes:
    return store.get_range(r.key, r.offset, r.length)


def _split(r: Range, data: bytes, out: Payloads) -> None:
    view = memoryview(data)
    for part in r.parts:
        start = part.entry.offset - r.offset
        out[part.key, part.entry.offset] = view[start : start + part.entry.stored]


Fetcher = Callable[[list[Wanted]], Payloads]
