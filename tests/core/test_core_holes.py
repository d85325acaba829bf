"""Holes: whole pages and chunks of zeros in the base, told to the core once."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from core_rig import BLOCK, MIB, SECTOR, Background, CoreRig, holes_of_page, pattern
from waiting import wait_for

from glidefs.core.volume import GROUP, chunk_holes, install_retry, page_holes
from glidefs.formats.manifest import PAGE_CHUNKS
from glidefs.formats.pack import CHUNK_BLOCKS

CHUNK = GROUP * BLOCK
PAGE = GROUP * CHUNK
ALL = (1 << GROUP) - 1


def test_groups_are_chunks_and_pages() -> None:
    assert GROUP == CHUNK_BLOCKS == PAGE_CHUNKS


def test_a_hole_is_one_fault_in_each_page(rig: CoreRig) -> None:
    """10 TiB without a byte: random reads ask once a page, whatever they read."""
    vol = rig.vol(10 << 40)
    pages = (10 << 40) // PAGE
    rng = random.Random(1)
    for page in range(pages):
        vol.core.pread(page * PAGE + rng.randrange(PAGE // SECTOR) * SECTOR, SECTOR)
    assert vol.core.stats().faults == pages
    for _ in range(2000):
        assert vol.core.pread(rng.randrange((10 << 40) // SECTOR) * SECTOR, SECTOR) == bytes(SECTOR)
    assert vol.core.stats().faults == pages
    assert rig.engine.stats().map_bytes < 16384  # an entry for each page, no bitmap


def test_a_page_with_some_chunks_has_a_bitmap(rig: CoreRig) -> None:
    vol = rig.vol(4 * PAGE)
    vol.base = {(page * GROUP + 5) * GROUP: pattern(page, BLOCK) for page in range(4)}
    before = rig.engine.stats().map_bytes
    for page in range(4):
        assert vol.core.pread(page * PAGE, BLOCK) == bytes(BLOCK)
    assert rig.engine.stats().map_bytes - before < 4 * 1024
    faults = vol.core.stats().faults
    for page in range(4):
        assert vol.core.pread(page * PAGE + 6 * CHUNK, BLOCK) == bytes(BLOCK)
        assert vol.core.pread(page * PAGE + 5 * CHUNK, BLOCK) == pattern(page, BLOCK)
    assert vol.core.stats().faults == faults + 4  # only the blocks that are there


def test_what_waits_in_the_page_goes_on(make_rig: Callable[..., CoreRig]) -> None:
    """One answer is enough for all that wait for holes of the page; who waits for data waits on."""
    rig = make_rig(fault_threads=0)
    vol = rig.vol(PAGE)
    vol.base = {9 * GROUP: pattern(9, BLOCK)}
    reads = [Background(lambda i=i: vol.core.pread(i * CHUNK, SECTOR)) for i in (0, 3, 700, 1023)]
    other = Background(lambda: vol.core.pread(9 * CHUNK, SECTOR))
    wait_for(lambda: vol.core.info().parked == 5, "all wait")
    vol.core.install_holes(vol.core.stamp(), [holes_of_page(vol.base, 0)])
    assert [read.result() for read in reads] == [bytes(SECTOR)] * 4
    assert not other.done
    assert vol.core.info().parked == 1
    while not other.done and (fault := rig.engine.faults_next(8, 1000)) is not None:
        vol.core.install(fault.stamp, vol.answers(fault))
    assert other.result() == pattern(9, SECTOR)


def test_a_stale_page_does_not_land(rig: CoreRig) -> None:
    """! A chunk became present between the stamp and the answer: its absence is not believed."""
    vol = rig.vol(2 * PAGE)
    stamp, holes = vol.core.stamp(), holes_of_page(vol.base, 1)
    vol.core.pwrite(PAGE + CHUNK, pattern(1, SECTOR))
    vol.commit()
    vol.core.install_holes(stamp, [holes, chunk_holes(GROUP + 1, ALL)])
    assert vol.core.pread(PAGE + CHUNK, 2 * SECTOR) == pattern(1, SECTOR) + bytes(SECTOR)


def test_retire_makes_a_chunk_present(rig: CoreRig) -> None:
    """! What the log gives back must not be covered by what was known before."""
    vol = rig.vol(2 * PAGE)
    assert vol.core.pread(PAGE + CHUNK, BLOCK) == bytes(BLOCK)
    vol.core.pwrite(PAGE + CHUNK + BLOCK, pattern(1, SECTOR))
    vol.commit()
    assert vol.core.pread(PAGE + CHUNK + BLOCK, SECTOR) == pattern(1, SECTOR)
    faults = vol.core.stats().faults
    assert vol.core.pread(PAGE + 2 * CHUNK, BLOCK) == bytes(BLOCK)  # its neighbours are known still
    assert vol.core.pread(PAGE, BLOCK) == bytes(BLOCK)
    assert vol.core.stats().faults == faults


def test_zeros_of_a_present_chunk_are_told_at_once(rig: CoreRig) -> None:
    vol = rig.vol()
    vol.base = {i: pattern(i, BLOCK) for i in range(0, 512, 2)}
    for i in range(1, 512, 2):
        assert vol.core.pread(i * BLOCK, SECTOR) == bytes(SECTOR)
    assert vol.core.stats().faults == 1


def test_an_evicted_block_is_not_a_hole(rig: CoreRig) -> None:
    vol = rig.vol()
    vol.base = {0: pattern(1, BLOCK)}
    assert vol.core.pread(BLOCK, BLOCK) == bytes(BLOCK)
    assert vol.core.pread(0, BLOCK) == pattern(1, BLOCK)
    wait_for(lambda: rig.engine.cache.evict_all() == 1, "the reader, who was answered, unpins it by and by")
    assert vol.core.pread(0, 2 * BLOCK) == pattern(1, BLOCK) + bytes(BLOCK)
    assert vol.core.stats().faults == 3


@pytest.mark.parametrize("size", [CHUNK + BLOCK, 3 * CHUNK, PAGE + BLOCK])
def test_what_a_grow_brings_is_a_hole(rig: CoreRig, size: int) -> None:
    """An answer covers the page behind the end of the volume as well."""
    vol = rig.vol(size)
    vol.core.pread(size - SECTOR, SECTOR)
    faults = vol.core.stats().faults
    vol.core.resize(size + 2 * CHUNK)
    assert vol.core.pread(size + CHUNK, BLOCK) == bytes(BLOCK)
    assert vol.core.stats().faults == faults
    vol.core.pwrite(size + CHUNK, pattern(1, SECTOR))
    vol.commit()
    vol.core.resize(size)
    vol.core.resize(size + 2 * CHUNK)
    assert vol.core.pread(size + CHUNK, SECTOR) == bytes(SECTOR)
    vol.commit()
    assert vol.core.pread(size + CHUNK, SECTOR) == bytes(SECTOR)


def test_a_large_discard_forgets_in_no_time(rig: CoreRig) -> None:
    """Retiring a discard of 64 TiB: the work is that of what is known, not of what it covers."""
    size = 64 << 40
    vol = rig.vol(size)
    for at in (0, size // 4, size // 2):
        vol.core.pread(at, SECTOR)
    faults = vol.core.stats().faults
    vol.core.zero(0, size)
    segment = vol.core.seal()
    vol.core.sync()
    vol.core.committed(segment)
    vol.core.retire(segment)
    assert vol.core.pread(size // 2, SECTOR) == bytes(SECTOR)
    assert vol.core.stats().faults == faults + 1


def test_the_map_starts_over_at_its_limit(make_rig: Callable[..., CoreRig]) -> None:
    """Bitmaps count: the map of a volume has a quarter of the budget, at least 64 KiB."""
    rig = make_rig(map_budget=1 * MIB)
    vol = rig.vol(1 << 50)
    stamp = vol.core.stamp()
    for page in range(8000):
        vol.core.install_holes(stamp, [page_holes(page, ALL & ~(1 << 7))])
    vol.core.install(stamp, [install_retry(0, 1)])
    assert vol.core.info().map_bytes < MIB // 4 + 4096
    assert vol.core.pread(0, SECTOR) == bytes(SECTOR)


def test_holes_overlap_in_any_order(rig: CoreRig) -> None:
    """What one answer knows to be zero stays, whatever another says of the same group."""
    vol = rig.vol(2 * PAGE)
    stamp = vol.core.stamp()
    vol.core.install_holes(
        stamp, [page_holes(0, 0b0110), page_holes(0, 0b1010), chunk_holes(0, 0b1), chunk_holes(0, 0)]
    )
    for at in (CHUNK, 2 * CHUNK, 3 * CHUNK, 0):
        assert vol.core.pread(at, SECTOR) == bytes(SECTOR)
    assert vol.core.stats().faults == 0
    vol.core.install_holes(stamp, [page_holes(0, ALL), page_holes(0, 0)])
    assert vol.core.pread(1023 * CHUNK, SECTOR) == bytes(SECTOR)
    assert vol.core.stats().faults == 0
