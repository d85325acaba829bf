"""What every sector may hold: the model that the machines compare with.

Not a byte array but a list of versions per sector, since after a power cut or in a commit a sector may be
older than its newest write, within limits that the versions' marks give. Marks are positions in the
trace of the disk (when the write began and was acknowledged) and in the log (segments that it may be in).
Only the sectors of a few hot areas are kept; discards may be of any size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

SECTOR = 4096
UNIT = 512
UNITS = SECTOR // UNIT
ZERO = bytes(SECTOR)
FIRST = -1


class Span(NamedTuple):
    """When an operation ran. ``start``/``end``: bytes of the trace before and after it; ``low``/``high``:
    lowest and highest log segment that may hold it."""

    start: int
    end: int
    low: int
    high: int


class Version(NamedTuple):
    span: Span
    content: bytes
    loose: tuple[frozenset[bytes], ...] = ()
    """Of writes at the same time: what each 512 bytes may have been on the way to ``content``."""

    def matches(self, sector: bytes) -> bool:
        if sector == self.content:
            return True
        return bool(self.loose) and all(
            sector[i * UNIT : (i + 1) * UNIT] in self.loose[i] for i in range(UNITS)
        )


def tag_bytes(tag: int, length: int) -> bytes:
    """``length`` bytes that name their write, and their place in it."""
    if tag == 0:
        return bytes(length)
    return b"".join(
        (tag.to_bytes(4, "little") + at.to_bytes(4, "little")) * (UNIT // 8) for at in range(length // UNIT)
    )


class History:
    """Versions of the sectors of ``areas`` (first sector, count)."""

    def __init__(self, areas: Sequence[tuple[int, int]], base: dict[int, bytes]) -> None:
        self.areas = list(areas)
        origin = Span(FIRST, FIRST, 0, 0)
        self.versions: dict[int, list[Version]] = {}
        for first, count in areas:
            for sector in range(first, first + count):
                block = base.get(sector // 32)
                at = sector % 32 * SECTOR
                content = ZERO if block is None else block[at : at + SECTOR]
                self.versions[sector] = [Version(origin, content)]

    # -- operations ------------------------------------------------------------------------------

    def now(self, sector: int) -> bytes:
        return self.versions[sector][-1].content

    def expected(self, offset: int, length: int) -> bytes:
        first, last = offset // SECTOR, (offset + length - 1) // SECTOR
        data = b"".join(self.now(sector) for sector in range(first, last + 1))
        return data[offset - first * SECTOR :][:length]

    def write(self, span: Span, offset: int, data: bytes) -> None:
        """Acknowledged: what the sectors of hot areas are from now on."""
        at = offset
        while at < offset + len(data):
            sector, skip = divmod(at, SECTOR)
            take = min(SECTOR - skip, offset + len(data) - at)
            if take == SECTOR:
                content = data[at - offset : at - offset + SECTOR]
            else:
                old = self.now(sector)
                content = old[:skip] + data[at - offset : at - offset + take] + old[skip + take :]
            self.versions[sector].append(Version(span, content))
            at += take

    def zero(self, span: Span, offset: int, length: int) -> None:
        """Any range: only hot sectors are touched."""
        end = offset + length
        for first, count in self.areas:
            start = max(offset, first * SECTOR)
            stop = min(end, (first + count) * SECTOR)
            if start < stop:
                self.write(span, start, bytes(stop - start))

    def settle(self, span: Span, sector: int, content: bytes, loose: tuple[frozenset[bytes], ...]) -> None:
        """Writes at the same time ended with ``content``."""
        self.versions[sector].append(Version(span, content, loose))

    # -- what may be -----------------------------------------------------------------------------

    def after_cut(self, sector: int, cut: int, flushes: Iterable[tuple[int, int]]) -> list[Version]:
        """What the sector may hold after a power cut at ``cut``, given (begin, end) of the operations that
        made everything acknowledged before their begin durable."""
        floor = max((begin for begin, end in flushes if end <= cut), default=FIRST)
        versions = self.versions[sector]
        durable = max(i for i, version in enumerate(versions) if version.span.end <= floor)
        return versions[durable : durable + 1] + [
            version for version in versions[durable + 1 :] if version.span.start < cut
        ]

    def in_commit(self, sector: int, segment: int) -> list[Version]:
        """What the store may hold of the sector when it has the log up to the end of ``segment``."""
        versions = self.versions[sector]
        surely = max(i for i, version in enumerate(versions) if version.span.high <= segment)
        return versions[surely : surely + 1] + [
            version for version in versions[surely + 1 :] if version.span.low <= segment
        ]

    def pin(self, sector: int, content: bytes) -> None:
        """Forget the past: the sector is what it is."""
        self.versions[sector] = [Version(Span(FIRST, FIRST, 0, 0), content)]
