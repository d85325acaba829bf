"""Gather: what segments of a write log hold, the newest version of each sector (csrc/volume/gather)."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from glidefs.core._core import ffi, lib
from glidefs.core.check import CoreError, Handle, check, error_text

if TYPE_CHECKING:
    from glidefs.core.volume import CoreVolume

MAX_SEGMENTS = 1 << 20
ENTRY = struct.Struct("=QII")
"""``struct glide_entry``."""


class GatherEntry(NamedTuple):
    """Sectors of one block: ``mask`` those with data, ``zero_mask`` those that are zero."""

    block: int
    mask: int
    zero_mask: int


class GatherExtent(msgspec.Struct, frozen=True, order=True):
    """``count`` whole blocks from ``block`` that are zero."""

    block: int
    count: int


class LogLoss(msgspec.Struct, frozen=True):
    """Something that was synced to segment ``segment`` and is bad now.

    ``kind``: "record", data whose place in the volume is known, ``count`` of them; "place" of a journal,
    which would say it, ``count`` of them; "header", nothing of the file can be read; "segment", it is
    missing. ``why`` names the file.
    """

    segment: int
    kind: str
    count: int
    why: str


class LogDamage(msgspec.Struct, frozen=True):
    """What a log that is read offline lacks: by segment, and the sectors whose newest data is lost.

    ``torn``: records that are bad and that nothing says were ever synced; they count as never written.
    """

    losses: tuple[LogLoss, ...] = ()
    sectors: tuple[tuple[int, int], ...] = ()
    """(first sector, count) of the volume, ascending."""
    torn: int = 0


_KINDS = {
    lib.GLIDE_LOSS_RECORD: "record",
    lib.GLIDE_LOSS_PLACE: "place",
    lib.GLIDE_LOSS_HEADER: "header",
    lib.GLIDE_LOSS_SEGMENT: "segment",
}
_NO_SEGMENT = (1 << 64) - 1
LAST = _NO_SEGMENT
"""As ``last``: to the end of the log, which must be there."""


class Gather(Handle):
    """Replays segments ``first``..``last``; every record is verified.

    With ``volume``, the records must be exactly those that it acknowledged. Without, any log is read
    offline, and judged as at a start: ``damage`` must be looked at. ``sent`` is then the last segment that
    the store has: what is missing up to it is not missed; None if nobody knows. Entries are sorted by block.
    Raises CorruptLog.
    """

    __slots__ = ("_count", "_entries", "_volume", "damage")

    def __init__(
        self,
        volume: CoreVolume | None,
        log_dir: str | os.PathLike[str],
        volume_id: bytes,
        log_id: bytes,
        first: int,
        last: int = LAST,
        sent: int | None = None,
    ) -> None:
        self._volume = volume
        path = os.fspath(log_dir)
        out = ffi.new("glide_gather **")
        pointer = ffi.NULL if volume is None else volume._acquire()
        try:
            result = lib.glide_gather_open(
                pointer,
                os.fsencode(path),
                volume_id,
                log_id,
                first,
                last,
                _NO_SEGMENT if sent is None else sent,
                out,
            )
            check(result, "gather", path=path)
        except BaseException:
            if volume is not None:
                volume._release()
            raise
        super().__init__(out[0])
        entries = ffi.new("const struct glide_entry **")
        self._count = int(lib.glide_gather_entries(out[0], entries))
        self._entries = entries[0]
        self.damage = _damage(out[0])

    def _free(self, pointer: Any) -> None:
        lib.glide_gather_close(pointer)
        if self._volume is not None:
            self._volume._release()

    def __len__(self) -> int:
        return self._count

    def entries(self, first: int = 0, count: int | None = None) -> Iterator[GatherEntry]:
        """Entries from ``first``, ascending by block; a snapshot that outlives the gather."""
        first = min(max(first, 0), self._count)
        count = self._count - first if count is None else min(count, self._count - first)
        if not count:
            return iter(())
        with self._use():
            raw = bytes(ffi.buffer(self._entries + first, count * ENTRY.size))
        return map(GatherEntry._make, ENTRY.iter_unpack(raw))

    def extents(self) -> list[GatherExtent]:
        """Runs of whole blocks that are zero."""
        out = ffi.new("const struct glide_extent **")
        with self._use() as gather:
            count = lib.glide_gather_extents(gather, out)
            return [GatherExtent(out[0][i].block, out[0][i].count) for i in range(count)]

    def nbytes(self, first: int, count: int) -> int:
        """Bytes of sector data of entries ``first`` up to ``first + count``."""
        with self._use() as gather:
            return int(lib.glide_gather_bytes(gather, first, count))

    def fill(self, first: int, count: int, out: bytearray | memoryview) -> None:
        """Copy the data of those entries to ``out``, entry after entry, sectors ascending.

        ``out`` has exactly ``nbytes(first, count)`` bytes. May be called from several threads.
        """
        with self._use() as gather:
            check(
                lib.glide_gather_fill(
                    gather, first, count, ffi.from_buffer(out, require_writable=True), len(out)
                ),
                "gather fill",
                path="write log",
            )


def _damage(pointer: Any) -> LogDamage:
    raw = ffi.new("struct glide_damage *")
    lib.glide_gather_damage(pointer, raw)
    losses = [raw.losses[i] for i in range(raw.loss_count)]
    return LogDamage(
        tuple(
            LogLoss(loss.seq, _KINDS[loss.kind], loss.count, ffi.string(loss.why).decode(errors="replace"))
            for loss in losses
        ),
        tuple((raw.sectors[i].sector, raw.sectors[i].count) for i in range(raw.sector_count)),
        raw.torn,
    )


def log_segments(log_dir: str | os.PathLike[str]) -> list[int]:
    """Sequence numbers of the segments in a log directory, ascending."""
    path = os.fsencode(log_dir)
    room = 256
    while True:
        seqs = ffi.new("uint64_t[]", room)
        found = check(lib.glide_log_segments(path, seqs, room), "list segments")
        if found <= room or room >= MAX_SEGMENTS:
            return [int(seqs[i]) for i in range(min(found, room))]
        room = min(found, MAX_SEGMENTS)


class LogSegment(msgspec.Struct, frozen=True):
    """What the head and journal of a segment say. ``copies``: which of the two headers are good.

    ``records``: how many WRITE, ZERO and SYNC records are valid; ``written``: bytes of the WRITEs.
    """

    version: int
    copies: tuple[bool, bool]
    sectors: int
    volume_id: bytes
    log_id: bytes
    sequence: int
    previous: int
    records: tuple[int, int, int]
    written: int


def look_at_segment(data: bytes) -> LogSegment | None:
    """Describe a segment by its first bytes, head and journal; None: no header is good.

    Of another version all but ``version`` may be meaningless.
    """
    raw = ffi.new("struct glide_segment *")
    result = lib.glide_segment_look(data, len(data), raw)
    if result == -errno.EUCLEAN:
        return None
    if result != -errno.ENOTSUP:
        check(result, "look at a segment")
    return LogSegment(
        version=raw.version,
        copies=(bool(raw.copies & 1), bool(raw.copies & 2)),
        sectors=raw.sectors,
        volume_id=bytes(raw.volume_id),
        log_id=bytes(raw.log_id),
        sequence=raw.seq,
        previous=raw.previous_seq,
        records=(raw.records[1], raw.records[2], raw.records[3]),
        written=raw.written,
    )


class LogRecord(msgspec.Struct, frozen=True):
    """A record of a log: ``count`` sectors from ``sector``, zeros if ``zero``; it begins at ``index``.

    ``intact``: its data has the hash that the record says.
    """

    sector: int
    count: int
    index: int
    zero: bool
    intact: bool


def log_record(
    log_dir: str | os.PathLike[str], volume_id: bytes, log_id: bytes, seq: int, index: int
) -> LogRecord | None:
    """The record that a log position belongs to, read from the file of segment ``seq`` and checked.

    None where there is no valid one, or no such file. Raises CoreError.
    """
    raw = ffi.new("struct glide_record *")
    result = lib.glide_log_record(os.fsencode(log_dir), volume_id, log_id, seq, index, raw)
    if result == -errno.ENOENT:
        return None
    if result not in (0, -errno.EUCLEAN):
        raise CoreError(-result, "read a log record", error_text())
    return LogRecord(raw.sector, raw.count, raw.index, bool(raw.zero), result == 0)
