"""Gather: what segments of a write log hold, the newest version of each sector (csrc/gather)."""

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


class Gather(Handle):
    """Replays segments ``first``..``last``; every record is verified.

    With ``volume``, the records must be exactly those that it acknowledged; without, any log is
    read offline. Entries are sorted by block. Raises CorruptLog.
    """

    __slots__ = ("_count", "_entries", "_volume")

    def __init__(
        self,
        volume: CoreVolume | None,
        log_dir: str | os.PathLike[str],
        volume_id: bytes,
        log_id: bytes,
        first: int,
        last: int,
    ) -> None:
        self._volume = volume
        path = os.fspath(log_dir)
        out = ffi.new("glide_gather **")
        pointer = ffi.NULL if volume is None else volume._acquire()
        try:
            result = lib.glide_gather_open(pointer, os.fsencode(path), volume_id, log_id, first, last, out)
            check(result, "gather", path=path)
        except BaseException:
            if volume is not None:
                volume._release()
            raise
        super().__init__(out[0])
        entries = ffi.new("const struct glide_entry **")
        self._count = int(lib.glide_gather_entries(out[0], entries))
        self._entries = entries[0]

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
