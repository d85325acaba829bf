"""Disk space held in reserve for the small writes that retiring a log needs first.

On a file system without a free byte or inode no log can be retired: the local copy of the manifest comes
first, and is a new file. The core leaves a margin (``csrc/base/space.h``), but other files may take it. So
each registered directory holds a file of some MiB. A writer that finds no room for a small file removes it,
and hints that can be had again (:attr:`Reserve.hints`), and tries again. The next call of
:meth:`Reserve.renew` that finds room makes the file again.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path

NAME = "reserve"
MOST = 8 << 20
SHARE = 64
"""Of a small file system."""
NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})

FILES_LEFT = 32
"""Writers of hints leave so many inodes: twice what the core leaves for others (``csrc/base/space.c``)."""

_lock = threading.Lock()
_reserves: dict[Path, Reserve] = {}


class Reserve:
    """The reserve of a directory; made by :func:`register`."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / NAME
        self.device = os.stat(directory).st_dev
        self.hints: list[Callable[[], bool]] = []
        """Each removes files below the directory that nobody needs; False: there were none."""

    def renew(self) -> bool:
        """Make the file if there is room for it twice. Whether it is there."""
        if self.path.exists():
            return True
        try:
            room = os.statvfs(self.path.parent)
        except OSError:  # the directory was taken away
            return False
        size = min(MOST, room.f_blocks * room.f_frsize // SHARE)
        if room.f_bavail * room.f_frsize < 2 * size or (room.f_files and room.f_favail < 2):
            return False
        fresh = self.path.with_name(f".{NAME}.new")
        try:
            fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(fd, 0, max(size, 1))
            finally:
                os.close(fd)
            fresh.rename(self.path)
        except OSError:
            with contextlib.suppress(OSError):
                fresh.unlink()
            return False
        return True

    def give_way(self) -> bool:
        """Remove the file, and hints. False: there was nothing."""
        gone = [remove() for remove in self.hints]
        try:
            self.path.unlink()
        except OSError:
            return any(gone)
        return True


def register(directory: Path) -> Reserve:
    """Keep a reserve in ``directory`` from now on."""
    with _lock:
        reserve = _reserves.setdefault(directory, Reserve(directory))
    reserve.renew()
    return reserve


def forget(reserve: Reserve) -> None:
    """The directory is used no more. The file stays, for the next process."""
    with _lock:
        _reserves.pop(reserve.path.parent, None)


def give_way(path: Path) -> bool:
    """Make room on the file system that is to hold ``path``. False: there is nothing to give."""
    try:
        device = os.stat(path.parent).st_dev
    except OSError:
        return False
    with _lock:
        found = [reserve for reserve in _reserves.values() if reserve.device == device]
    given = [reserve.give_way() for reserve in found]
    return any(given)


def has_files(directory: Path) -> bool:
    """Whether the file system of ``directory`` has an inode to spare for a hint. Raises OSError."""
    room = os.statvfs(directory)
    return not room.f_files or room.f_favail > FILES_LEFT
