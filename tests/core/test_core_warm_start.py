"""A start serves from committed segments, and never an older version of a sector than the store has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from core_rig import BLOCK, SECTOR, CoreRig, Vol, apply_gather, pattern
from hypothesis import given, settings
from hypothesis import strategies as st


def faults(vol: Vol) -> int:
    return vol.core.stats().faults


def segment(vol: Vol, sector: int, seed: int, *, commit: bool = True) -> None:
    """One segment that writes one sector."""
    vol.core.pwrite(sector * SECTOR, pattern(seed, SECTOR))
    vol.core.flush()
    vol.core.seal()
    if commit:
        vol.commit(retire=False)


def three(rig: CoreRig) -> Vol:
    """Sector 0 in segments 1 and 2, sector 1 in 3; all are in the store."""
    vol = rig.vol()
    for sector, seed in ((0, 1), (0, 2), (1, 3)):
        segment(vol, sector, seed)
    return vol


def commit_unsynced(vol: Vol, seq: int) -> None:
    """The store takes a segment of which nothing says that it was synced."""
    with vol.gather(seq) as gather:
        vol.base = apply_gather(vol.base, gather)
    vol.committed_seq = seq
    vol.core.committed(seq)


def names(vol: Vol) -> list[int]:
    return [int(found.path.stem, 16) for found in vol.segments()]


def check(vol: Vol) -> None:
    assert vol.core.pread(0, SECTOR) == pattern(2, SECTOR)
    assert vol.core.pread(SECTOR, SECTOR) == pattern(3, SECTOR)


@pytest.mark.parametrize("more", [False, True])
def test_what_the_store_has_is_read_from_the_log(rig: CoreRig, more: bool) -> None:
    vol = three(rig)
    if more:
        segment(vol, 5, 5, commit=False)
    vol.reopen()
    assert names(vol) == [1, 2, 3] + [4] * more
    check(vol)
    assert faults(vol) == 0
    assert vol.core.info().dirty_bytes == SECTOR * 2 * more  # with the record of the sync
    vol.core.pwrite(0, pattern(9, SECTOR))
    vol.reopen()
    assert vol.core.pread(0, SECTOR) == pattern(9, SECTOR)
    vol.commit()
    assert not names(vol)
    assert vol.core.pread(0, SECTOR) == pattern(9, SECTOR)
    assert vol.core.pread(SECTOR, SECTOR) == pattern(3, SECTOR)


def flip_journal(vol: Vol, index: int) -> None:
    found = vol.segments()[index]
    found.flip(found.record_at(0))


def flip_data(vol: Vol, index: int) -> None:
    found = vol.segments()[index]
    found.flip(found.data_at(0))


def flip_headers(vol: Vol, index: int) -> None:
    for sector in (0, 1):
        vol.segments()[index].flip(sector * SECTOR + 8)


def remove(vol: Vol, index: int) -> None:
    vol.segments()[index].path.unlink()


def make_directory(vol: Vol, index: int) -> None:
    """It cannot be read."""
    path = vol.segments()[index].path
    path.unlink()
    path.symlink_to("/dev/null")


def mark(vol: Vol, index: int) -> None:
    """A sync of it failed."""
    vol.segments()[index].path.with_suffix(".syncfail").touch()


Damage = Callable[[Vol, int], None]


@pytest.mark.parametrize("damage", [flip_journal, flip_headers, remove, make_directory, mark])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_one_that_is_not_whole_goes_with_those_before(rig: CoreRig, damage: Damage, index: int) -> None:
    """! Segment 1 without 2 would show an older version of sector 0."""
    vol = three(rig)
    vol.close()
    damage(vol, index)
    vol.open()
    assert names(vol) == [number for number in (1, 2, 3) if number > index + 1]
    check(vol)
    assert not list(vol.dir.glob("*.syncfail"))


@pytest.mark.parametrize("index", [0, 1, 2])
def test_data_that_is_bad_comes_from_the_store(rig: CoreRig, index: int) -> None:
    vol = three(rig)
    vol.close()
    flip_data(vol, index)
    vol.open()
    assert names(vol) == [1, 2, 3]
    check(vol)
    assert faults(vol) == (index > 0)


def test_the_last_one_that_the_store_has_is_gone(rig: CoreRig) -> None:
    """! A power cut undid the unlink of retired segments, but not of the last of them."""
    vol = three(rig)
    segment(vol, 0, 7)
    kept = [(found.path, found.path.read_bytes()) for found in vol.segments()[:3]]
    vol.core.retire(4)
    vol.close()
    for path, content in kept:
        path.write_bytes(content)
    vol.dir.with_name(f"{vol.dir.name}.witness").unlink()  # the power cut took what it said of segment 4
    vol.open()
    assert not names(vol)
    assert vol.core.pread(0, SECTOR) == pattern(7, SECTOR)


def test_one_that_nothing_vouches_for_is_gone(rig: CoreRig) -> None:
    """! Segment 1 is whole, and so is 3; but sector 0 has a newer version in 2."""
    vol = rig.vol()
    segment(vol, 0, 1)
    for sector, seed in ((0, 2), (1, 3)):
        vol.core.pwrite(sector * SECTOR, pattern(seed, SECTOR))
        commit_unsynced(vol, vol.core.seal())
    vol.core.pwrite(2 * SECTOR, pattern(4, SECTOR))
    vol.close()
    remove(vol, 1)
    vol.open()
    assert names(vol) == [3, 4]
    check(vol)


def test_nothing_vouches_for_the_end_of_the_last(rig: CoreRig) -> None:
    vol = rig.vol()
    vol.core.pwrite(0, pattern(1, SECTOR))
    vol.core.pwrite(0, pattern(2, SECTOR))
    commit_unsynced(vol, vol.core.seal())
    vol.close()
    vol.segments()[0].flip(vol.segments()[0].record_at(1))
    vol.open()
    assert not names(vol)
    assert vol.core.pread(0, SECTOR) == pattern(2, SECTOR)


@given(
    writes=st.lists(
        st.tuples(st.integers(0, 40), st.integers(1, 40), st.booleans()), min_size=1, max_size=25
    ),
    committed=st.integers(0, 25),
    damaged=st.sets(st.integers(0, 24), max_size=3),
    kind=st.sampled_from([flip_journal, flip_headers, remove, mark, flip_data]),
)
@settings(deadline=None, max_examples=40)
def test_any_damage_to_what_the_store_has_is_harmless(
    tmp_path_factory: pytest.TempPathFactory,
    writes: list[tuple[int, int, bool]],
    committed: int,
    damaged: set[int],
    kind: Damage,
) -> None:
    rig = CoreRig(Path(tmp_path_factory.mktemp("warm")), workers=1)
    try:
        vol = rig.vol()
        want = bytearray(80 * SECTOR)
        for number, (sector, count, zero) in enumerate(writes):
            data = bytes(count * SECTOR) if zero else pattern(number + 1, count * SECTOR)
            want[sector * SECTOR : (sector + count) * SECTOR] = data
            if zero:
                vol.core.zero(sector * SECTOR, count * SECTOR)
            else:
                vol.core.pwrite(sector * SECTOR, data)
            vol.core.flush()
            vol.core.seal()
            if number < committed:
                vol.commit(retire=False)
        vol.close()
        for index in sorted(damaged, reverse=True):
            if index < min(committed, len(writes)):
                kind(vol, index)
        vol.open()
        assert vol.core.pread(0, len(want)) == bytes(want)
    finally:
        rig.close()


def test_live_sectors_decide_what_is_kept_for_nothing(rig: CoreRig) -> None:
    vol = rig.vol()
    segment(vol, 0, 1)
    segment(vol, 1, 2)
    assert vol.core.info().dead_seq == 0
    segment(vol, 1, 3)
    assert vol.core.info().dead_seq == 0  # the first one still has a sector
    segment(vol, 0, 4)
    assert vol.core.info().dead_seq == 2
    vol.core.zero(0, BLOCK)
    assert vol.core.info().dead_seq == 4
    vol.reopen()
    assert vol.core.info().dead_seq == 5  # the ZERO in the last one is no sector's data
    assert vol.core.pread(0, BLOCK) == bytes(BLOCK)
