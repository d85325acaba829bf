"""Hooks for tests: a trace of what reached the write log's disk, and failures of it, both process-wide;
and a way to make a volume forget."""

from __future__ import annotations

import enum
import os

from glidefs.core._core import ffi, lib
from glidefs.core.check import check
from glidefs.core.volume import CoreVolume


class DiskKind(enum.IntEnum):
    """Operations on write-log files; ``enum disk_kind`` in csrc/base/disk.h."""

    CREATE = 1
    WRITE = 2
    SYNC_BEGIN = 3
    SYNC_END = 4
    DIR_BEGIN = 5
    DIR_END = 6
    UNLINK = 7
    RENAME = 8
    SYNC_FAILED = 9
    DIR_FAILED = 10


def disk_trace(path: str | os.PathLike[str] | None) -> None:
    """Append every operation to the file ``path`` (record format: csrc/base/disk.h); None ends it."""
    check(lib.glide_disk_trace(ffi.NULL if path is None else os.fsencode(path)), "disk trace")


def disk_inject(kind: DiskKind, err: int, *, skip: int = 0, count: int = 1) -> None:
    """After ``skip`` operations of ``kind``, fail the next ``count`` with errno ``err``.

    Syncs are named by their begin. A write that fails leaves half of its first buffer.
    """
    check(lib.glide_disk_inject(kind, err, skip, count), "disk inject")


def forget_sector(volume: CoreVolume, sector: int) -> None:
    """Lose what the log map says about a sector. Raises CoreError (ENOENT) if it says nothing."""
    with volume._use() as pointer:
        check(lib.glide_volume_forget_sector(pointer, sector), "forget a sector")
