"""The write log: limits and who waits, failing disks, resize, discard."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from core_rig import (
    BLOCK,
    CREATE,
    MIB,
    SECTOR,
    WRITE,
    Background,
    CoreRig,
    Vol,
    inject,
    inject_nothing,
    pattern,
)
from waiting import wait_for

from glidefs.core.check import CoreError
from glidefs.core.engine import EventKind

SMALL_LOG = 40 * 16 * SECTOR


def write_until_full(vol: Vol, start: int = BLOCK) -> tuple[Background, list[int]]:
    """Writes blocks upwards until one waits; also the offsets acknowledged so far."""
    acked: list[int] = []
    stop = threading.Event()

    def run() -> None:
        at = start
        while not stop.is_set():
            vol.core.pwrite(at, pattern(at, BLOCK))
            acked.append(at)
            at += BLOCK

    before = vol.core.stats().log_full_waits
    background = Background(run)
    wait_for(
        lambda: background.done or (vol.core.stats().log_full_waits > before and vol.core.info().parked),
        "a full log",
    )
    stop.set()
    return background, acked


# -- limits ----------------------------------------------------------------------------------------


def test_writers_wait_for_log_space(make_rig: Callable[..., CoreRig]) -> None:
    rig = make_rig(log_limit=SMALL_LOG)
    vol = rig.vol()
    writer, acked = write_until_full(vol)
    assert rig.events(EventKind.LOG_FULL)[0].volume == vol.cookie
    assert rig.engine.stats().log_bytes <= SMALL_LOG
    assert not writer.done
    vol.core.flush()  # waits for nobody
    assert vol.core.pread(acked[0], BLOCK) == pattern(acked[0], BLOCK)
    vol.commit()
    writer.result()
    for at in acked:
        assert vol.core.pread(at, BLOCK) == pattern(at, BLOCK)


def test_commit_without_retire_frees_nothing(make_rig: Callable[..., CoreRig]) -> None:
    """! Nothing uncommitted goes, and nothing goes by itself: retire decides."""
    rig = make_rig(log_limit=SMALL_LOG)
    vol = rig.vol()
    writer, acked = write_until_full(vol)
    with pytest.raises(CoreError) as caught:
        vol.core.retire(vol.core.seal())
    assert "not committed" in str(caught.value)  # said by the worker, for its caller
    vol.commit(retire=False)
    assert not writer.done
    segments = len(list(vol.dir.glob("*.seg")))
    assert segments > len(acked)
    vol.core.retire(vol.committed_seq)
    writer.result()


def test_log_full_timeout(make_rig: Callable[..., CoreRig]) -> None:
    rig = make_rig(log_limit=SMALL_LOG, log_full_timeout_ms=300)
    vol = rig.vol()
    writer, _ = write_until_full(vol)
    with pytest.raises(CoreError) as caught:
        writer.result()
    assert caught.value.errno == errno.EIO
    with pytest.raises(CoreError):
        vol.core.pwrite(512, bytes(2 * BLOCK))
    vol.commit()
    vol.core.pwrite(0, b"x" * SECTOR)
    assert vol.core.pread(0, SECTOR) == b"x" * SECTOR


def test_one_writer_does_not_starve_another(make_rig: Callable[..., CoreRig]) -> None:
    rig = make_rig(log_limit=2 * SMALL_LOG)
    greedy, modest = rig.vol(), rig.vol()
    writer, _ = write_until_full(greedy)
    for i in range(8):
        modest.core.pwrite(i * SECTOR, pattern(i, SECTOR))
    assert not writer.done
    greedy.commit()
    writer.result()


def test_map_budget(make_rig: Callable[..., CoreRig]) -> None:
    rig = make_rig(map_budget=256 << 10, segment_bytes=64 * SECTOR)
    vol = rig.vol(1 << 40)
    written: list[int] = []

    def run() -> None:
        for i in range(3000):
            vol.core.pwrite(i * 7 * BLOCK, pattern(i, 512) * 8)
            written.append(i)

    writer = Background(run)
    wait_for(lambda: vol.core.stats().map_full_waits and vol.core.info().parked, "a full map")
    assert rig.events(EventKind.MAP_FULL)[0].volume == vol.cookie
    assert rig.engine.stats().map_bytes < 320 << 10
    while not writer.done:
        vol.commit()
    writer.result(60)
    for i in (0, 1500, 2999):
        assert vol.core.pread(i * 7 * BLOCK, SECTOR) == pattern(i, 512) * 8


def test_a_full_log_survives_flush_and_seal_of_its_empty_segment(make_rig: Callable[..., CoreRig]) -> None:
    """A segment that was opened and never written may go while a flush runs."""
    rig = make_rig(log_limit=SMALL_LOG)
    vol = rig.vol()
    writer, acked = write_until_full(vol)
    flushes = [Background(lambda: [vol.core.flush() for _ in range(50)]) for _ in range(2)]
    for _ in range(100):
        vol.core.seal()
    for flush in flushes:
        flush.result()
    vol.commit()
    writer.result()
    assert vol.core.pread(acked[-1], BLOCK) == pattern(acked[-1], BLOCK)


def test_sealed_segments_say_so(rig: CoreRig) -> None:
    vol = rig.vol()
    assert vol.core.seal() == 0
    assert not list(vol.dir.parent.glob("**/*.seg"))  # an idle volume costs no disk
    vol.core.pwrite(0, bytes(20 * SECTOR))
    event = rig.events(EventKind.SEALED)[0]
    assert (event.volume, event.a) == (vol.cookie, 1)
    assert vol.core.seal() == 2
    assert vol.core.seal() == 2
    vol.commit()
    assert not list(vol.dir.glob("*.seg"))
    vol.core.pwrite(0, bytes(SECTOR))
    assert vol.core.seal() == 3


# -- failing disks ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [WRITE, CREATE])
@pytest.mark.parametrize("err", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("skip", [0, 1, 2])
def test_a_failing_append_waits_and_recovers(rig: CoreRig, kind: int, err: int, skip: int) -> None:
    vol = rig.vol()
    vol.core.pwrite(0, pattern(1, 8 * SECTOR))
    inject(kind, err, skip=skip if kind == WRITE else 0, count=3)
    for i in range(6):
        vol.core.pwrite((4 + 4 * i) * SECTOR, pattern(2 + i, 8 * SECTOR))
    # A full disk is a full log.
    assert rig.events(EventKind.LOG_FULL if err == errno.ENOSPC else EventKind.DISK_ERROR)[0].a == err
    want = b"".join(
        pattern(1, 8 * SECTOR)[: 4 * SECTOR] if i == 0 else pattern(1 + i, 8 * SECTOR)[: 4 * SECTOR]
        for i in range(7)
    )
    assert vol.core.pread(0, 28 * SECTOR) == want
    vol.core.flush()
    vol.reopen(always_verify=True)
    assert vol.recovery.dropped == 0
    assert vol.core.pread(0, 28 * SECTOR) == want
    vol.commit()
    assert vol.core.pread(0, 28 * SECTOR) == want


def test_a_position_is_never_used_twice(rig: CoreRig) -> None:
    """! After a failed append the segment is closed: what is behind its end does not count."""
    vol = rig.vol()
    vol.core.pwrite(0, pattern(1, SECTOR))
    inject(WRITE, errno.EIO, skip=1)  # the data arrived, its record did not
    vol.core.pwrite(SECTOR, pattern(2, SECTOR))
    assert vol.core.info().last_seq == 2
    vol.core.flush()
    vol.reopen(always_verify=True)
    assert vol.core.pread(0, 2 * SECTOR) == pattern(1, SECTOR) + pattern(2, SECTOR)


def test_an_unaligned_write_waits_for_a_failing_disk(rig: CoreRig) -> None:
    vol = rig.vol()
    vol.base = {0: pattern(1, BLOCK)}
    inject(WRITE, errno.ENOSPC, count=4)
    vol.core.pwrite(512, b"x" * 512)
    inject_nothing()
    want = bytearray(pattern(1, BLOCK))
    want[512:1024] = b"x" * 512
    assert vol.core.pread(0, BLOCK) == want


# -- resize, discard -------------------------------------------------------------------------------


def test_a_shrink_and_a_grow_bring_zeros(rig: CoreRig) -> None:
    vol = rig.vol(4 * MIB)
    vol.base = {i: pattern(i, BLOCK) for i in range(32)}
    vol.core.pwrite(2 * MIB, pattern(9, MIB))
    cut = 2 * MIB + SECTOR
    vol.core.resize(cut)
    assert vol.core.info().size == cut
    with pytest.raises(CoreError):
        vol.core.pread(cut, SECTOR)
    vol.core.resize(8 * MIB)
    assert vol.core.pread(2 * MIB, 6 * MIB) == pattern(9, SECTOR) + bytes(6 * MIB - SECTOR)
    vol.commit()
    assert vol.core.pread(2 * MIB, 6 * MIB) == pattern(9, SECTOR) + bytes(6 * MIB - SECTOR)
    vol.reopen(size=8 * MIB)
    assert vol.core.pread(2 * MIB, MIB) == pattern(9, SECTOR) + bytes(MIB - SECTOR)
    for bad in (0, 100, 1 << 61):
        with pytest.raises(CoreError):
            vol.core.resize(bad)


def test_writes_that_wait_do_not_outlive_a_shrink(make_rig: Callable[..., CoreRig]) -> None:
    """A write beyond the new end must not be appended after the ZERO that cuts it off."""
    rig = make_rig(log_limit=SMALL_LOG)
    vol = rig.vol(64 * MIB)
    writer, _ = write_until_full(vol)
    shrink = Background(lambda: vol.core.resize(32 * MIB))
    wait_for(lambda: vol.core.info().parked >= 2, "a shrink that waits")
    late = Background(lambda: vol.core.pwrite(48 * MIB, b"x" * SECTOR))
    wait_for(lambda: late.done or vol.core.info().parked >= 3, "the late write")
    vol.commit()
    writer.result()
    shrink.result()
    with pytest.raises(CoreError) as caught:
        late.result()
    assert caught.value.errno == errno.ENOSPC
    vol.core.resize(64 * MIB)
    assert vol.core.pread(48 * MIB, SECTOR) == bytes(SECTOR)


def test_a_shrink_that_fails_changes_nothing(make_rig: Callable[..., CoreRig]) -> None:
    rig = make_rig(log_full_timeout_ms=200)
    vol = rig.vol(64 * MIB)
    vol.core.pwrite(48 * MIB, b"x" * SECTOR)
    inject(WRITE, errno.EIO, count=1 << 30)
    with pytest.raises(CoreError):
        vol.core.resize(32 * MIB)
    inject_nothing()
    assert vol.core.info().size == 64 * MIB
    assert vol.core.pread(48 * MIB, SECTOR) == b"x" * SECTOR


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_discard_of_terabytes_costs_nothing(rig: CoreRig) -> None:
    vol = rig.vol(4 << 40)
    vol.core.pwrite(1 << 40, pattern(1, SECTOR))
    before, used = resident(), vol.core.info().map_bytes
    vol.core.zero(0, 2 << 40)
    vol.core.zero(512, (2 << 40) - 1024)
    assert resident() - before < 4 * MIB
    assert vol.core.info().map_bytes - used < 4096
    assert vol.core.pread(1 << 40, SECTOR) == bytes(SECTOR)
    vol.core.pwrite(3 * BLOCK, pattern(2, SECTOR))
    seq = vol.core.seal()
    with vol.gather(seq) as gather:
        assert sum(extent.count for extent in gather.extents()) + len(gather) == (2 << 40) // BLOCK
    vol.reopen()
    vol.commit()
    assert vol.core.pread(3 * BLOCK, SECTOR) == pattern(2, SECTOR)
    assert resident() - before < 8 * MIB


def test_scattered_discards_cost_by_extent(rig: CoreRig) -> None:
    vol = rig.vol(4 << 40)
    for i in range(500):
        vol.core.zero(i * (8 << 30), 4 << 30)
    assert vol.core.info().map_bytes < 128 << 10
    vol.core.zero(0, 4 << 40)
    assert vol.core.info().map_bytes < 16 << 10
