"""Small files are read whole or refused, whatever has their name; what was written has a durable name."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glidefs.errors import CorruptObject, StoreError
from glidefs.formats.atomic import _PIECE, make_directory, read_file, write_file_atomic, write_in_place
from glidefs.store.file import FileStore

sys.path.insert(0, str(Path(__file__).parents[1]))
from mutate import fifo

LENGTHS = st.one_of(st.integers(0, 40), st.integers(-2, 2).map(lambda d: 2 * _PIECE + d), st.just(_PIECE))


@given(length=LENGTHS, most=LENGTHS)
def test_all_of_it_or_an_error(tmp_path_factory: pytest.TempPathFactory, length: int, most: int) -> None:
    path = tmp_path_factory.getbasetemp() / "small"
    data = os.urandom(length)
    path.write_bytes(data)
    if length > most:
        with pytest.raises(CorruptObject, match="too long"):
            read_file(path, most)
    else:
        assert read_file(path, most) == data


def test_a_terabyte_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "long"
    path.touch()
    os.truncate(path, 1 << 40)
    with pytest.raises(CorruptObject, match="too long"):
        read_file(path, 3 * _PIECE)


def test_nobody_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    path.touch()
    fifo(path)
    assert read_file(path, 10) == b""
    with pytest.raises(IsADirectoryError):
        read_file(tmp_path, 10)


class Disk:
    """Syncs: ``left`` of them work, then all fail. ``durable``: names and inodes in directories synced."""

    def __init__(self) -> None:
        self.left = 1 << 30
        self.durable: set[tuple[Path, int]] = set()
        self._sync = os.fsync

    def __call__(self, fd: int) -> None:
        if not self.left:
            raise OSError(errno.EIO, "the disk fails")
        self.left -= 1
        self._sync(fd)
        place = Path(os.readlink(f"/proc/self/fd/{fd}"))
        if place.is_dir():
            self.durable |= {(path, path.lstat().st_ino) for path in place.iterdir()}


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    made = Disk()
    monkeypatch.setattr(os, "fsync", made)
    return made


def file(path: Path) -> None:
    make_directory(path.parent)
    write_file_atomic(path, b"x")


def file_in_place(path: Path) -> None:
    make_directory(path.parent)
    write_in_place(path, b"x")


def stored(path: Path) -> None:
    with FileStore(path.parent.parent, create=True) as store:
        store.put("a/b", b"x")


@pytest.mark.parametrize("worked", range(8))
@pytest.mark.parametrize("make", [make_directory, file, file_in_place, stored])
def test_a_name_is_durable_whatever_failed_before(
    tmp_path: Path, disk: Disk, make: Callable[[Path], None], worked: int
) -> None:
    """! What an attempt that failed has left is taken for durable by the next one."""
    path = tmp_path / "home" / "a" / "b"
    path.parent.parent.mkdir()
    disk.left = worked
    with contextlib.suppress(OSError, StoreError):
        make(path)
    disk.left = 1 << 30
    make(path)
    assert {(one, one.stat().st_ino) for one in (path.parent, path)} <= disk.durable
