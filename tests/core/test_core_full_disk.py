"""A disk that is smaller than the log and the cache may be, or that others fill: a full log, not an error."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from core_rig import BLOCK, MIB, SECTOR, Background, CoreRig, pattern
from waiting import wait_for

from glidefs.core.engine import EventKind
from glidefs.formats import atomic, reserve
from glidefs.formats.manifest import PackRef
from glidefs.manifest.cache import IndexFiles

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a tmpfs")


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a tmpfs with these options."""
    made: list[Path] = []

    def mount(options: str) -> Path:
        at = tmp_path / f"small{len(made)}"
        at.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(at)], check=True)
        made.append(at)
        return at

    yield mount
    for at in made:
        subprocess.run(["umount", "-l", str(at)], check=True)


def left(at: Path) -> int:
    room = os.statvfs(at)
    return room.f_bavail * room.f_frsize


def test_a_log_larger_than_its_disk_waits_and_goes_on(
    make_rig: Callable[..., CoreRig], small: Callable[[str], Path]
) -> None:
    at = small("size=32m")
    rig = make_rig(cache_dir=at / "blocks", segment_bytes=MIB, log_limit=256 * MIB, cache_bytes=256 * MIB)
    vol = rig.vol(size=256 * MIB, directory=at / "log" / "id")
    for turn in range(3):
        start = turn * 64 * MIB

        def write(start: int = start) -> None:
            for offset in range(0, 64 * MIB, BLOCK):
                vol.core.pwrite(start + offset, pattern(offset, BLOCK))

        writer = Background(write)
        if turn == 0:  # nothing is committed before: the disk has no room for all of it
            assert rig.events(EventKind.LOG_FULL, 60)[0].a == errno.ENOSPC
        while not writer.done:
            wait_for(lambda writer=writer: writer.done or vol.core.info().parked, "the disk is full")  # type: ignore[misc]
            assert left(at) >= MIB, "a margin is left"
            vol.commit()
        writer.result()
    vol.commit()
    for offset in range(0, 128 * MIB, 8 * MIB):
        assert vol.core.pread(offset, BLOCK) == pattern(offset % (64 * MIB), BLOCK)
    assert left(at) >= 2 * MIB


def test_a_disk_without_inodes_is_a_full_log(
    make_rig: Callable[..., CoreRig], small: Callable[[str], Path]
) -> None:
    at = small("size=64m,nr_inodes=40")
    rig = make_rig(segment_bytes=8 * SECTOR)
    vol = rig.vol(directory=at / "log")
    writer = Background(lambda: [vol.core.pwrite(i * BLOCK, pattern(i, 4 * SECTOR)) for i in range(200)])
    while not writer.done:
        wait_for(lambda: writer.done or vol.core.info().parked, "no inode is left")
        assert os.statvfs(at).f_favail >= 8
        vol.commit()
    writer.result()
    vol.commit()
    assert all(vol.core.pread(i * BLOCK, 4 * SECTOR) == pattern(i, 4 * SECTOR) for i in range(200))


def test_the_cache_leaves_more_than_the_log(
    make_rig: Callable[..., CoreRig], small: Callable[[str], Path]
) -> None:
    at = small("size=32m")
    rig = make_rig(cache_dir=at / "blocks", segment_bytes=MIB, log_limit=64 * MIB, cache_bytes=256 * MIB)
    vol = rig.vol(directory=at / "log")
    vol.base = {block: pattern(block, BLOCK) for block in range(400)}
    for block, data in vol.base.items():
        assert vol.core.pread(block * BLOCK, BLOCK) == data
    assert left(at) >= 4 * MIB
    assert rig.engine.stats().cache_used >= 200
    vol.core.pwrite(0, pattern(7, MIB))  # the log has room


def test_small_files_are_written_with_what_is_reserved(small: Callable[[str], Path]) -> None:
    at = small("size=16m,nr_inodes=8")
    target = at / "record"
    kept = reserve.register(at)
    try:
        atomic.write_file_atomic(target, b"old")
        with (at / "others").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, left(at))
        assert left(at) == 0
        atomic.write_file_atomic(target, b"new" * 1000)
        assert target.read_bytes() == b"new" * 1000
        assert not kept.path.exists()
        assert not kept.renew(), "there is no room yet"
        (at / "others").unlink()
        assert kept.renew()
        for i in range(int(os.statvfs(at).f_favail)):
            (at / f"other{i}").touch()
        atomic.write_file_atomic(target, b"newer")
        assert target.read_bytes() == b"newer"
    finally:
        reserve.forget(kept)


def names_in(directory: Path) -> list[str]:
    return sorted(path.name[:2] for path in directory.iterdir())


def test_copies_of_indices_give_way_to_what_frees_the_log(small: Callable[[str], Path]) -> None:
    at = small(f"size=16m,nr_inodes={reserve.FILES_LEFT + 8}")
    files = IndexFiles(at / "indices", MIB)
    kept = reserve.register(at)
    kept.hints.append(files.give_way)
    try:
        for i in range(20):  # there are inodes for five: root, directory and reserve have the others
            files.put(PackRef(bytes([i]) * 16, 1, 4096), b"tail")
        assert names_in(at / "indices") == ["0f", "10", "11", "12", "13"]
        assert int(os.statvfs(at).f_favail) == reserve.FILES_LEFT
        for i in range(reserve.FILES_LEFT):
            (at / f"other{i}").touch()
        atomic.write_file_atomic(at / "root", b"root")
        assert names_in(at / "indices") == ["12", "13"], "the older half went"
        kept.renew()
        files.put(PackRef(bytes([99]) * 16, 1, 4096), b"tail")
        assert names_in(at / "indices") == ["13", "63"], "one for one"
    finally:
        reserve.forget(kept)


def test_a_reserve_whose_directory_is_gone(tmp_path: Path) -> None:
    """No reason to end the thread that looks after it."""
    directory = tmp_path / "state"
    directory.mkdir()
    kept = reserve.register(directory)
    kept.path.unlink(missing_ok=True)
    kept.path.parent.rmdir()
    assert not kept.renew()
    reserve.forget(kept)
