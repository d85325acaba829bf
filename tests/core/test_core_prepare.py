"""The file of the next segment is made before the worker needs it, where that costs nobody anything."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("glidefs.core._core")

from core_rig import ALLOCATE, CREATE, MIB, SECTOR, CoreRig, Vol, inject, pattern
from test_core_handoff import Pair

from glidefs.core import handoff
from glidefs.core.check import CoreError

COUNT = 256
"""Sectors of a segment here."""


@pytest.fixture
def small(make_rig: Callable[..., CoreRig]) -> CoreRig:
    return make_rig(segment_bytes=COUNT * SECTOR, log_limit=64 * MIB)


def spares(vol: Vol) -> list[Path]:
    return list(vol.dir.glob("*.spare"))


def allocated(path: Path) -> int:
    return path.stat().st_blocks * 512


def test_the_next_segment_has_its_blocks_before_it_is_written(small: CoreRig) -> None:
    vol = small.vol()
    vol.core.pwrite(0, pattern(1, SECTOR))
    charged = small.engine.stats().log_bytes
    vol.core.prepare()
    [spare] = spares(vol)
    assert allocated(spare) >= COUNT * SECTOR
    assert small.engine.stats().log_bytes - charged >= COUNT * SECTOR
    assert small.engine.stats().log_spare_bytes == small.engine.stats().log_bytes - charged
    vol.core.prepare()
    assert len(spares(vol)) == 1, "one is enough"
    inode = spare.stat().st_ino
    vol.core.pwrite(SECTOR, pattern(2, COUNT * SECTOR))
    assert not spares(vol)
    last = vol.segments()[-1]
    assert last.path.stat().st_ino == inode
    assert small.engine.stats().log_spare_bytes == 0
    vol.reopen()
    assert vol.core.pread(0, (COUNT + 1) * SECTOR) == pattern(1, SECTOR) + pattern(2, COUNT * SECTOR)


def test_what_was_not_written_of_it_is_no_record(small: CoreRig) -> None:
    vol = small.vol()
    vol.core.pwrite(0, pattern(1, SECTOR))
    vol.core.prepare()
    vol.core.pwrite(SECTOR, pattern(2, COUNT * SECTOR))
    vol.core.pwrite(0, pattern(3, SECTOR))
    vol.commit(retire=False)
    vol.reopen(always_verify=True)
    assert vol.core.pread(0, SECTOR) == pattern(3, SECTOR)
    assert vol.core.pread(SECTOR, COUNT * SECTOR) == pattern(2, COUNT * SECTOR)
    vol.core.retire(vol.committed_seq)
    assert vol.core.pread(SECTOR, COUNT * SECTOR) == pattern(2, COUNT * SECTOR)


def test_a_volume_that_does_not_write_gets_none(small: CoreRig) -> None:
    vol = small.vol()
    vol.core.prepare()
    vol.core.pwrite(0, pattern(1, SECTOR))
    vol.core.seal()
    vol.core.prepare()
    assert not spares(vol)


def test_logs_that_fill_get_none(small: CoreRig) -> None:
    vol = small.vol()
    for i in range(59):
        vol.core.pwrite(i * MIB, pattern(i, MIB))
    vol.core.prepare()
    assert not spares(vol)


@pytest.mark.parametrize("kind", [CREATE, ALLOCATE])
@pytest.mark.parametrize("err", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_no_error(small: CoreRig, err: int, kind: int) -> None:
    vol = small.vol()
    vol.core.pwrite(0, pattern(1, SECTOR))
    charged = small.engine.stats().log_bytes
    inject(kind, err)
    vol.core.prepare()
    assert not spares(vol)
    assert small.engine.stats().log_bytes == charged
    vol.core.prepare()
    assert len(spares(vol)) == 1


@pytest.mark.parametrize("kind", [CREATE, ALLOCATE])
def test_a_failing_disk_leaves_nothing(small: CoreRig, kind: int) -> None:
    vol = small.vol()
    vol.core.pwrite(0, pattern(1, SECTOR))
    charged = small.engine.stats().log_bytes
    inject(kind, errno.EIO)
    with pytest.raises(CoreError, match="Input/output error"):
        vol.core.prepare()
    assert not spares(vol)
    assert small.engine.stats().log_bytes == charged
    vol.core.pwrite(SECTOR, pattern(2, COUNT * SECTOR))
    assert vol.core.pread(SECTOR, COUNT * SECTOR) == pattern(2, COUNT * SECTOR)


def test_it_goes_with_the_volume(small: CoreRig) -> None:
    vol = small.vol()
    vol.core.pwrite(0, pattern(1, SECTOR))
    vol.core.prepare()
    [spare] = spares(vol)
    vol.close()
    assert not spare.exists()
    assert small.engine.stats().log_spare_bytes == 0
    spare.write_bytes(b"of a process that was killed")
    vol.open()
    assert not spare.exists()


def test_a_volume_that_is_handed_over_gets_none(pair: Pair) -> None:
    """! The directory is the successor's."""
    pair.vol.core.pwrite(0, pattern(1, SECTOR))
    pair.warm()
    handoff.freeze(pair.vol.core)
    before = {path.name for path in pair.vol.dir.iterdir()}
    pair.vol.core.prepare()
    assert {path.name for path in pair.vol.dir.iterdir()} == before
