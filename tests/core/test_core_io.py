"""Reads, writes, zeroes and flushes, aligned or not, over a base."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Callable

import pytest
from core_rig import BLOCK, MIB, SECTOR, Background, CoreRig, pattern
from waiting import wait_for

from glidefs.core.check import Closed, CoreError


def test_what_was_written_is_read(rig: CoreRig) -> None:
    vol = rig.vol()
    assert vol.core.pread(0, BLOCK) == bytes(BLOCK)
    vol.core.pwrite(0, pattern(1, 3 * SECTOR))
    vol.core.pwrite(5 * BLOCK - SECTOR, pattern(2, 2 * SECTOR), fua=True)
    vol.core.zero(SECTOR, SECTOR)
    vol.core.flush()
    assert (
        vol.core.pread(0, 3 * SECTOR) == pattern(1, SECTOR) + bytes(SECTOR) + pattern(1, 3 * SECTOR)[-SECTOR:]
    )
    assert vol.core.pread(5 * BLOCK - SECTOR, 2 * SECTOR) == pattern(2, 2 * SECTOR)


def test_reads_overlay_the_log_over_the_base(rig: CoreRig) -> None:
    vol = rig.vol()
    vol.base = {0: pattern(7, BLOCK), 2: pattern(8, BLOCK)}
    want = bytearray(pattern(7, BLOCK) + bytes(BLOCK) + pattern(8, BLOCK))
    vol.core.pwrite(SECTOR, b"a" * SECTOR)
    want[SECTOR : 2 * SECTOR] = b"a" * SECTOR
    vol.core.zero(2 * BLOCK + 3 * SECTOR, 5 * SECTOR)
    want[2 * BLOCK + 3 * SECTOR : 2 * BLOCK + 8 * SECTOR] = bytes(5 * SECTOR)
    assert vol.core.pread(0, 3 * BLOCK) == want
    assert vol.core.pread(512, SECTOR) == want[512 : 512 + SECTOR]


def test_a_write_to_a_cold_block_needs_no_base(rig: CoreRig) -> None:
    vol = rig.vol()
    vol.base = {0: pattern(7, BLOCK)}
    with rig.hold():
        vol.core.pwrite(SECTOR, b"a" * SECTOR)
        assert vol.core.pread(SECTOR, SECTOR) == b"a" * SECTOR
        vol.core.flush()


def test_large_requests_go_over_many_segments(rig: CoreRig) -> None:
    vol = rig.vol()
    data = pattern(3, 8 * MIB)
    vol.core.pwrite(MIB, data)
    assert vol.core.pread(MIB, 8 * MIB) == data
    vol.core.zero(2 * MIB, 4 * MIB)
    assert vol.core.pread(MIB, 8 * MIB) == data[:MIB] + bytes(4 * MIB) + data[5 * MIB :]
    assert vol.core.info().last_seq > 100


@pytest.mark.parametrize(
    ("first", "count"),
    [(0, 1), (63, 2), (64, 64), (65, 62), (1, 127), (63, 66), (100, 156), (0, 256), (192, 64), (255, 1)],
)
def test_a_discard_forgets_the_log_of_its_blocks_and_no_others(rig: CoreRig, first: int, count: int) -> None:
    """Most of the first 256 blocks of 2,048 are in the log, one sector of each."""
    vol = rig.vol(2048 * BLOCK)
    written = [block for block in range(256) if block % 5 != 2]
    for block in written:
        vol.core.pwrite(block * BLOCK + 7 * SECTOR, block.to_bytes(2, "little") * 2048)
    before = vol.core.info().map_bytes
    vol.core.zero(first * BLOCK, count * BLOCK)
    gone = sum(first <= block < first + count for block in written)
    assert vol.core.info().map_bytes < before - 256 * gone + 128
    for block in range(256):
        mark = 0 if first <= block < first + count or block not in written else block
        assert vol.core.pread(block * BLOCK + 7 * SECTOR, SECTOR) == mark.to_bytes(2, "little") * 2048, block
    vol.core.zero(0, 2048 * BLOCK)
    assert vol.core.pread(0, 256 * BLOCK) == bytes(256 * BLOCK)
    assert vol.core.info().map_bytes < 16 << 10


def test_a_record_holds_at_most_4_mib(make_rig: Callable[..., CoreRig]) -> None:
    rig = make_rig(segment_bytes=16 * MIB)
    vol = rig.vol()
    data = pattern(3, 9 * MIB + SECTOR)
    vol.core.pwrite(SECTOR, data)
    vol.reopen(always_verify=True)
    assert vol.recovery.records == 3
    assert vol.core.pread(SECTOR, len(data)) == data


@pytest.mark.parametrize(("offset", "length"), [(512, 512), (4096 - 512, 1024), (512, 3 * SECTOR), (0, 512)])
@pytest.mark.parametrize("under", ["base", "log", "zero", "nothing"])
def test_unaligned_writes_keep_their_neighbours(rig: CoreRig, offset: int, length: int, under: str) -> None:
    vol = rig.vol()
    want = bytearray(BLOCK)
    if under == "base":
        want[:] = pattern(5, BLOCK)
        vol.base = {0: bytes(want)}
    elif under == "log":
        want[:] = pattern(6, BLOCK)
        vol.core.pwrite(0, want)
    elif under == "zero":
        vol.base = {0: pattern(5, BLOCK)}
        vol.core.zero(0, BLOCK)
    vol.core.pwrite(offset, b"x" * length)
    want[offset : offset + length] = b"x" * length
    assert vol.core.pread(0, BLOCK) == want
    vol.core.zero(offset + 512, 2 * SECTOR)
    want[offset + 512 : offset + 512 + 2 * SECTOR] = bytes(2 * SECTOR)
    assert vol.core.pread(0, BLOCK) == want
    vol.commit()
    assert vol.core.pread(0, BLOCK) == want


def test_bounds(rig: CoreRig) -> None:
    vol = rig.vol(MIB)
    for call, want in [
        (lambda: vol.core.pread(MIB, 512), errno.EINVAL),
        (lambda: vol.core.pread(100, 512), errno.EINVAL),
        (lambda: vol.core.pwrite(MIB - 512, bytes(1024)), errno.ENOSPC),
        (lambda: vol.core.zero(MIB, SECTOR), errno.ENOSPC),
        (lambda: vol.core.pwrite(1 << 63, bytes(512)), errno.ENOSPC),
        (lambda: vol.core.zero((1 << 64) - 512, 1024), errno.ENOSPC),
    ]:
        with pytest.raises(CoreError) as caught:
            call()
        assert caught.value.errno == want
    vol.core.zero(0, 0)
    vol.core.pwrite(MIB, b"")
    vol.core.flush()
    vol.core.pwrite(MIB - 512, b"e" * 512)
    assert vol.core.pread(MIB - 512, 512) == b"e" * 512


def test_read_only(rig: CoreRig) -> None:
    vol = rig.vol(MIB, read_only=True)
    vol.base = {1: pattern(1, BLOCK)}
    assert vol.core.pread(BLOCK, BLOCK) == pattern(1, BLOCK)
    for call in (lambda: vol.core.pwrite(0, bytes(512)), lambda: vol.core.zero(0, SECTOR)):
        with pytest.raises(CoreError) as caught:
            call()
        assert caught.value.errno == errno.EPERM
    vol.core.flush()
    assert not vol.dir.exists()


def small_writers(vol, threads: int, rounds: int) -> list[Background]:  # type: ignore[no-untyped-def]
    """Each thread owns 512 bytes of the same sectors and counts there."""

    def run(k: int) -> None:
        for i in range(1, rounds + 1):
            vol.core.pwrite(k * 512, bytes([i]) * 512)

    return [Background(lambda k=k: run(k)) for k in range(threads)]


def test_concurrent_small_writes_never_lose_bytes(rig: CoreRig) -> None:
    vol = rig.vol()
    vol.base = {0: pattern(1, BLOCK)}
    writers = small_writers(vol, 12, 60)
    while not all(writer.done for writer in writers):
        vol.commit()  # the base and the log change below them
        rig.engine.cache.evict_all()
    for writer in writers:
        writer.result()
    assert vol.core.pread(0, 12 * 512) == bytes([60]) * 12 * 512
    assert vol.core.pread(12 * 512, BLOCK - 12 * 512) == pattern(1, BLOCK)[12 * 512 :]


def fill(vol, start: int = BLOCK) -> Background:  # type: ignore[no-untyped-def]
    """Write until the log is full; the last write waits."""

    def run() -> None:
        at = start
        while not stop.is_set():
            vol.core.pwrite(at, bytes([at >> 17 & 255]) * BLOCK)
            at += BLOCK

    stop = threading.Event()
    background = Background(run)
    background.stop = stop  # type: ignore[attr-defined]
    wait_for(lambda: vol.core.stats().log_full_waits and vol.core.info().parked, "a writer that waits")
    stop.set()
    return background


def test_concurrent_small_writes_that_waited_for_space(make_rig: Callable[..., CoreRig]) -> None:
    rig = make_rig(log_limit=40 * 16 * SECTOR)
    vol = rig.vol()
    vol.base = {0: pattern(1, BLOCK)}
    filler = fill(vol)
    writers = small_writers(vol, 12, 1)
    wait_for(lambda: vol.core.info().parked >= 13, "writers that wait")
    vol.commit()
    for writer in [*writers, filler]:
        writer.result()
    assert vol.core.pread(0, 12 * 512) == bytes([1]) * 12 * 512
    assert vol.core.pread(12 * 512, BLOCK - 12 * 512) == pattern(1, BLOCK)[12 * 512 :]


def test_an_unaligned_write_that_waits_for_its_base_blocks_nobody(rig: CoreRig) -> None:
    """! A parked request holds no reservation, and does not bring back what it read before."""
    vol = rig.vol()
    vol.base = {0: pattern(1, BLOCK)}
    with rig.hold():
        small = Background(lambda: vol.core.pwrite(512, b"s" * 512))
        wait_for(lambda: vol.core.info().parked, "a fault")
        vol.core.pwrite(0, b"n" * SECTOR)
        vol.core.zero(SECTOR, SECTOR)
        assert vol.core.pread(0, SECTOR) == b"n" * SECTOR
        assert not small.done
    small.result()
    assert vol.core.pread(0, SECTOR) == b"n" * 512 + b"s" * 512 + b"n" * (SECTOR - 1024)


def test_an_unaligned_write_reads_again_what_changed_meanwhile(rig: CoreRig) -> None:
    """! One of its two sectors it read at once; while the other came from the store, it was written."""
    vol = rig.vol()
    vol.base = {0: pattern(1, BLOCK), 1: pattern(2, BLOCK)}
    assert vol.core.pread(0, BLOCK) == pattern(1, BLOCK)
    with rig.hold():
        small = Background(lambda: vol.core.pwrite(BLOCK - 512, b"s" * 1024))
        wait_for(lambda: vol.core.info().parked, "a fault")
        vol.core.pwrite(BLOCK - SECTOR, b"n" * SECTOR)
        assert not small.done
    small.result()
    want = b"n" * (SECTOR - 512) + b"s" * 1024 + pattern(2, BLOCK)[512:SECTOR]
    assert vol.core.pread(BLOCK - SECTOR, 2 * SECTOR) == want


def test_a_read_keeps_what_it_copied_while_another_block_faults(rig: CoreRig) -> None:
    vol = rig.vol()
    vol.base = {1: pattern(2, BLOCK)}
    vol.core.pwrite(0, b"1" * BLOCK)
    with rig.hold():
        read = Background(lambda: vol.core.pread(0, 2 * BLOCK))
        wait_for(lambda: vol.core.info().parked, "a fault")
        vol.core.pwrite(0, b"2" * BLOCK)
        vol.commit(retire=False)
    got = read.result()
    assert got[:BLOCK] == b"1" * BLOCK
    assert got[BLOCK:] == pattern(2, BLOCK)


def test_many_waiters_of_one_block_share_a_fault(rig: CoreRig) -> None:
    vol = rig.vol()
    vol.base = {3: pattern(2, BLOCK)}
    with rig.hold():
        reads = [Background(lambda: vol.core.pread(3 * BLOCK, BLOCK)) for _ in range(6)]
        wait_for(lambda: vol.core.info().parked == 6, "six waiters")
    assert {read.result() for read in reads} == {pattern(2, BLOCK)}
    assert vol.core.stats().faults == 1


def test_neighbouring_faults_come_as_one_run(make_rig: Callable[..., CoreRig]) -> None:
    rig = make_rig(fault_threads=0)
    vol = rig.vol()
    read = Background(lambda: vol.core.pread(0, 6 * BLOCK))
    wait_for(lambda: vol.core.info().parked == 6, "six pieces")
    fault = rig.engine.faults_next(4, 1000)
    assert fault is not None
    assert (fault.block, fault.count) == (0, 4)
    vol.core.install(fault.stamp, vol.answers(fault))
    fault = rig.engine.faults_next(4, 1000)
    assert fault is not None
    assert (fault.block, fault.count) == (4, 2)
    vol.core.install(fault.stamp, vol.answers(fault))
    assert read.result() == bytes(6 * BLOCK)


def test_errors_of_the_base_fail_the_read_only(rig: CoreRig) -> None:
    vol = rig.vol()
    vol.fault_errno = errno.EIO
    with pytest.raises(CoreError) as caught:
        vol.core.pread(0, BLOCK)
    assert caught.value.errno == errno.EIO
    with pytest.raises(CoreError):
        vol.core.pwrite(512, b"x" * 512)
    vol.core.pwrite(0, b"x" * SECTOR)
    vol.fault_errno = 0
    assert vol.core.pread(0, BLOCK) == b"x" * SECTOR + bytes(BLOCK - SECTOR)


def test_read_timeout(make_rig: Callable[..., CoreRig]) -> None:
    rig = make_rig(read_timeout_ms=300)
    vol = rig.vol()
    with rig.hold():
        with pytest.raises(CoreError) as caught:
            vol.core.pread(0, SECTOR)
        assert caught.value.errno == errno.EIO
        vol.core.pwrite(0, b"x" * SECTOR)  # writes need no store
    assert vol.core.pread(0, SECTOR) == b"x" * SECTOR


def test_against_a_byte_array(rig: CoreRig) -> None:
    vol = rig.vol(3 * MIB)
    rng = random.Random(7)
    model = bytearray(3 * MIB)
    for step in range(1500):
        offset = rng.randrange(0, 3 * MIB, 512)
        length = min(rng.choice([512, 1024, 4096, 8192, 65536, 262144]), 3 * MIB - offset)
        match rng.randrange(6):
            case 0 | 1 | 2:
                data = os.urandom(16) * (length // 16)
                vol.core.pwrite(offset, data, fua=rng.random() < 0.02)
                model[offset : offset + length] = data
            case 3:
                vol.core.zero(offset, length)
                model[offset : offset + length] = bytes(length)
            case _:
                assert vol.core.pread(offset, length) == model[offset : offset + length]
        if step % 97 == 0:
            vol.commit(retire=step % 2 == 0)
        if step % 211 == 0:
            rig.engine.cache.evict_all()
        if step % 301 == 0:
            vol.reopen()
    assert vol.core.pread(0, 3 * MIB) == model


# -- close -----------------------------------------------------------------------------------------


def test_close_fails_what_waits(make_rig: Callable[..., CoreRig]) -> None:
    rig = make_rig(log_limit=40 * 16 * SECTOR, fault_threads=0)
    vol = rig.vol(flush_store=True)
    vol.core.pwrite(0, b"x" * SECTOR)
    waiting = [
        Background(lambda: vol.core.pread(5 * BLOCK, SECTOR)),
        Background(lambda: vol.core.pwrite(6 * BLOCK + 512, b"x" * 512)),
        Background(vol.core.flush),
        fill(vol, 8 * BLOCK),
    ]
    wait_for(lambda: vol.core.info().parked >= 4, "requests that wait")
    vol.close()
    for background in waiting:
        with pytest.raises((CoreError, Closed)):
            background.result()


def test_close_while_an_unaligned_write_comes_back_to_a_full_log(make_rig: Callable[..., CoreRig]) -> None:
    """A write that returns from its read after the close began must not wait for space for ever."""
    rig = make_rig(log_limit=40 * 16 * SECTOR)
    for _ in range(10):
        vol = rig.vol()
        vol.core.pwrite(0, b"x" * SECTOR)
        filler = fill(vol)
        writers = small_writers(vol, 6, 100)
        wait_for(lambda: vol.core.info().parked >= 2, "writers that wait")  # noqa: B023
        closing = Background(vol.close)
        closing.result(10)
        for background in [filler, *writers]:
            with pytest.raises((CoreError, Closed)):
                background.result()


def test_failed_volume_fails_all_io(rig: CoreRig) -> None:
    vol = rig.vol()
    vol.core.pwrite(0, b"x" * SECTOR)
    with rig.hold():
        read = Background(lambda: vol.core.pread(5 * BLOCK, SECTOR))
        wait_for(lambda: vol.core.info().parked, "a fault")
        vol.core.fail(errno.EIO)
        with pytest.raises(CoreError):
            read.result()
    for call in (vol.core.flush, lambda: vol.core.pread(0, 512), lambda: vol.core.pwrite(0, bytes(512))):
        with pytest.raises(CoreError) as caught:
            call()
        assert caught.value.errno == errno.EIO
    vol.reopen()
    assert vol.core.pread(0, SECTOR) == b"x" * SECTOR
