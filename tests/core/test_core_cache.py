"""The block cache and the block map: installs, eviction, restarts."""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from blake3 import blake3
from core_rig import BLOCK, SECTOR, Background, CoreRig, pattern
from waiting import wait_for

from glidefs.core.check import CoreError
from glidefs.core.volume import Fill, install_retry, install_slot, install_zero


def key(data: bytes) -> bytes:
    return blake3(data).digest(16)


def test_an_install_with_a_stale_stamp_does_not_land(make_rig: Callable[..., CoreRig]) -> None:
    """! Install is a compare-and-swap: a resolution against an older manifest looks again."""
    rig = make_rig(fault_threads=0)
    vol = rig.vol()
    vol.base = {0: pattern(1, BLOCK)}
    vol.core.pwrite(0, pattern(2, SECTOR))
    read = Background(lambda: vol.core.pread(0, 2 * SECTOR))
    fault = rig.engine.faults_next(8, 5000)
    assert fault is not None
    stale = vol.answers(fault)  # resolved against the base before the commit ...
    vol.commit()  # ... which retires what the log had over it
    vol.core.install(fault.stamp, stale)
    again = rig.engine.faults_next(8, 5000)
    assert again is not None
    assert again.stamp > fault.stamp
    assert not read.done
    vol.core.install(again.stamp, vol.answers(again))
    assert read.result() == pattern(2, SECTOR) + pattern(1, BLOCK)[SECTOR : 2 * SECTOR]


def test_a_stale_prefetch_does_not_land(rig: CoreRig) -> None:
    vol = rig.vol()
    stamp = vol.core.stamp()
    vol.core.pwrite(0, pattern(2, BLOCK))
    vol.commit()
    vol.core.install(stamp, [install_zero(0, 1024), install_slot(0, rig.insert(bytes(BLOCK)))])
    assert vol.core.pread(0, BLOCK) == pattern(2, BLOCK)


def test_retire_drops_what_the_map_knew_of_the_base(rig: CoreRig) -> None:
    """! The old base must not show when the log forgets what covered it."""
    vol = rig.vol()
    vol.base = {0: pattern(1, BLOCK), 1: pattern(1, BLOCK)}
    assert vol.core.pread(0, 2 * BLOCK) == pattern(1, BLOCK) * 2
    vol.core.pwrite(0, pattern(2, SECTOR))
    vol.core.zero(BLOCK, BLOCK)
    vol.commit()
    assert vol.core.pread(0, 2 * BLOCK) == pattern(2, SECTOR) + pattern(1, BLOCK)[SECTOR:] + bytes(BLOCK)


def test_retire_exposes_no_discarded_sector(rig: CoreRig) -> None:
    """Segment 1 writes, segment 2 discards: retiring the first must not bring the data back."""
    vol = rig.vol()
    vol.core.pwrite(0, pattern(1, BLOCK))
    first = vol.core.seal()
    vol.core.zero(0, BLOCK)
    vol.core.zero(BLOCK + SECTOR, SECTOR)
    vol.core.seal()
    vol.commit(upto=first)
    assert vol.core.pread(0, 2 * BLOCK) == bytes(2 * BLOCK)
    vol.commit()
    assert vol.core.pread(0, 2 * BLOCK) == bytes(2 * BLOCK)


def test_retire_of_an_old_discard_leaves_a_newer_one(rig: CoreRig) -> None:
    vol = rig.vol()
    vol.core.zero(0, BLOCK)
    vol.core.seal()
    vol.core.pwrite(0, pattern(1, BLOCK))
    second = vol.core.seal()
    vol.core.zero(0, BLOCK)
    vol.core.seal()
    vol.commit(upto=second)
    assert vol.base == {0: pattern(1, BLOCK)}
    assert vol.core.pread(0, BLOCK) == bytes(BLOCK)


def test_eviction_while_mapped(make_rig: Callable[..., CoreRig]) -> None:
    """! A slot that was reused fails the generation check: the block faults again."""
    rig = make_rig(cache_bytes=8 * BLOCK)
    vol = rig.vol()
    vol.base = {i: pattern(i, BLOCK) for i in range(40)}
    rng = random.Random(1)
    for i in rng.choices(range(40), k=300):
        assert vol.core.pread(i * BLOCK, SECTOR) == pattern(i, SECTOR)
    stats = rig.engine.stats()
    assert stats.cache_evictions > 100
    assert stats.cache_used <= 8


def test_readers_and_evictions_in_parallel(make_rig: Callable[..., CoreRig]) -> None:
    rig = make_rig(cache_bytes=8 * BLOCK)
    vols = [rig.vol() for _ in range(2)]
    for k, vol in enumerate(vols):
        vol.base = {i: pattern(100 * k + i, BLOCK) for i in range(24)}

    def run(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(150):
            k, i, count = rng.randrange(2), rng.randrange(22), rng.randrange(1, 3)
            got = vols[k].core.pread(i * BLOCK, count * BLOCK)
            assert got == b"".join(pattern(100 * k + i + n, BLOCK) for n in range(count))

    readers = [Background(lambda k=k: run(k)) for k in range(4)]
    while not all(reader.done for reader in readers):
        rig.engine.cache.evict_all()
    for reader in readers:
        reader.result()


def test_equal_blocks_share_a_slot(rig: CoreRig) -> None:
    one, two = rig.vol(), rig.vol()
    one.base = {i: pattern(1, BLOCK) for i in range(4)}
    two.base = {9: pattern(1, BLOCK)}
    one.core.pread(0, 4 * BLOCK)
    two.core.pread(9 * BLOCK, BLOCK)
    assert rig.engine.stats().cache_used == 1


def test_every_slot_pinned(make_rig: Callable[..., CoreRig]) -> None:
    rig = make_rig(cache_bytes=8 * BLOCK)
    cache = rig.engine.cache
    pinned = [rig.insert(pattern(i, BLOCK)) for i in range(8)]
    with pytest.raises(CoreError) as caught:
        cache.insert(key(b"x"), key(b"x"), bytes(BLOCK))
    assert caught.value.temporary
    assert cache.evict_all() == 0
    for i, slot in enumerate(pinned):
        assert cache.read(slot) == pattern(i, BLOCK)
        cache.unpin(slot)
    assert cache.evict_all() == 8


def fills(*seeds: int) -> list[Fill]:
    """Block i is pattern(i)."""
    return [Fill(i, key(pattern(i, BLOCK)), key(pattern(i, BLOCK)), pattern(i, BLOCK)) for i in seeds]


def test_a_fill_caches_and_answers(make_rig: Callable[..., CoreRig]) -> None:
    """More blocks than slots: each answer gives its pin back, so that the next block finds a slot."""
    rig = make_rig(fault_threads=0, cache_bytes=16 * BLOCK)
    vol = rig.vol()
    reads = [Background(lambda i=i: vol.core.pread(i * BLOCK, BLOCK)) for i in range(24)]
    wait_for(lambda: rig.engine.stats().faults_queued == 24, "faults")
    left = fills(*range(24))
    while left:
        with contextlib.suppress(CoreError):  # EAGAIN: the worker has not mapped the last ones yet
            left = left[vol.core.fill(vol.core.stamp(), left) :]
    for i, read in enumerate(reads):
        assert read.result() == pattern(i, BLOCK)
    vol.core.pread(0, 0)
    assert rig.engine.cache.evict_all() == 16, "a pin was left"


def test_a_stale_fill_is_cached_but_not_mapped(make_rig: Callable[..., CoreRig]) -> None:
    """! Install is a compare-and-swap, in this form too."""
    rig = make_rig(fault_threads=0)
    vol = rig.vol()
    stamp = vol.core.stamp()
    vol.core.pwrite(0, pattern(2, BLOCK))
    vol.commit()
    assert vol.core.fill(stamp, fills(0)) == 1
    read = Background(lambda: vol.core.pread(0, BLOCK))
    fault = rig.engine.faults_next(8, 5000)
    assert fault is not None
    assert rig.engine.cache.evict_all() == 1, "the pin of an answer that was not mapped was left"
    vol.core.install(fault.stamp, vol.answers(fault))
    assert read.result() == pattern(2, BLOCK)


def test_a_fill_without_a_slot_says_how_far_it_came(make_rig: Callable[..., CoreRig]) -> None:
    rig = make_rig(fault_threads=0, cache_bytes=8 * BLOCK)
    vol = rig.vol()
    pinned = [rig.insert(pattern(100 + i, BLOCK)) for i in range(8)]
    with pytest.raises(CoreError) as caught:
        vol.core.fill(vol.core.stamp(), fills(0, 1))
    assert caught.value.temporary
    rig.engine.cache.unpin(pinned.pop())
    done = vol.core.fill(vol.core.stamp(), fills(0, 1))
    assert done in (1, 2)  # 2 if block 0 was mapped, and so could be evicted, in between
    assert vol.core.pread((done - 1) * BLOCK, BLOCK) == pattern(done - 1, BLOCK)
    for slot in pinned:
        rig.engine.cache.unpin(slot)
    with pytest.raises(ValueError, match="a block has"):
        vol.core.fill(vol.core.stamp(), [Fill(0, bytes(16), bytes(16), b"short")])


def test_a_dropped_slot_is_gone(rig: CoreRig) -> None:
    cache = rig.engine.cache
    vol = rig.vol()
    vol.base = {0: pattern(1, BLOCK)}
    vol.core.pread(0, BLOCK)
    slot = cache.lookup([key(pattern(1, BLOCK))])[0]
    assert slot is not None
    cache.drop(slot)
    assert cache.lookup([key(pattern(1, BLOCK))])[0] is None
    faults = vol.core.stats().faults
    assert vol.core.pread(0, BLOCK) == pattern(1, BLOCK)
    assert vol.core.stats().faults == faults + 1
    wait_for(lambda: cache.evict_all() == 1, "one slot, which whoever filled it unpins by and by")


def test_retry_answers_look_again(make_rig: Callable[..., CoreRig]) -> None:
    rig = make_rig(fault_threads=0)
    vol = rig.vol()
    read = Background(lambda: vol.core.pread(0, SECTOR))
    for _ in range(3):
        fault = rig.engine.faults_next(8, 5000)
        assert fault is not None
        vol.core.install(fault.stamp, [install_retry(0, 1)])
    fault = rig.engine.faults_next(8, 5000)
    assert fault is not None
    vol.core.pwrite(0, pattern(1, SECTOR))
    vol.core.install(fault.stamp, [install_retry(0, 1)])
    assert read.result() == pattern(1, SECTOR)


# -- restarts --------------------------------------------------------------------------------------


def filled(make_rig: Callable[..., CoreRig]) -> Path:
    rig = make_rig()
    for i in range(20):
        rig.engine.cache.unpin(rig.insert(pattern(i, BLOCK)))
    directory = rig.engine.config.cache_dir
    rig.close()
    rig.close = lambda: None  # type: ignore[method-assign]
    return directory


def found(rig: CoreRig) -> int:
    """How many of the 20 blocks a new process finds; all of them unverified, none with other data
    than its content hash says."""
    cache, hits = rig.engine.cache, 0
    for i in range(20):
        slot = cache.lookup([key(pattern(i, BLOCK))])[0]
        if slot is None:
            continue
        assert not slot.verified
        assert slot.hash == key(pattern(i, BLOCK))
        if cache.read(slot) == pattern(i, BLOCK):
            cache.mark_verified(slot, cache.read(slot))
            cache.unpin(slot)
            hits += 1
        else:
            cache.drop(slot)
    return hits


def test_a_restart_finds_its_blocks_unverified(make_rig: Callable[..., CoreRig]) -> None:
    """! The slot table is a hint: each slot is verified on its first use."""
    filled(make_rig)
    rig = make_rig()
    assert found(rig) == 20
    slot = rig.engine.cache.lookup([key(pattern(3, BLOCK))])[0]
    assert slot is not None
    assert slot.verified
    rig.engine.cache.unpin(slot)


def test_an_insert_replaces_what_is_not_verified(make_rig: Callable[..., CoreRig]) -> None:
    directory = filled(make_rig)
    with (directory / "blocks.data").open("r+b") as file:
        file.write(os.urandom(20 * BLOCK))
    rig = make_rig()
    slot = rig.insert(pattern(3, BLOCK))
    assert slot.verified
    assert rig.engine.cache.read(slot) == pattern(3, BLOCK)


@pytest.mark.parametrize("damage", ["truncated", "empty", "missing", "flipped", "short data", "swapped"])
def test_a_damaged_index_costs_hits_never_data(make_rig: Callable[..., CoreRig], damage: str) -> None:
    directory = filled(make_rig)
    index, data = directory / "blocks.index", directory / "blocks.data"
    raw = bytearray(index.read_bytes())
    rng = random.Random(damage)
    match damage:
        case "truncated":
            index.write_bytes(raw[: len(raw) // 2 + 5])
        case "empty":
            index.write_bytes(b"")
        case "missing":
            index.unlink()
        case "flipped":
            for at in range(0, len(raw), 48):
                raw[at + rng.randrange(48)] ^= 1 << rng.randrange(8)
            index.write_bytes(raw)
        case "short data":
            os.truncate(data, 10 * BLOCK + 1)
        case _:
            raw[0:48], raw[48:96] = raw[48:96], raw[0:48]
            index.write_bytes(raw)
    rig = make_rig()
    if damage == "swapped":
        assert rig.engine.stats().cache_used == 18
    hits = found(rig)
    assert (
        hits
        == {"truncated": 10, "empty": 0, "missing": 0, "flipped": 0, "short data": 10, "swapped": 18}[damage]
    )
    vol = rig.vol()
    vol.base = {i: pattern(i, BLOCK) for i in range(20)}
    for i in range(20):
        assert vol.core.pread(i * BLOCK, BLOCK) == pattern(i, BLOCK)


def test_a_smaller_cache_gives_space_back(make_rig: Callable[..., CoreRig]) -> None:
    directory = filled(make_rig)
    rig = make_rig(cache_bytes=8 * BLOCK)
    assert (directory / "blocks.data").stat().st_size == 8 * BLOCK
    assert rig.engine.stats().cache_used <= 8
    found(rig)


def test_a_full_disk_reuses_slots(make_rig: Callable[..., CoreRig]) -> None:
    import resource
    import signal

    rig = make_rig()
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10 * BLOCK, old[1]))
    try:
        for i in range(24):
            rig.engine.cache.unpin(rig.insert(pattern(i, BLOCK)))
        assert rig.engine.stats().cache_used == 10
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert rig.engine.stats().cache_errno == 0
    assert rig.engine.cache.evict_all() == 10


def test_parallel_inserts_of_one_key(rig: CoreRig) -> None:
    def run() -> None:
        for i in range(60):
            slot = rig.insert(pattern(i, BLOCK))
            assert rig.engine.cache.read(slot) == pattern(i, BLOCK)
            rig.engine.cache.unpin(slot)

    for background in [Background(run) for _ in range(4)]:
        background.result()
    assert rig.engine.stats().cache_used == 60
    assert rig.engine.cache.evict_all() == 60
    wait_for(lambda: rig.engine.stats().cache_used == 0, "empty")


def test_threads_that_wait_are_woken(make_rig: Callable[..., CoreRig]) -> None:
    """A service that ends does not wait until its threads have waited their time."""
    rig = make_rig(fault_threads=0)
    waits: list[Callable[[], object]] = [
        lambda: rig.engine.faults_next(8, 60_000),
        lambda: rig.engine.events_next(60_000),
        lambda: rig.engine.shadow_next(60_000),
    ]
    threads = [Background(wait) for wait in waits]
    began = time.monotonic()
    while not all(thread.done for thread in threads):
        rig.engine.wake()  # again: one may not have begun to wait
        time.sleep(0.01)
    assert time.monotonic() - began < 10
    assert [thread.result() for thread in threads] == [None, [], None]
