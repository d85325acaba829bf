"""Shadow verify in the core: what is compared, what is left out, and what is said of a difference."""

from __future__ import annotations

import os
import random
import tempfile
import threading
from collections.abc import Iterator
from functools import partial

import pytest
from core_rig import BLOCK, MIB, SECTOR, SECTORS, Background, CoreRig, Vol, pattern
from shadow_rig import Shadows
from waiting import wait_for

from glidefs.core.gather import LogRecord, log_record
from glidefs.core.handoff import freeze, unfreeze
from glidefs.core.shadow import Source
from glidefs.core.testing import forget_sector


@pytest.fixture
def shadows(rig: CoreRig) -> Iterator[Shadows]:
    shadows = Shadows(rig)
    yield shadows
    shadows.close()


def figures(vol: Vol) -> tuple[int, int, int, int]:
    """Sectors compared, that differ, changed, absent."""
    stats = vol.core.stats()
    return (
        stats.shadow_compared,
        stats.shadow_differences,
        stats.shadow_changed,
        stats.shadow_absent,
    )


def flip(path: os.PathLike[str], offset: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))


def test_without_it_nothing_is_counted(rig: CoreRig) -> None:
    vol = rig.vol()
    vol.core.pwrite(0, pattern(1, BLOCK))
    assert vol.core.pread(0, BLOCK) == pattern(1, BLOCK)
    assert figures(vol) == (0, 0, 0, 0)
    assert rig.engine.shadow_next(0) is None


def test_log_zeros_and_base_are_compared(shadows: Shadows) -> None:
    vol = shadows.vol(base={0: pattern(7, BLOCK), 2: pattern(8, BLOCK)})
    vol.core.pwrite(SECTOR, pattern(1, SECTOR))
    vol.core.zero(3 * SECTOR, 2 * SECTOR)
    vol.core.pwrite(2 * BLOCK + 512, b"u" * 1024)
    vol.core.zero(5 * BLOCK, 40 * BLOCK)
    want = bytearray(pattern(7, BLOCK) + bytes(BLOCK) + pattern(8, BLOCK))
    want[SECTOR : 2 * SECTOR] = pattern(1, SECTOR)
    want[3 * SECTOR : 5 * SECTOR] = bytes(2 * SECTOR)
    want[2 * BLOCK + 512 : 2 * BLOCK + 1536] = b"u" * 1024
    assert vol.core.pread(0, 3 * BLOCK) == want
    assert vol.core.pread(44 * BLOCK, 2 * BLOCK) == bytes(2 * BLOCK)
    assert vol.core.pread(512, 2 * SECTOR) == want[512 : 512 + 2 * SECTOR]
    compared, *rest = figures(vol)
    assert (compared, rest) == (1 + 5 * SECTORS + 3, [0, 0, 0])  # the first is the unaligned write's own read
    blocks = [block for fill in shadows.fills for block in range(fill.block, fill.block + fill.count)]
    assert sorted(blocks) == [0, 1, 2, 45]  # each asked for once, none of what the log zeroed


def test_a_read_waits_for_the_second_source_and_sees_no_change_of_it(shadows: Shadows) -> None:
    vol = shadows.vol(base={0: pattern(7, BLOCK)})
    shadows.go.clear()
    first = Background(lambda: vol.core.pread(0, BLOCK))
    second = Background(lambda: vol.core.pread(0, 2 * SECTOR))
    wait_for(lambda: shadows.fills, "asked")
    wait_for(lambda: vol.core.stats().cache_reads >= 2, "read")
    assert not first.done
    assert not second.done
    vol.core.pwrite(SECTOR, pattern(1, SECTOR))
    shadows.go.set()
    assert first.result() == pattern(7, BLOCK)
    assert second.result() == pattern(7, 2 * SECTOR)
    assert figures(vol) == (SECTORS - 1 + 1, 0, 2, 0)
    assert len(shadows.fills) == 1
    assert vol.core.pread(0, BLOCK)[SECTOR : 2 * SECTOR] == pattern(1, SECTOR)
    assert figures(vol)[1] == 0


def test_what_the_store_does_not_give_is_not_compared(shadows: Shadows) -> None:
    vol = shadows.vol(base={0: pattern(7, BLOCK)})
    vol.core.pwrite(0, pattern(1, SECTOR))
    shadows.absent = True
    read = Background(lambda: vol.core.pread(0, BLOCK))
    assert read.result(15)[SECTOR:] == pattern(7, BLOCK)[SECTOR:]
    assert figures(vol) == (1, 0, 0, SECTORS - 1)
    # An unaligned write over such a sector makes all of it known.
    vol.core.pwrite(5 * SECTOR + 512, b"u" * 512)
    assert vol.core.pread(5 * SECTOR, SECTOR)[512:1024] == b"u" * 512
    assert figures(vol)[:2] == (2, 0)
    shadows.absent = False
    assert vol.core.pread(0, BLOCK)[6 * SECTOR :] == pattern(7, BLOCK)[6 * SECTOR :]
    assert figures(vol)[:2] == (2 + SECTORS, 0)


def test_a_close_lets_reads_go_that_wait(shadows: Shadows) -> None:
    vol = shadows.vol(base={0: pattern(7, BLOCK)})
    shadows.go.clear()
    read = Background(lambda: vol.core.pread(0, BLOCK))
    wait_for(lambda: shadows.fills, "asked")
    Background(vol.close).result(15)  # it does not wait until patience ends
    assert read.result() == pattern(7, BLOCK)


def test_a_freeze_lets_reads_go_that_wait(shadows: Shadows) -> None:
    """Those of an unaligned write too: it is then in the log before the volume stands still."""
    vol = shadows.vol(base={0: pattern(7, BLOCK), 1: pattern(8, BLOCK)})
    shadows.go.clear()
    read = Background(lambda: vol.core.pread(0, BLOCK))
    write = Background(lambda: vol.core.pwrite(BLOCK + 512, b"u" * 512))
    wait_for(lambda: vol.core.stats().cache_reads == 2 and shadows.fills, "both are read")
    assert Background(lambda: freeze(vol.core)).result(15).last_end == 1
    assert read.result(15) == pattern(7, BLOCK)
    write.result(15)
    assert figures(vol) == (0, 0, 0, SECTORS + 1)
    shadows.go.set()
    unfreeze(vol.core)
    assert vol.core.pread(BLOCK, 1024) == pattern(8, 512) + b"u" * 512
    assert vol.core.pread(0, BLOCK) == pattern(7, BLOCK)
    assert figures(vol)[1] == 0


def test_what_the_log_holds_at_open_is_known(shadows: Shadows) -> None:
    vol = shadows.rig.vol()
    vol.base = {0: pattern(7, BLOCK)}
    vol.core.pwrite(0, pattern(1, 2 * SECTOR))
    vol.core.zero(BLOCK, 2 * BLOCK)
    vol.close()
    with tempfile.TemporaryFile(dir=shadows.rig.tmp) as file:
        file.write(pattern(1, 2 * SECTOR))
        file.flush()
        shadows.open(vol, file, [(0, 2), (SECTORS, 2 * SECTORS)])
    assert vol.core.pread(0, 2 * SECTOR) == pattern(1, 2 * SECTOR)
    assert vol.core.pread(BLOCK, 2 * BLOCK) == bytes(2 * BLOCK)
    assert figures(vol) == (2 + 2 * SECTORS, 0, 0, 0)
    assert shadows.fills == []


def test_a_difference_from_the_log_is_found_and_named(shadows: Shadows) -> None:
    vol = shadows.vol()
    vol.core.pwrite(0, pattern(1, 4 * SECTOR))
    vol.core.pwrite(7 * SECTOR, pattern(2, 3 * SECTOR))
    flip(shadows.path(vol), 8 * SECTOR + 99)
    flip(shadows.path(vol), 9 * SECTOR + 3)
    vol.core.pread(0, 7 * SECTOR)
    assert figures(vol)[1] == 0
    vol.core.pread(0, 16 * SECTOR)
    assert figures(vol)[1] == 2
    wait_for(lambda: shadows.differences, "told")
    (found,) = shadows.differences
    assert (found.source, found.segment, found.index) == (Source.LOG, 1, 5)
    assert (found.sector, found.count, found.offset) == (8, 2, 8 * SECTOR + 99)
    assert found.got == pattern(2, 2 * SECTOR)[SECTOR + 99 :][:16]
    assert [a ^ b for a, b in zip(found.got, found.want, strict=True)] == [0x10] + 15 * [0]
    look = partial(log_record, vol.dir, b"v" * 16, b"l" * 16)
    assert look(1, 5) == LogRecord(7, 3, 4, False, True)
    segment = vol.segments()[0]
    flip(segment.path, segment.data_at(5) + 99)
    assert look(1, 5) == LogRecord(7, 3, 4, False, False)
    assert look(1, 3) == LogRecord(0, 4, 0, False, True)
    assert look(1, 9) is None
    assert look(9, 0) is None


def test_a_difference_from_the_block_cache_is_found_and_named(shadows: Shadows) -> None:
    vol = shadows.vol(base={3: pattern(7, BLOCK)})
    assert vol.core.pread(3 * BLOCK, BLOCK) == pattern(7, BLOCK)
    path = shadows.rig.tmp / "blocks" / "blocks.data"
    slot = path.read_bytes().index(pattern(7, BLOCK)) // BLOCK
    flip(shadows.path(vol), 3 * BLOCK + 2 * SECTOR + 7)
    vol.core.pread(3 * BLOCK, 2 * SECTOR)
    assert figures(vol)[1] == 0
    vol.core.pread(3 * BLOCK + 2 * SECTOR, 512)
    wait_for(lambda: shadows.differences, "told")
    (found,) = shadows.differences
    assert (found.source, found.slot, found.offset) == (Source.CACHE, slot, 3 * BLOCK + 2 * SECTOR + 7)
    assert len(found.key) == len(found.hash) == 16
    vol.core.pread(3 * BLOCK + 2 * SECTOR + 512, 512)  # the rest of the sector is right
    assert figures(vol)[1] == 1


def test_a_position_that_the_log_map_lost_is_found(shadows: Shadows) -> None:
    vol = shadows.vol(base={0: pattern(7, BLOCK)})
    vol.core.pwrite(SECTOR, pattern(1, SECTOR))
    vol.core.zero(9 * BLOCK, BLOCK)
    vol.core.pwrite(9 * BLOCK, pattern(2, SECTOR))
    for sector in (1, 9 * SECTORS):
        forget_sector(vol.core, sector)
    vol.core.pread(0, BLOCK)
    vol.core.pread(9 * BLOCK, BLOCK)
    wait_for(lambda: len(shadows.differences) == 2, "told")
    first, second = shadows.differences
    assert (first.source, first.sector, first.got) == (Source.CACHE, 1, pattern(7, BLOCK)[SECTOR:][:16])
    assert (second.source, second.sector, second.got) == (Source.LOG_ZERO, 9 * SECTORS, bytes(16))


def test_an_unaligned_write_takes_no_wrong_bytes_over(shadows: Shadows) -> None:
    """What it merges with may be wrong: the second source takes only what the guest sent."""
    vol = shadows.vol()
    vol.core.pwrite(0, pattern(1, 2 * SECTOR))
    flip(shadows.path(vol), 5)
    flip(shadows.path(vol), 2 * SECTOR - 5)
    vol.core.pwrite(512, b"u" * (2 * SECTOR - 1024))
    wait_for(lambda: len(shadows.differences) == 2, "its own reads were compared")
    vol.core.pread(0, 2 * SECTOR)
    wait_for(lambda: len(shadows.differences) == 3, "told")
    places = [(d.offset, d.index, d.count) for d in shadows.differences]
    assert places == [(5, 0, 1), (2 * SECTOR - 5, 1, 1), (5, 2, 2)]
    assert vol.core.stats().shadow_differences == 4


def test_when_its_file_fails_the_volume_goes_on_without(shadows: Shadows) -> None:
    vol = shadows.rig.vol()
    vol.close()
    vol.base = {0: pattern(7, BLOCK)}
    path = shadows.rig.tmp / "read-only"
    path.touch()
    with path.open("rb") as file:
        shadows.open(vol, file)
    shadows.go.clear()
    waiting = Background(lambda: vol.core.pread(0, BLOCK))
    wait_for(lambda: shadows.fills, "asked")
    vol.core.pwrite(BLOCK, pattern(1, BLOCK))
    assert waiting.result() == pattern(7, BLOCK)
    shadows.go.set()
    wait_for(lambda: shadows.ended, "told")
    assert vol.core.pread(BLOCK, BLOCK) == pattern(1, BLOCK)
    assert figures(vol) == (0, 0, 0, 0)
    assert len(shadows.ended) == 1


def test_resizes(shadows: Shadows) -> None:
    """What a shrink cuts off is zeros from then on; what a grow adds is what log and store have of it."""
    vol = shadows.vol(40 * MIB, base={b: pattern(7, BLOCK) for b in range(8)})
    assert vol.core.pread(7 * BLOCK, SECTOR) == pattern(7, SECTOR)
    vol.core.resize(2 * BLOCK + SECTOR)
    vol.core.resize(6 << 30)
    asked = len(shadows.fills)
    assert vol.core.pread(2 * BLOCK + SECTOR, 8 * BLOCK) == bytes(8 * BLOCK)
    assert len(shadows.fills) == asked
    assert vol.core.pread((6 << 30) - 2 * BLOCK, BLOCK) == bytes(BLOCK)
    assert [(fill.block, fill.count) for fill in shadows.fills[asked:]] == [(6 * 8192 - 2, 1)]
    vol.core.pwrite((6 << 30) - BLOCK, pattern(1, BLOCK))
    assert vol.core.pread((6 << 30) - BLOCK, BLOCK) == pattern(1, BLOCK)
    assert figures(vol) == (1 + 10 * SECTORS, 0, 0, 0)


def test_the_log_may_hold_what_is_beyond_the_end(shadows: Shadows) -> None:
    """A volume that grew and was written to, and a crash before anything else had its size."""
    vol = shadows.rig.vol(BLOCK)
    vol.core.resize(4 * BLOCK)
    vol.core.pwrite(2 * BLOCK, pattern(1, BLOCK))
    vol.close()
    with tempfile.TemporaryFile(dir=shadows.rig.tmp) as file:
        file.seek(2 * BLOCK)
        file.write(pattern(1, BLOCK))
        file.flush()
        shadows.open(vol, file, [(2 * SECTORS, SECTORS)])
    vol.core.resize(4 * BLOCK)
    assert vol.core.pread(0, 4 * BLOCK) == bytes(2 * BLOCK) + pattern(1, BLOCK) + bytes(BLOCK)
    assert figures(vol) == (4 * SECTORS, 0, 0, 0)


def test_many_differences_are_counted_and_some_described(shadows: Shadows) -> None:
    vol = shadows.vol()
    for i in range(48):
        vol.core.pwrite(i * SECTOR, pattern(i, SECTOR))
    for i in range(48):
        flip(shadows.path(vol), i * SECTOR)
    for i in range(48):
        vol.core.pread(i * SECTOR, SECTOR)
    assert figures(vol)[1] == 48
    wait_for(lambda: len(shadows.differences) == 32, "told")
    assert shadows.rig.engine.shadow_next(50) is None


def test_no_false_alarm_under_concurrent_load(make_rig, tmp_path) -> None:  # type: ignore[no-untyped-def]
    """Readers and writers over the same blocks, commits, retires, evictions and resizes."""
    rig = make_rig(cache_bytes=24 * BLOCK, log_limit=4 * MIB)  # two fault threads pin up to 8 each
    shadows = Shadows(rig)
    size = 24 * BLOCK
    vol = shadows.vol(size, base={b: pattern(b, BLOCK) for b in range(0, 24, 2)})
    stopping, stop = threading.Event(), threading.Event()

    def client(seed: int) -> None:
        rng = random.Random(seed)
        while not stopping.is_set():
            unit = 512 if rng.random() < 0.4 else SECTOR
            at = rng.randrange(0, 20 * BLOCK, unit)
            length = min(rng.randrange(unit, 2 * BLOCK, unit), 20 * BLOCK - at)
            what = rng.random()
            if what < 0.5:
                vol.core.pread(at, length)
            elif what < 0.85:
                vol.core.pwrite(at, rng.randbytes(length), fua=rng.random() < 0.2)
            elif what < 0.95:
                vol.core.zero(at, length)
            else:
                vol.core.flush()

    def store() -> None:
        rng = random.Random(99)
        while not stop.is_set():
            vol.commit(retire=rng.random() < 0.7)
            rig.engine.cache.evict_all()

    def resize() -> None:
        rng = random.Random(98)
        while not stopping.wait(0.01):
            vol.core.resize(rng.choice([size, 22 * BLOCK, 21 * BLOCK]))  # may wait for the store

    clients = [Background(lambda seed=seed: client(seed)) for seed in range(4)] + [Background(resize)]
    uploads = Background(store)
    wait_for(lambda: figures(vol)[0] > 20000 or any(thread.done for thread in clients), "compared", 60)
    stopping.set()
    for thread in clients:
        thread.result()
    stop.set()
    uploads.result()
    compared, differences, changed, absent = figures(vol)
    assert (differences, absent) == (0, 0), shadows.differences
    assert compared > 2 * changed
    vol.core.pread(0, 20 * BLOCK)
    assert figures(vol)[1] == 0
    shadows.close()
