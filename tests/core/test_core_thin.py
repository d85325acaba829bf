"""Committed segments give back what was written again since, and go on serving the rest."""

from __future__ import annotations

import contextlib
import errno
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("glidefs.core._core")

from core_rig import READ, SECTOR, WRITE, CoreRig, Vol, inject, pattern
from hypothesis import given, settings
from hypothesis import strategies as st
from test_core_handoff import Pair

from glidefs.core import handoff
from glidefs.core.check import CoreError
from glidefs.core.engine import EventKind

COUNT, FROM, AGAIN = 12, 2, 8
"""Sectors of a record that fits into a segment, and those of them that are written again."""


def write(vol: Vol, sector: int, seed: int, count: int = 1) -> None:
    vol.core.pwrite(sector * SECTOR, pattern(seed, count * SECTOR))


def two(vol: Vol) -> Vol:
    """One record of segment 1, of which segment 2 has the middle again; both are in the store."""
    write(vol, 0, 1, COUNT)
    vol.commit(retire=False)
    write(vol, FROM, 2, AGAIN)
    vol.commit(retire=False)
    return vol


def want(seed: int = 2) -> bytes:
    first = pattern(1, COUNT * SECTOR)
    return first[: FROM * SECTOR] + pattern(seed, AGAIN * SECTOR) + first[(FROM + AGAIN) * SECTOR :]


def allocated(vol: Vol, index: int) -> int:
    return vol.segments()[index].path.stat().st_blocks * 512


def lost(rig: CoreRig) -> int:
    return sum(event.kind == EventKind.READ_LOST for event in rig.engine.events_next(0))


def check(vol: Vol, data: bytes) -> None:
    """It is served, from here."""
    faults = vol.core.stats().faults
    assert vol.core.pread(0, len(data)) == data
    assert vol.core.stats().faults == faults
    assert lost(vol.rig) == 0


def test_what_was_written_again_gives_its_space_back(rig: CoreRig) -> None:
    vol = two(rig.vol())
    disk, log = allocated(vol, 0), vol.core.info().log_bytes
    freed = vol.core.thin(1)
    assert freed == AGAIN * SECTOR
    assert disk - allocated(vol, 0) == freed
    assert log - vol.core.info().log_bytes == freed
    assert not list(vol.dir.glob("*.spare"))
    check(vol, want())
    assert vol.core.thin(1) == 0  # nothing more
    assert vol.core.thin(2) == 0


def test_a_start_serves_what_is_left(rig: CoreRig) -> None:
    """! A record of which a part is gone has a hash of all of it."""
    vol = two(rig.vol())
    vol.core.thin(1)
    before = vol.core.info().log_bytes
    vol.reopen()
    assert [found.path.name[:16].lstrip("0") for found in vol.segments()] == ["1", "2"]
    check(vol, want())
    assert vol.core.info().log_bytes <= before + SECTOR
    assert vol.core.stats().log_hits
    write(vol, 0, 3, 10)
    vol.commit(retire=False)
    assert vol.core.thin(2) > 0
    vol.reopen()
    newest = pattern(3, 10 * SECTOR) + want()[10 * SECTOR :]
    check(vol, newest)
    vol.core.retire(vol.committed_seq)
    assert not vol.segments()
    assert vol.core.pread(0, COUNT * SECTOR) == newest


def test_the_power_takes_what_was_newer(rig: CoreRig) -> None:
    """! The store has what the thinned segment had, and no reader is told of a bad disk."""
    vol = rig.vol()
    write(vol, 0, 1, COUNT)
    vol.commit(retire=False)
    write(vol, FROM, 2, AGAIN)
    assert vol.core.thin(1) == AGAIN * SECTOR
    vol.close()
    vol.segments()[1].path.unlink()
    vol.open()
    assert vol.core.pread(0, COUNT * SECTOR) == pattern(1, COUNT * SECTOR)
    assert vol.core.stats().faults
    assert lost(rig) == 0


def test_what_is_not_committed_stays_whole(rig: CoreRig) -> None:
    """! The store does not have it."""
    vol = rig.vol()
    write(vol, 0, 1, COUNT)
    vol.core.flush()
    vol.core.seal()
    write(vol, 0, 2, COUNT)
    assert vol.core.thin(1) == 0
    assert vol.core.thin(2) == 0
    assert vol.core.thin(99) == 0


def test_where_little_would_go_nothing_is_done(rig: CoreRig) -> None:
    vol = rig.vol()
    write(vol, 0, 1, COUNT)
    vol.commit(retire=False)
    write(vol, 0, 2, 3)
    vol.commit(retire=False)
    assert vol.core.thin(1) == 0


@pytest.mark.parametrize("kind", [READ, WRITE])
def test_a_disk_that_fails_leaves_the_segment_as_it_is(rig: CoreRig, kind: int) -> None:
    vol = two(rig.vol())
    before = vol.segments()[0].path.read_bytes()
    for skip in range(4):
        inject(kind, errno.EIO, skip=skip, count=1 if kind == WRITE else 99)
        with contextlib.suppress(CoreError):
            if vol.core.thin(1):
                break
        inject(kind, 0, count=0)
        assert not list(vol.dir.glob("*.spare"))
        assert vol.segments()[0].path.read_bytes() == before
    inject(kind, 0, count=0)
    check(vol, want())


def test_a_file_that_a_crash_left_is_no_segment(rig: CoreRig) -> None:
    vol = two(rig.vol())
    vol.close()
    stray = vol.dir / f"{1:016x}.spare"
    stray.write_bytes(b"half of it")
    vol.open()
    assert not stray.exists()
    check(vol, want())


def test_a_successor_reads_thin_segments_of_another_boot(pair: Pair) -> None:
    """! It compares data with hashes, and holes have none."""
    vol = two(pair.vol)
    assert vol.core.thin(1)
    vol.config["always_verify"] = True
    pair.warm()
    core = pair.move().core
    with pair.new.hold():
        assert core.pread(0, COUNT * SECTOR) == want()


def test_nothing_is_thinned_while_it_is_handed_over(pair: Pair) -> None:
    vol = two(pair.vol)
    pair.warm()
    handoff.freeze(vol.core)
    before = vol.segments()[0].path.read_bytes()
    assert vol.core.thin(1) == 0
    assert vol.segments()[0].path.read_bytes() == before


@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_any_history(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    rig = CoreRig(Path(tmp_path_factory.mktemp("thin")), workers=1)
    try:
        vol = rig.vol()
        model = bytearray(96 * SECTOR)
        for number in range(data.draw(st.integers(1, 25))):
            step = data.draw(
                st.sampled_from(["write", "write", "write", "zero", "commit", "thin", "retire", "reopen"])
            )
            sector, count = data.draw(st.integers(0, 60)), data.draw(st.integers(1, 30))
            if step == "write":
                write(vol, sector, number + 1, count)
                model[sector * SECTOR : (sector + count) * SECTOR] = pattern(number + 1, count * SECTOR)
            elif step == "zero":
                vol.core.zero(sector * SECTOR, count * SECTOR)
                model[sector * SECTOR : (sector + count) * SECTOR] = bytes(count * SECTOR)
            elif step == "commit":
                vol.commit(retire=False)
            elif step == "thin":
                for seq in range(1, vol.committed_seq + 1):
                    vol.core.thin(seq)
            elif step == "retire":
                vol.core.retire(data.draw(st.integers(0, vol.committed_seq)))
            else:
                vol.reopen(always_verify=data.draw(st.booleans()))
            assert vol.core.pread(0, len(model)) == bytes(model)
        assert lost(rig) == 0
    finally:
        rig.close()


def test_readers_while_segments_are_thinned(make_rig: Callable[..., CoreRig]) -> None:
    """Reads that go through the ring have the descriptor of a file that is exchanged."""
    rig = make_rig()
    vol = rig.vol()
    rng = random.Random(5)
    thinned = 0
    expected = bytearray(64 * SECTOR)
    for round_ in range(40):
        for _ in range(6):
            sector, count = rng.randrange(48), rng.randrange(1, 16)
            seed = rng.randrange(1 << 30)
            write(vol, sector, seed, count)
            expected[sector * SECTOR : (sector + count) * SECTOR] = pattern(seed, count * SECTOR)
        vol.commit(retire=False)
        for found in vol.segments():
            with found.path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        for seq in range(1, vol.committed_seq + 1):
            thinned += vol.core.thin(seq)
        assert vol.core.pread(0, len(expected)) == bytes(expected), round_
    assert thinned
    assert lost(rig) == 0
