"""Disks that lie: what was written is not what is read, or cannot be read.

Never wrong data, and an error only for data that is nowhere else.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from blake3 import blake3
from core_rig import (
    BLOCK,
    CACHE_READ,
    CACHE_SYNC,
    CACHE_WRITE,
    MIB,
    READ,
    SECTOR,
    SYNC,
    Background,
    CoreRig,
    Segment,
    Vol,
    apply_gather,
    inject,
    pattern,
)
from waiting import wait_for

from glidefs.core.check import CoreError
from glidefs.core.engine import EventKind
from glidefs.core.volume import Fill, install_slot
from glidefs.errors import CorruptLog, GlideError

# -- retire ----------------------------------------------------------------------------------------


def zero(segment: Segment, offset: int, length: int) -> None:
    """What a lost page leaves."""
    with segment.path.open("r+b") as file:
        file.seek(offset)
        file.write(bytes(length))


DAMAGES: dict[str, Callable[[Segment], None]] = {
    "header": lambda s: zero(s, 0, SECTOR),
    "first record": lambda s: s.flip(s.record_at(0) + 3),
    "a discard": lambda s: s.flip(s.record_at(2) + 3),
    "journal": lambda s: zero(s, SECTOR, s.journal),
    "all of it": lambda s: zero(s, 0, s.data_at(s.sectors)),
    "cut off": lambda s: s.path.open("r+b").truncate(7),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_retire_forgets_what_a_damaged_journal_hides(rig: CoreRig, damage: str) -> None:
    vol = rig.vol()
    vol.core.pwrite(0, pattern(1, SECTOR))
    vol.core.pwrite(5 * BLOCK, pattern(2, SECTOR))
    vol.core.zero(7 * BLOCK, 3 * BLOCK)
    vol.core.pwrite(8 * BLOCK, pattern(3, SECTOR))
    seq = vol.commit(retire=False)
    DAMAGES[damage](vol.segments()[0])
    vol.core.pwrite(9 * BLOCK, pattern(4, SECTOR))  # stays: newer
    vol.core.retire(seq)
    assert [segment.path.name for segment in vol.segments()] == [f"{seq + 1:016x}.seg"]
    assert vol.core.pread(0, SECTOR) == pattern(1, SECTOR)
    assert vol.core.pread(5 * BLOCK, SECTOR) == pattern(2, SECTOR)
    assert vol.core.pread(7 * BLOCK, BLOCK) == bytes(BLOCK)
    assert vol.core.pread(8 * BLOCK, BLOCK) == pattern(3, SECTOR) + bytes(BLOCK - SECTOR)
    assert vol.core.pread(9 * BLOCK, BLOCK) == pattern(4, SECTOR) + bytes(BLOCK - SECTOR)
    vol.commit()
    assert vol.segments() == []
    assert vol.core.pread(9 * BLOCK, SECTOR) == pattern(4, SECTOR)


def test_retire_after_a_replay_that_dropped_records(rig: CoreRig) -> None:
    """The number of records of such a segment proves nothing: with another damaged one it is right again."""
    vol = rig.vol()
    for i in range(3):
        vol.core.pwrite(i * BLOCK, pattern(i, SECTOR))
    segment = vol.segments()[0]
    vol.close()
    segment.flip(segment.data_at(0))
    vol.open(always_verify=True)
    assert vol.recovery.dropped == 1
    seq = vol.core.seal()
    vol.core.sync()
    vol.base = {i: pattern(i, SECTOR) + bytes(BLOCK - SECTOR) for i in (1, 2)}
    vol.core.committed(seq)
    segment.flip(segment.record_at(1) + 3)
    vol.core.retire(seq)
    assert vol.segments() == []
    assert vol.core.pread(BLOCK, SECTOR) == pattern(1, SECTOR)
    assert vol.core.info().map_bytes < 16384


# -- reads of the log --------------------------------------------------------------------------------

FOREVER = 1 << 20
TRIES = 8
"""DISK_TRIES of the core."""


def lose(segment: Segment, index: int, count: int = 1) -> None:
    """Write-back failed and the pages went: the disk has what it had before."""
    zero(segment, segment.data_at(index), count * SECTOR)


def reads(vol: Vol, content: dict[int, bytes]) -> tuple[int, int]:
    """How many sectors read right, and how many with an error. Never wrong."""
    right = failed = 0
    for sector, data in content.items():
        try:
            assert vol.core.pread(sector * SECTOR, SECTOR) == data
            right += 1
        except CoreError as error:
            failed += error.errno == errno.EIO
    return right, failed


def written(vol: Vol, big: int = 4) -> dict[int, bytes]:
    """One sector, then a record of ``big`` sectors over two blocks, then one over an extent of zeros."""
    data = pattern(2, big * SECTOR)
    vol.core.zero(2 * BLOCK, 4 * BLOCK)
    vol.core.pwrite(0, pattern(1, SECTOR))
    vol.core.pwrite(BLOCK - 2 * SECTOR, data)
    vol.core.pwrite(3 * BLOCK, pattern(3, SECTOR))
    content = {30 + i: data[i * SECTOR : (i + 1) * SECTOR] for i in range(big)}
    return {0: pattern(1, SECTOR), **content, 96: pattern(3, SECTOR), 97: bytes(SECTOR)}


@pytest.mark.parametrize("reopened", [False, True])
def test_lost_data_is_an_error_until_it_is_committed(rig: CoreRig, reopened: bool) -> None:
    vol = rig.vol()
    content = written(vol)
    if reopened:  # the hashes are the journal's then, of whole records
        vol.reopen()
    segment = vol.segments()[0]
    with vol.gather(vol.core.seal()) as gather:
        base = apply_gather({}, gather)
    lose(segment, 1)
    lose(segment, 4)  # of the big record the third sector
    lose(segment, 6)
    assert reads(vol, content) == ((1, 6) if reopened else (4, 3))
    # What this process appended is verified when it is read, all other when the log is opened.
    with pytest.raises(CorruptLog), vol.gather(1) as gather:
        apply_gather({}, gather)
    vol.base = base
    vol.core.committed(1)
    assert reads(vol, content) == (len(content), 0)
    vol.core.retire(1)
    assert reads(vol, content) == (len(content), 0)


def test_what_is_gone_is_not_mixed_with_what_is_newer(rig: CoreRig) -> None:
    vol = rig.vol()
    vol.core.pwrite(0, pattern(1, BLOCK // 8))
    with vol.gather(vol.core.seal()) as gather:
        vol.base = apply_gather({}, gather)
    vol.core.committed(1)
    vol.core.pwrite(SECTOR, pattern(2, SECTOR))
    lose(vol.segments()[0], 0, 4)
    expected = bytearray(pattern(1, BLOCK // 8) + bytes(BLOCK * 7 // 8))
    expected[SECTOR : 2 * SECTOR] = pattern(2, SECTOR)
    assert vol.core.pread(0, BLOCK) == expected
    assert vol.core.pread(512, 1024) == expected[512:1536]


def test_unaligned_reads_of_the_log_are_checked_too(rig: CoreRig) -> None:
    vol = rig.vol()
    vol.core.pwrite(0, pattern(1, 8 * SECTOR))
    assert vol.core.pread(512, 7 * SECTOR) == pattern(1, 8 * SECTOR)[512 : 512 + 7 * SECTOR]
    vol.reopen()
    assert vol.core.pread(512 + SECTOR, SECTOR) == pattern(1, 8 * SECTOR)[512 + SECTOR : 512 + 2 * SECTOR]
    lose(vol.segments()[0], 3)
    with pytest.raises(CoreError):
        vol.core.pread(3 * SECTOR + 512, 512)
    with pytest.raises(CoreError):
        vol.core.pwrite(3 * SECTOR + 512, bytes(512))  # it needs the rest of the sector
    vol.core.pwrite(3 * SECTOR, pattern(4, SECTOR))
    assert vol.core.pread(2 * SECTOR, 2 * SECTOR)[SECTOR:] == pattern(4, SECTOR)


def test_a_read_that_fails_is_tried_again(rig: CoreRig) -> None:
    vol = rig.vol()
    content = written(vol)
    inject(READ, errno.EIO, count=TRIES - 1)
    assert reads(vol, content) == (len(content), 0)
    inject(READ, errno.EIO, count=FOREVER)
    assert reads(vol, content)[1] >= 6
    assert rig.events(EventKind.READ_LOST)[0].b == errno.EIO
    with pytest.raises(GlideError, match="cannot read"):
        vol.gather(vol.core.seal())
    inject(READ, errno.EIO, count=TRIES - 1)
    vol.commit(retire=False)
    assert reads(vol, content) == (len(content), 0)  # from the store


@pytest.mark.parametrize("failing", [TRIES - 1, TRIES])
def test_a_replay_tries_again_too(rig: CoreRig, failing: int) -> None:
    """Whichever read fails, of header, journal or data: all that was written, or after TRIES an error."""
    vol = rig.vol()
    content = written(vol)
    vol.close()
    refused = 0
    for skip in range(8):
        inject(READ, errno.EIO, skip=skip, count=failing)
        try:
            vol.open(always_verify=True)
        except GlideError:
            refused += 1
            continue
        assert vol.recovery.dropped == 0
        inject(READ, errno.EIO, count=0)
        assert reads(vol, content) == (len(content), 0)
        vol.close()
    assert bool(refused) == (failing == TRIES)


def test_the_commit_of_a_segment_whose_sync_failed_unmaps_it(rig: CoreRig) -> None:
    vol = rig.vol()
    content = written(vol)
    inject(SYNC, errno.EIO)
    with pytest.raises(CoreError):
        vol.core.flush()
    vol.core.pwrite(9 * BLOCK, pattern(9, SECTOR))
    hits = vol.core.stats().log_hits
    assert reads(vol, content) == (len(content), 0)
    assert vol.core.stats().log_hits > hits
    vol.commit(upto=1, retire=False)
    hits = vol.core.stats().log_hits
    assert reads(vol, content) == (len(content), 0)
    assert vol.core.stats().log_hits == hits
    assert vol.core.pread(9 * BLOCK, SECTOR) == pattern(9, SECTOR)
    vol.core.flush()


@pytest.mark.parametrize("reopened", [False, True])
def test_an_upload_checks_what_it_reads(rig: CoreRig, reopened: bool) -> None:
    """A segment that was verified by a replay, too: its pages may go before the read for a pack."""
    vol = rig.vol()
    vol.core.pwrite(0, pattern(1, 4 * SECTOR))
    if reopened:
        vol.reopen()
    with vol.gather(vol.core.seal()) as gather:
        lose(vol.segments()[0], 2)
        with pytest.raises(GlideError, match="damaged"):
            gather.fill(0, 1, bytearray(gather.nbytes(0, 1)))


# -- the block cache ---------------------------------------------------------------------------------

SICK = 2.0
"""SICK_RETRY_NS of the core, in seconds."""


def lose_slots(rig: CoreRig, first: int, count: int) -> None:
    with (rig.engine.config.cache_dir / "blocks.data").open("r+b") as file:
        file.seek(first * BLOCK)
        file.write(bytes(count * BLOCK))


def cached(rig: CoreRig, count: int = 8) -> Vol:
    """A volume whose first blocks are in the cache, and in memory only as far as it knows."""
    vol = rig.vol()
    vol.base = {block: pattern(block, BLOCK) for block in range(count)}
    check_blocks(vol)
    assert rig.engine.stats().cache_used == count
    return vol


def check_blocks(vol: Vol) -> None:
    for block, data in vol.base.items():
        assert vol.core.pread(block * BLOCK, BLOCK) == data
        assert vol.core.pread(block * BLOCK + 512, 6 * SECTOR) == data[512 : 512 + 6 * SECTOR]


def test_lost_slots_are_fetched_again(rig: CoreRig) -> None:
    vol = cached(rig)
    lose_slots(rig, 0, 4)
    began = time.monotonic()
    check_blocks(vol)
    stats = rig.engine.stats()
    took = time.monotonic() - began
    assert stats.cache_lost == 8, "where one is lost any may be"
    assert stats.cache_errno == errno.EIO
    assert stats.cache_used == 0 or took > SICK
    check_blocks(vol)  # served without the cache


def test_a_failed_sync_drops_what_it_covered(rig: CoreRig) -> None:
    vol = cached(rig, 4)
    assert rig.engine.cache.sync() == 0
    for block in range(4, 8):
        vol.base[block] = pattern(block, BLOCK)
    check_blocks(vol)
    inject(CACHE_SYNC, errno.ENOSPC)
    assert rig.engine.cache.sync() == errno.ENOSPC
    assert rig.engine.stats().cache_used == 4
    lose_slots(rig, 4, 4)
    check_blocks(vol)


@pytest.mark.parametrize("synced", [False, True])
def test_a_read_of_the_cache_that_fails_asks_the_store(rig: CoreRig, synced: bool) -> None:
    vol = cached(rig)
    if synced:
        assert rig.engine.cache.sync() == 0
    inject(CACHE_READ, errno.EIO, count=FOREVER)
    check_blocks(vol)
    inject(CACHE_READ, 0, count=0)
    check_blocks(vol)


def test_a_dead_cache_disk_is_read_through_and_comes_back(rig: CoreRig) -> None:
    inject(CACHE_WRITE, errno.EIO, count=FOREVER)
    vol = rig.vol()
    vol.base = {block: pattern(block, BLOCK) for block in range(8)}
    vol.core.pwrite(SECTOR, pattern(99, SECTOR))  # newer than what is lent
    vol.base[0] = vol.base[0][:SECTOR] + pattern(99, SECTOR) + vol.base[0][2 * SECTOR :]
    check_blocks(vol)
    assert rig.engine.stats().cache_used == 0
    assert rig.engine.stats().cache_errno == errno.EIO
    inject(CACHE_WRITE, 0, count=0)

    def back() -> bool:
        check_blocks(vol)
        return rig.engine.cache.sync() == 0

    wait_for(back, "the cache is used again")
    check_blocks(vol)
    assert rig.engine.stats().cache_used == 8


def test_a_cache_disk_that_works_again_is_noticed_without_traffic(rig: CoreRig) -> None:
    cached(rig)
    inject(CACHE_SYNC, errno.EIO)
    assert rig.engine.cache.sync() == errno.EIO
    inject(CACHE_WRITE, errno.EIO)
    assert rig.engine.cache.sync() == errno.EIO
    assert rig.engine.cache.sync() == 0
    assert rig.engine.stats().cache_errno == 0


def test_data_that_is_lent_is_not_kept(rig: CoreRig) -> None:
    vol = rig.vol()
    vol.base = {0: pattern(1, BLOCK)}
    with rig.hold():
        read = Background(lambda: vol.core.pread(0, BLOCK))
        wait_for(lambda: vol.core.info().parked, "a fault")
        stale = vol.core.stamp()
        assert vol.core.fill(stale - 1, [Fill(0, b"k" * 16, b"h" * 16, pattern(7, BLOCK))], through=True) == 1
        assert vol.core.fill(stale, [Fill(5, b"k" * 16, b"h" * 16, pattern(8, BLOCK))], through=True) == 1
    assert read.result() == pattern(1, BLOCK)
    assert vol.core.pread(5 * BLOCK, SECTOR) == bytes(SECTOR)


def test_slots_of_another_process_are_checked_until_they_are_synced(
    make_rig: Callable[..., CoreRig], tmp_path: Path
) -> None:
    before = CoreRig(tmp_path)
    cached(before)
    before.close()
    again = make_rig()
    cache = again.engine.cache
    keys = [blake3(pattern(block, BLOCK)).digest(16) for block in range(8)]
    slots = [slot for slot in cache.lookup(keys) if slot is not None]
    assert len(slots) == 8
    assert not any(slot.verified for slot in slots)
    vol = again.vol()
    for block, slot in enumerate(slots):
        cache.mark_verified(slot, cache.read(slot))
        vol.core.install(vol.core.stamp(), [install_slot(block, slot)])
    vol.base = {block: pattern(block, BLOCK) for block in range(8)}
    lose_slots(again, 2, 2)
    check_blocks(vol)
    assert again.engine.stats().cache_lost == 8


# -- what a log is charged -------------------------------------------------------------------------


def used(vol: Vol) -> int:
    return sum(path.stat().st_blocks * 512 for path in vol.dir.iterdir())


def test_a_recycled_segment_is_charged_for_all_that_it_holds(make_rig: Callable[..., CoreRig]) -> None:
    rig = make_rig(segment_bytes=MIB, log_limit=64 * MIB)
    vol = rig.vol()
    for i in range(8):
        vol.core.pwrite(i * MIB, pattern(i, MIB * 3 // 4))  # just enough to be kept
        vol.core.seal()
    vol.commit()
    assert len(list(vol.dir.glob("*.spare"))) == 8
    for i in range(8):
        vol.core.pwrite(i * MIB, pattern(9 + i, MIB))
    charged = rig.engine.stats().log_bytes
    assert used(vol) * 0.95 <= charged <= used(vol) * 1.05
    vol.commit()
    for i in range(8):
        vol.core.pwrite(i * MIB, pattern(17 + i, SECTOR))
        vol.core.seal()
    charged = rig.engine.stats().log_bytes
    assert used(vol) * 0.95 <= charged <= used(vol) * 1.05, "what is written is less than what the files hold"
