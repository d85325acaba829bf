"""Files that are either the old or the new version after any crash, and how the small ones are read."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

from glidefs.errors import CorruptObject
from glidefs.formats import reserve

_PIECE = 64 << 10
"""Bytes of one read."""
_durable_names: set[str] = set()
"""Files that are written in place, and whose names this process made durable."""


def fsync_dir(path: str | os.PathLike[str]) -> None:
    """Make the names in directory ``path`` durable. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def read_file(path: str | os.PathLike[str], most: int) -> bytes:
    """The bytes of a file. Raises OSError; CorruptObject for one of more than ``most``.

    Whatever has the name is not waited for, as a FIFO would be. A start reads thousands of such files, so it
    is one read for a small one: each call into the kernel hands the interpreter to another thread.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        data = os.read(fd, min(most + 1, _PIECE))
        if len(data) == _PIECE:
            data += b"".join(_pieces(fd, most + 1 - _PIECE))
    finally:
        os.close(fd)
    if len(data) > most:
        raise CorruptObject(os.fspath(path), most, "too long")
    return data


def _pieces(fd: int, left: int) -> Iterator[bytes]:
    while left > 0 and (piece := os.read(fd, min(left, _PIECE))):
        left -= len(piece)
        yield piece


def write_all(fd: int, data: bytes | bytearray | memoryview) -> None:
    """Write all of ``data`` at the file position of ``fd``. Raises OSError."""
    view = memoryview(data)
    while view.nbytes:
        view = view[os.write(fd, view) :]


def write_file_atomic(path: str | os.PathLike[str], data: bytes, mode: int = 0o600) -> None:
    """Replace ``path`` by ``data``: a reader, or a host that lost power, sees the old or the new file.

    Durable on return. Raises OSError, and then the old file is untouched. Without room on the disk it is
    tried once more with what is reserved for that.
    """
    with_reserve(lambda: _write(Path(path), data, mode), Path(path))


def make_directory(path: str | os.PathLike[str], mode: int = 0o700) -> None:
    """Make ``path`` and what is missing above it, durable on return, like the above. Raises OSError.

    Then what was made last is gone again: one that is there counts as durable the next time.
    """
    target = Path(path)
    if target.is_dir():
        return
    make_directory(target.parent, mode)
    with_reserve(lambda: target.mkdir(mode, exist_ok=True), target)
    try:
        fsync_dir(target.parent)
    except OSError:
        with contextlib.suppress(OSError):
            target.rmdir()
        raise


def with_reserve(write: Callable[[], None], target: Path) -> None:
    """Call ``write``, and once more with what is reserved if ``target`` has no room. Raises OSError."""
    try:
        write()
    except OSError as error:
        if error.errno not in reserve.NO_ROOM or not reserve.give_way(target):
            raise
        write()


def _write(target: Path, data: bytes, mode: int) -> None:
    tmp = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    fd = os.open(tmp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        try:
            write_all(fd, data)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(tmp, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(tmp)
        raise
    fsync_dir(target.parent)


def write_in_place(path: str | os.PathLike[str], data: bytes, mode: int = 0o600) -> None:
    """Write ``data`` over the beginning of ``path``, which costs one sync and no space if the file is there.

    Durable on return. The reader must notice what a crash leaves half-written. Raises OSError; without room
    on the disk it is tried once more with what is reserved for that.
    """
    with_reserve(lambda: _write_over(Path(path), data, mode), Path(path))


def _write_over(target: Path, data: bytes, mode: int) -> None:
    name = os.fspath(target)
    fresh = not target.exists()
    if fresh:
        _durable_names.discard(name)
    fd = os.open(target, os.O_WRONLY | os.O_CLOEXEC | (os.O_CREAT if fresh else 0), mode)
    try:
        write_all(fd, data)
        os.fsync(fd)
    finally:
        os.close(fd)
    # One that is there may have been made by a write that failed, or by a process that died, before this.
    if name not in _durable_names:
        fsync_dir(target.parent)
        _durable_names.add(name)
