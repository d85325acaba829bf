"""Write logs on this host, those set aside too: list, export, delete.

A log is ``{log_root}/{volume id}/{log id}/``. One that no root or record names was set aside when its volume
was taken over: it is never replayed, and deleted only by an operator.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO, NamedTuple

import msgspec

from glidefs.core.gather import Gather, LogDamage, log_segments
from glidefs.errors import CorruptLog, InUse, UnknownExport
from glidefs.formats.atomic import fsync_dir
from glidefs.formats.pack import BLOCK, FULL_MASK, SECTOR, SECTORS_PER_BLOCK
from glidefs.volume import log_damage

_HEX_ID = re.compile(r"[0-9a-f]{32}\Z")
_FILL_BYTES = 16 << 20


class LogInfo(msgspec.Struct, frozen=True):
    """A log directory. ``live``: a volume served here writes it. ``bytes`` are allocated."""

    volume_id: str
    log_id: str
    path: str
    segments: int
    bytes: int
    live: bool


class LogExtent(msgspec.Struct, frozen=True):
    """``length`` bytes at ``offset`` of the volume that the log holds; zeros if ``zero``."""

    offset: int
    length: int
    zero: bool


def log_path(log_root: Path, volume_id: bytes, log_id: bytes) -> str:
    """Where the log of a volume is."""
    return f"{log_root}/{volume_id.hex()}/{log_id.hex()}"


def log_dir(log_root: Path, volume_id: bytes, log_id: bytes) -> Path:
    """The same as a Path, which costs as much as to look there."""
    return Path(log_path(log_root, volume_id, log_id))


class LogLook(NamedTuple):
    """What the names in a log directory say.

    ``lost_syncs``: a sync of a segment failed, and the store was not known to have that since.
    """

    empty: bool
    lost_syncs: bool


def look(directory: str) -> LogLook:
    """Look at the names in a log directory; one that is not there is empty."""
    try:
        names = os.listdir(directory)
    except (FileNotFoundError, NotADirectoryError):
        names = []
    return LogLook(not names, any(name.endswith(".syncfail") for name in names))


class LogCopy(NamedTuple):
    """What was written of a log, ascending, and what could not be."""

    extents: list[LogExtent]
    damage: LogDamage


def unsent_bytes(directory: Path, volume_id: bytes, log_id: bytes, sent: int | None) -> int:
    """Bytes of the volume, zeros too, that segments beyond ``sent`` hold: what the store does not have.

    None: nobody knows what it has; then all that is there counts. Raises CorruptLog.
    """
    after = sent or 0
    with Gather(None, directory, volume_id, log_id, after + 1, sent=sent) as gather:
        log_damage.check(gather.damage, directory)
        sectors = sum((entry.mask | entry.zero_mask).bit_count() for entry in gather.entries())
        unsent = sectors * SECTOR + sum(extent.count for extent in gather.extents()) * BLOCK
    if not unsent and (seqs := [seq for seq in log_segments(directory) if seq > after]):
        # A segment is made by the first write to it.
        raise CorruptLog(str(directory), f"nothing can be read of {len(seqs)} segments")
    return unsent


def _witness(path: Path) -> Path:
    return path.with_name(f"{path.name}.witness")


def has_witness(path: Path) -> bool:
    """Whether the witness file beside a log is there: then something was written to the log."""
    return _witness(path).exists()


def log_ids(log_root: Path) -> Iterator[tuple[bytes, bytes]]:
    """(volume id, log id) of all logs below ``log_root``, in order; nothing in them is looked at."""
    root = os.fspath(log_root)
    for volume in _id_dirs(root):
        for log in _id_dirs(os.path.join(root, volume)):
            yield bytes.fromhex(volume), bytes.fromhex(log)


def _id_dirs(path: str) -> list[str]:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(path) as found:
        return sorted(entry.name for entry in found if _HEX_ID.match(entry.name) and entry.is_dir())
    return []


def log_info(log_root: Path, volume_id: bytes, log_id: bytes, *, live: bool) -> LogInfo:
    """What is there of one log."""
    path = log_dir(log_root, volume_id, log_id)
    size = sum(file.stat().st_blocks * 512 for file in path.iterdir() if file.is_file())
    return LogInfo(volume_id.hex(), log_id.hex(), str(path), len(log_segments(path)), size, live)


def list_logs(log_root: Path, live: Collection[tuple[bytes, bytes]]) -> list[LogInfo]:
    """All logs below ``log_root``; ``live`` are the (volume id, log id) of volumes served here."""
    return [log_info(log_root, *ids, live=ids in live) for ids in log_ids(log_root)]


def export_log(
    directory: Path,
    volume_id: bytes,
    log_id: bytes,
    out_path: Path,
    *,
    sent: int | None = None,
    partial: bool = False,
) -> LogCopy:
    """Write what a log holds, newest version of each sector, into a sparse image; says which parts.

    What the log does not hold is left as it is in ``out_path``, so a log can be applied over an
    image of the volume. ``sent``: the last segment that the store has, None if nobody knows. Raises
    CorruptLog, and has written nothing then, where something that was synced is bad; with ``partial``
    that is left out.
    """
    with Gather(None, directory, volume_id, log_id, 1, sent=sent) as gather:
        if not partial:
            log_damage.check(gather.damage, directory)
        with out_path.open("r+b" if out_path.exists() else "w+b") as out:
            extents = _copy(gather, out)
            out.flush()
            if extents:
                _punch(out.fileno(), extents)
        return LogCopy(extents, gather.damage)


def copy_log(
    directory: Path, volume_id: bytes, log_id: bytes, out: IO[bytes], *, after: int = 0
) -> list[LogExtent]:
    """Write the data of segments beyond ``after``, which the store has, to its place in ``out``.

    Returns all that they hold, ascending; the caller writes the extents of zeros. Raises CorruptLog.
    """
    with Gather(None, directory, volume_id, log_id, after + 1, sent=after) as gather:
        log_damage.check(gather.damage, directory)
        return _copy(gather, out)


def _copy(gather: Gather, out: IO[bytes]) -> list[LogExtent]:
    extents: list[LogExtent] = []
    for extent in gather.extents():
        _add(extents, extent.block * BLOCK, extent.count * BLOCK, True)
    for first, count in _batches(gather):
        data = memoryview(bytearray(gather.nbytes(first, count)))
        gather.fill(first, count, data)
        at = 0
        for block, mask, zero_mask in gather.entries(first, count):
            for sector, length, zero in _runs(mask, zero_mask):
                offset = block * BLOCK + sector * SECTOR
                _add(extents, offset, length * SECTOR, zero)
                if not zero:
                    out.seek(offset)
                    out.write(data[at : at + length * SECTOR])
                    at += length * SECTOR
    return sorted(extents, key=lambda extent: extent.offset)


def delete_log(log_root: Path, volume_id: str, log_id: str, live: Collection[tuple[bytes, bytes]]) -> None:
    """Delete a log that was set aside. Raises InUse for one in use, UnknownExport for none."""
    if not (_HEX_ID.match(volume_id) and _HEX_ID.match(log_id)):
        raise UnknownExport(f"{volume_id}/{log_id}", "a log is named by two ids of 32 hex digits")
    if (bytes.fromhex(volume_id), bytes.fromhex(log_id)) in live:
        raise InUse(f"log {log_id} belongs to a volume that is served here; remove the volume instead")
    path = log_root / volume_id / log_id
    if not path.is_dir():
        raise UnknownExport(f"{volume_id}/{log_id}", "no such log; `glidefs logs` lists them")
    remove_log(path)
    fsync_dir(path.parent)


def remove_log(path: Path) -> None:
    """Delete a log; first the witness file beside it, which alone would say that the log is lost."""
    _witness(path).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def _add(extents: list[LogExtent], offset: int, length: int, zero: bool) -> None:
    if extents:
        last = extents[-1]
        if last.zero == zero and last.offset + last.length == offset:
            extents[-1] = LogExtent(last.offset, last.length + length, zero)
            return
    extents.append(LogExtent(offset, length, zero))


def _batches(gather: Gather) -> list[tuple[int, int]]:
    batches: list[tuple[int, int]] = []
    first = size = 0
    for i, entry in enumerate(gather.entries()):
        size += entry.mask.bit_count() * SECTOR
        if size >= _FILL_BYTES:
            batches.append((first, i + 1 - first))
            first, size = i + 1, 0
    if first < len(gather):
        batches.append((first, len(gather) - first))
    return batches


def _runs(mask: int, zero_mask: int) -> list[tuple[int, int, bool]]:
    """(first sector, sectors, zero) of each run of sectors of one kind in a block."""
    runs: list[tuple[int, int, bool]] = []
    for sector in range(SECTORS_PER_BLOCK):
        bit = 1 << sector
        if not (mask | zero_mask) & bit & FULL_MASK:
            continue
        zero = bool(zero_mask & bit)
        if runs and runs[-1][2] == zero and runs[-1][0] + runs[-1][1] == sector:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1, zero)
        else:
            runs.append((sector, 1, zero))
    return runs


def _punch(fd: int, extents: list[LogExtent]) -> None:
    """Make the zero extents holes: zeros over old data, the rest by growing the file."""
    size = os.fstat(fd).st_size
    end = max(size, max((extent.offset + extent.length for extent in extents), default=0))
    for extent in extents:
        if extent.zero and extent.offset < size:
            _zero_range(fd, extent.offset, min(extent.offset + extent.length, size))
    os.ftruncate(fd, end)


def _zero_range(fd: int, start: int, stop: int) -> None:
    # Only where there is data: a terabyte of discards over a sparse image costs its extents.
    while start < stop:
        try:
            start = os.lseek(fd, start, os.SEEK_DATA)
        except OSError:
            return
        hole = min(os.lseek(fd, start, os.SEEK_HOLE), stop)
        while start < hole:
            start += os.pwrite(fd, bytes(min(_FILL_BYTES, hole - start)), start)
