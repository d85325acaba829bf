"""Power cuts at chosen moments, and the simulated disk itself."""

from __future__ import annotations

import errno
import itertools
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from core_rig import BLOCK, SECTOR, Background, CoreRig, Vol, inject, inject_nothing, pattern, trace
from power_cut import (
    CREATE,
    DIR,
    DIR_END,
    DIR_FAILED,
    EVERYTHING,
    KEEPS,
    NOTHING,
    RENAME,
    SYNC,
    SYNC_END,
    SYNC_FAILED,
    UNLINK,
    WRITE,
    Disk,
    Keep,
    Record,
    cut_power,
    read_trace,
)
from waiting import wait_for

from glidefs.core.check import CoreError

# -- the disk that is simulated --------------------------------------------------------------------


def disk_of(*steps: tuple[int, str, int, bytes]) -> Disk:
    disk = Disk("/log", {"old": b"o" * 8192})
    for kind, name, offset, data in steps:
        disk.apply(Record(kind, "/log" + ("/" + name if name else ""), offset, data, 0))
    return disk


def test_only_what_was_synced_is_durable() -> None:
    steps = [
        (CREATE, "a", 0, b""),
        (WRITE, "a", 0, b"1" * 4096),
        (SYNC, "a", 0, b""),
        (WRITE, "a", 0, b"2" * 4096),  # after the sync began: not covered by it
        (SYNC_END, "a", 0, b""),
    ]
    rng = random.Random(0)
    assert disk_of(*steps).cut(NOTHING, rng) == {"old": b"o" * 8192}
    steps += [(DIR, "", 0, b""), (UNLINK, "old", 0, b""), (DIR_END, "", 0, b"")]
    assert disk_of(*steps).cut(NOTHING, rng) == {"old": b"o" * 8192, "a": b"1" * 4096}
    assert disk_of(*steps).cut(EVERYTHING, rng) == {"a": b"2" * 4096}


def test_a_sync_that_has_not_ended_says_nothing() -> None:
    disk = disk_of((WRITE, "old", 0, b"1" * 4096), (SYNC, "old", 0, b""))
    assert disk.cut(NOTHING, random.Random(0)) == {"old": b"o" * 8192}


def test_what_a_sync_failed_to_write_is_not_there_after_a_later_one() -> None:
    steps = [
        (WRITE, "old", 0, b"1" * 8192),
        (SYNC, "old", 0, b""),
        (SYNC_FAILED, "old", 0, b""),
        (WRITE, "old", 100, b"2" * 10),
        (SYNC, "old", 0, b""),
        (SYNC_END, "old", 0, b""),
    ]
    disk = disk_of(*steps)
    # The second write's page was written whole.
    page = b"1" * 100 + b"2" * 10 + b"1" * 3986
    assert disk.cut(NOTHING, random.Random(0)) == {"old": page + b"o" * 4096}
    assert disk.now() == {"old": page + b"1" * 4096}
    steps += [(DIR, "", 0, b""), (UNLINK, "old", 0, b""), (DIR_FAILED, "", 0, b"")]
    assert "old" in disk_of(*steps).cut(NOTHING, random.Random(0))


def test_pages_are_torn_one_by_one() -> None:
    seen = set()
    for seed in range(500):
        disk = disk_of((WRITE, "old", 0, b"1" * 8192), (WRITE, "old", 4000, b"2" * 200))
        got = disk.cut(Keep(0.5, 1, 1), random.Random(seed))["old"]
        assert len(got) == 8192
        seen.add((got[:1], got[4000:4001], got[4100:4101], got[5000:5001]))
    assert len(seen) == 9  # each page: as it was, with the first write, with both


def test_a_rename_is_one_change() -> None:
    disk = disk_of((RENAME, "old", 0, b"/log/new"), (WRITE, "new", 0, b"1"))
    assert disk.cut(NOTHING, random.Random(0)) == {"old": b"o" * 8192}
    assert disk.cut(Keep(0, 1, 1), random.Random(0)) == {"new": b"o" * 8192}


# -- the write log ---------------------------------------------------------------------------------


class Box:
    """A volume whose power can be cut again and again."""

    def __init__(self, rig: CoreRig, tmp: Path) -> None:
        self.rig = rig
        self.trace = tmp / "trace"
        self.files: dict[str, bytes] = {}
        trace(self.trace)
        self.vol: Vol = rig.vol()

    def cut(self, keep: Keep = NOTHING, seed: int = 0, at: int | None = None) -> Vol:
        raw = self.trace.read_bytes()
        trace(None)
        self.vol.close()
        where = len(raw) if at is None else at
        self.files = cut_power(self.vol.dir, self.files, read_trace(raw), where, keep, random.Random(seed))
        trace(self.trace)
        return self.vol.open(always_verify=True)

    def position(self) -> int:
        return self.trace.stat().st_size


@pytest.fixture
def make_box(tmp_path: Path) -> Iterator[Callable[[], Box]]:
    rig = CoreRig(tmp_path)
    numbers = itertools.count()

    def make() -> Box:
        home = tmp_path / f"box{next(numbers)}"
        home.mkdir()
        return Box(rig, home)

    yield make
    inject_nothing()
    trace(None)
    rig.close()


@pytest.fixture
def box(make_box: Callable[[], Box]) -> Box:
    return make_box()


def test_what_was_not_flushed_may_go(box: Box) -> None:
    box.vol.core.pwrite(0, pattern(1, SECTOR))
    assert box.cut().core.pread(0, SECTOR) == bytes(SECTOR)


@pytest.mark.parametrize("fua", [True, False])
def test_what_was_flushed_is_there(box: Box, fua: bool) -> None:
    for i in range(40):  # over several segments: the directory is synced for each
        box.vol.core.pwrite(i * SECTOR, pattern(i, SECTOR), fua=fua)
        if not fua:
            box.vol.core.flush()
    want = box.vol.core.pread(0, 40 * SECTOR)
    for _ in range(3):
        assert box.cut().core.pread(0, 40 * SECTOR) == want


def test_a_flush_covers_all_segments(box: Box) -> None:
    box.vol.core.pwrite(0, pattern(1, 60 * SECTOR))
    box.vol.core.zero(SECTOR, SECTOR)
    box.vol.core.flush()
    want = box.vol.core.pread(0, 60 * SECTOR)
    assert box.cut().core.pread(0, 60 * SECTOR) == want


def test_a_discard_is_as_durable_as_a_write(box: Box) -> None:
    box.vol.core.pwrite(0, pattern(1, SECTOR))
    box.vol.core.flush()
    box.vol.core.zero(0, BLOCK)
    assert box.cut().core.pread(0, SECTOR) == pattern(1, SECTOR)
    box.vol.core.zero(0, BLOCK)
    box.vol.core.flush()
    assert box.cut().core.pread(0, SECTOR) == bytes(SECTOR)


def test_recovered_data_is_durable_after_a_flush(box: Box) -> None:
    """! What a crash of the process left in the page cache counts as unsynced."""
    box.vol.core.pwrite(0, pattern(1, SECTOR))
    box.vol.reopen()
    box.vol.core.flush()
    assert box.cut().core.pread(0, SECTOR) == pattern(1, SECTOR)


def test_a_directory_whose_sync_failed_is_synced_again(tmp_path: Path) -> None:
    """! Its segment has nothing to lose yet, so nothing else remembers that its entry is not durable."""
    rig = CoreRig(tmp_path, workers=1, log_limit=1 << 20)
    full = [rig.vol() for _ in range(3)]
    waiting = []
    for vol in full:
        waiting.append(Background(partial(vol.core.pwrite, 0, bytes(1 << 20))))
        wait_for(lambda vol=vol: vol.core.info().parked, "a full log")
    box = Box(rig, tmp_path)
    write = Background(partial(box.vol.core.pwrite, 0, pattern(1, 16 * SECTOR)))
    try:
        wait_for(lambda: box.vol.core.info().parked, "no room for it")
        wait_for(
            lambda: [path.stat().st_size for path in box.vol.dir.glob("*.seg")] == [2 * SECTOR],
            "a segment is begun: headers",
        )
        inject(DIR, errno.EIO)
        with pytest.raises(CoreError):
            box.vol.core.flush()
        while not write.done:
            for vol in full:
                vol.commit()
        write.result()
        box.vol.core.flush()
        assert box.cut().core.pread(0, 16 * SECTOR) == pattern(1, 16 * SECTOR)
    finally:
        inject_nothing()
        trace(None)
        rig.close()


def test_a_sealed_segment_keeps_its_last_witness(box: Box) -> None:
    """A SYNC record that ends a segment is counted by the next header: lost, it looked like bit rot."""
    box.vol.core.pwrite(0, pattern(1, SECTOR))
    box.vol.core.flush()
    box.vol.core.seal()
    for i in (2, 3):
        box.vol.core.pwrite(0, pattern(i, SECTOR))
        box.vol.core.flush()
    box.vol.core.pwrite(SECTOR, pattern(4, SECTOR))
    box.vol.core.flush()
    assert box.cut().core.pread(0, 2 * SECTOR) == pattern(3, SECTOR) + pattern(4, SECTOR)


@pytest.mark.parametrize("seed", range(12))
def test_a_sync_of_names_alone_vouches_for_nothing_new(box: Box, seed: int) -> None:
    """A SYNC record that was only noted is below the position of the next sync, which must cover it, too."""
    for i in range(16):
        box.vol.core.pwrite(i * SECTOR, pattern(i, SECTOR))
    box.vol.core.pwrite(0, pattern(20, SECTOR))
    box.vol.core.flush()
    box.vol.core.committed(1)
    box.vol.committed_seq = 1
    box.vol.base = {0: b"".join(pattern(i, SECTOR) for i in range(16)) + bytes(16 * SECTOR)}
    box.vol.core.retire(1)  # its file gets another name: only the directory is to be synced
    box.vol.core.flush()
    assert box.cut(KEEPS["half"], seed).core.pread(0, SECTOR) == pattern(20, SECTOR)


@pytest.mark.parametrize("seed", range(12))
def test_power_fails_again_after_a_recovery_that_dropped_something(box: Box, seed: int) -> None:
    """What one recovery dropped is not vouched for by syncs that come after."""
    rng = random.Random(seed)
    box.vol.core.pwrite(0, pattern(1, 8 * SECTOR))
    box.vol.core.flush()
    for i in range(2, 9):
        box.vol.core.pwrite(rng.randrange(8) * SECTOR, pattern(i, rng.randrange(1, 20) * SECTOR))
    vol = box.cut(KEEPS["half"], seed)
    want = vol.core.pread(0, 32 * SECTOR)
    for i in range(3):
        vol.core.pwrite(40 * SECTOR, pattern(i, SECTOR))
        vol.core.flush()
        if rng.random() < 0.5:
            vol.core.seal()
            vol.core.flush()
        vol = box.cut(NOTHING)
        assert vol.core.pread(0, 32 * SECTOR) == want
        assert vol.core.pread(40 * SECTOR, SECTOR) == pattern(i, SECTOR)
    vol.commit()
    assert vol.core.pread(0, 32 * SECTOR) == want


@pytest.mark.parametrize("keep", ["nothing", "everything", "half", "entries only", "pages only"])
def test_retired_segments_may_come_back_and_do_no_harm(box: Box, keep: str) -> None:
    """The local manifest says what the store has: older segments are not replayed."""
    box.vol.core.pwrite(0, pattern(1, 32 * SECTOR))
    box.vol.commit()
    box.vol.core.pwrite(0, pattern(2, 32 * SECTOR))
    box.vol.core.flush()
    box.vol.commit()
    box.vol.core.pwrite(SECTOR, pattern(3, SECTOR), fua=True)
    for seed in range(4):
        vol = box.cut(KEEPS[keep], seed)
        got = vol.core.pread(0, 32 * SECTOR)
        assert got == pattern(2, SECTOR) + pattern(3, SECTOR) + pattern(2, 32 * SECTOR)[2 * SECTOR :]


@pytest.mark.parametrize("seed", range(16))
def test_recycled_files(box: Box, seed: int) -> None:
    """A retired file that becomes the next segment: none of its old life shows, none of its new is lost."""
    rng = random.Random(seed)
    for i in range(5):
        box.vol.core.pwrite(0, pattern(10 + i, 64 * SECTOR))
        box.vol.commit()
    box.vol.core.pwrite(0, pattern(20, 40 * SECTOR))
    box.vol.core.flush()
    for i in range(30):
        box.vol.core.pwrite((40 + i % 8) * SECTOR, pattern(21 + i, SECTOR))
    old = pattern(14, 64 * SECTOR)
    may = {
        40 + k: [old[(40 + k) * SECTOR : (41 + k) * SECTOR]]
        + [pattern(21 + i, SECTOR) for i in range(30) if i % 8 == k]
        for k in range(8)
    }
    vol = box.cut(rng.choice(list(KEEPS.values())), seed)
    assert vol.core.pread(0, 40 * SECTOR) == pattern(20, 40 * SECTOR)
    for sector, values in may.items():
        assert vol.core.pread(sector * SECTOR, SECTOR) in values
    assert vol.core.pread(48 * SECTOR, 16 * SECTOR) == old[48 * SECTOR :]


def test_every_moment_of_a_short_life(make_box: Callable[[], Box]) -> None:
    """One program, cut after every record of its trace, with nothing kept and with half."""

    def life(box: Box) -> list[tuple[int, int, int]]:
        """(trace position, newest acknowledged, newest durable) after each step."""
        marks = []
        for i in range(1, 26):
            box.vol.core.pwrite(0, pattern(i, SECTOR))
            durable = marks[-1][2] if marks else 0
            marks.append((box.position(), i, durable))
            if i % 4 == 0:
                box.vol.core.flush()
                marks.append((box.position(), i, i))
        return marks

    first = make_box()
    marks = life(first)
    raw = first.trace.read_bytes()
    records = read_trace(raw)
    trace(None)
    first.vol.close()
    versions = [bytes(SECTOR)] + [pattern(i, SECTOR) for i in range(1, 26)]
    for cut in records:
        durable = max((mark[2] for mark in marks if mark[0] <= cut.at), default=0)
        for keep, seed in ((NOTHING, 0), (KEEPS["half"], cut.at), (EVERYTHING, 1)):
            cut_power(first.vol.dir, {}, records, cut.at, keep, random.Random(seed))
            first.vol.open(always_verify=True)
            got = versions.index(first.vol.core.pread(0, SECTOR))
            begun = next((mark[1] for mark in marks if mark[0] >= cut.at), 25)
            assert durable <= got <= begun
            first.vol.close()
