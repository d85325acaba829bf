"""Disks that lie: what was written is not what is read, or cannot be read. Never wrong data, and an error only for
data that is nowhere else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from core_rig import BLOCK, MIB, SECTOR, CoreRig, Segment, Vol, pattern

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
    """The number of records of such a segment proves nothing: one more is damaged, and the count is right again."""
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
