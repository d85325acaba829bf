"""Gather: what sealed segments hold, exactly, as of the last of them."""

from __future__ import annotations

import errno
import random

import pytest
from core_rig import BLOCK, MIB, SECTOR, SECTORS, CoreRig, inject, pattern

from glidefs.core.gather import Gather, log_segments
from glidefs.errors import CorruptLog


def test_newest_version_of_each_sector(rig: CoreRig) -> None:
    vol = rig.vol()
    vol.core.pwrite(0, pattern(1, 3 * SECTOR))
    vol.core.pwrite(SECTOR, pattern(2, SECTOR))
    vol.core.zero(2 * SECTOR, SECTOR)
    vol.core.zero(5 * BLOCK, 3 * BLOCK)
    vol.core.pwrite(6 * BLOCK + SECTOR, pattern(3, SECTOR))
    seq = vol.core.seal()
    with vol.gather(seq) as gather:
        entries = list(gather.entries())
        assert [tuple(entry) for entry in entries] == [(0, 3, 4), (6, 2, 0xFFFFFFFD)]
        assert [(extent.block, extent.count) for extent in gather.extents()] == [(5, 1), (7, 1)]
        data = bytearray(gather.nbytes(0, 2))
        gather.fill(0, 2, data)
        assert data == pattern(1, SECTOR) + pattern(2, SECTOR) + pattern(3, SECTOR)


def test_newer_writes_do_not_leak_in(rig: CoreRig) -> None:
    vol = rig.vol()
    vol.core.pwrite(0, pattern(1, SECTOR))
    seq = vol.core.seal()
    vol.core.pwrite(0, pattern(2, SECTOR))
    vol.core.pwrite(BLOCK, pattern(2, SECTOR))
    vol.core.seal()
    with vol.gather(seq) as gather:
        assert [tuple(entry) for entry in gather.entries()] == [(0, 1, 0)]
        data = bytearray(SECTOR)
        gather.fill(0, 1, data)
        assert data == pattern(1, SECTOR)
    with vol.gather(seq + 1) as gather:
        assert len(gather) == 2


def test_the_active_segment_is_not_gathered(rig: CoreRig) -> None:
    vol = rig.vol()
    vol.core.pwrite(0, pattern(1, SECTOR))
    with vol.gather(1 << 30) as gather:
        assert not len(gather)
        assert not gather.extents()


@pytest.mark.parametrize("where", ["data", "record"])
def test_a_damaged_record_uploads_nothing(rig: CoreRig, where: str) -> None:
    """! The records must be those that were acknowledged: else the store would get older data."""
    vol = rig.vol()
    vol.core.pwrite(0, pattern(1, SECTOR))
    vol.core.pwrite(0, pattern(2, SECTOR))
    seq = vol.core.seal()
    segment = vol.segments()[0]
    segment.flip(segment.data_at(1) if where == "data" else segment.record_at(1))
    with pytest.raises(CorruptLog) as caught, vol.gather(seq) as gather:
        gather.fill(0, 1, bytearray(SECTOR))
    assert "0000000000000001.seg" in str(caught.value)
    assert ("1 of 2" in str(caught.value)) == (where == "record")


def test_damage_of_what_is_read_no_more_is_not_looked_for(rig: CoreRig) -> None:
    vol = rig.vol()
    vol.core.pwrite(0, pattern(1, 2 * SECTOR))
    vol.core.pwrite(0, pattern(2, SECTOR))
    seq = vol.core.seal()
    segment = vol.segments()[0]
    segment.flip(segment.data_at(0))
    with vol.gather(seq) as gather:
        data = bytearray(2 * SECTOR)
        gather.fill(0, 1, data)
    assert data == pattern(2, SECTOR) + pattern(1, 2 * SECTOR)[SECTOR:]


def test_a_record_that_was_not_acknowledged_is_refused(rig: CoreRig) -> None:
    """A file that went back in time: its records are good, but not all that there were."""
    vol = rig.vol()
    vol.core.pwrite(0, pattern(1, SECTOR))
    path = vol.segments()[0].path
    before = path.read_bytes()
    vol.core.pwrite(BLOCK, pattern(2, SECTOR))
    seq = vol.core.seal()
    path.write_bytes(before)
    with pytest.raises(CorruptLog, match="1 of 2"):
        vol.gather(seq)


def test_a_record_of_other_data_than_in_memory_is_refused(rig: CoreRig) -> None:
    """The file of a twin, say: all of it is well-formed, and it is not what was acknowledged here."""
    vol, twin = rig.vol(), rig.vol()
    for one, seed in ((vol, 1), (twin, 2)):
        one.core.pwrite(0, pattern(seed, 3 * SECTOR))
    seq = vol.core.seal()
    vol.segments()[0].path.write_bytes(twin.segments()[0].path.read_bytes())
    with pytest.raises(CorruptLog, match="1 of 1"):
        vol.gather(seq)


def test_what_recovery_dropped_is_not_missed(rig: CoreRig) -> None:
    vol = rig.vol(always_verify=True)
    vol.core.pwrite(0, pattern(1, SECTOR))
    vol.core.pwrite(0, pattern(2, SECTOR))
    vol.close()
    segment = vol.segments()[0]
    segment.flip(segment.data_at(1))
    vol.open()
    vol.commit()
    assert vol.core.pread(0, SECTOR) == pattern(1, SECTOR)


def test_what_a_failed_append_left_is_not_gathered(rig: CoreRig) -> None:
    vol = rig.vol()
    vol.core.pwrite(0, pattern(1, SECTOR))
    inject(2, errno.EIO, skip=1, count=1)
    vol.core.pwrite(0, pattern(2, SECTOR))
    vol.core.pwrite(0, pattern(3, SECTOR))
    vol.commit()
    assert vol.base[0] == pattern(3, SECTOR) + bytes(BLOCK - SECTOR)


def test_offline(rig: CoreRig) -> None:
    vol = rig.vol()
    for i in range(40):
        vol.core.pwrite(i * SECTOR, pattern(i, SECTOR))
    vol.core.flush()
    vol.close()
    assert log_segments(vol.dir) == [1, 2, 3]
    with Gather(None, vol.dir, b"v" * 16, b"l" * 16, 1, 99) as gather:
        data = bytearray(gather.nbytes(0, len(gather)))
        gather.fill(0, len(gather), data)
        assert data == b"".join(pattern(i, SECTOR) for i in range(40))
    segment = vol.segments()[1]
    segment.flip(segment.data_at(2))
    with Gather(None, vol.dir, b"v" * 16, b"l" * 16, 1) as gather:
        assert gather.nbytes(0, len(gather)) == 39 * SECTOR
        (loss,) = gather.damage.losses
        assert (loss.segment, loss.kind, loss.count) == (2, "record", 1)
        assert str(segment.path) in loss.why
        ((sector, count),) = gather.damage.sectors
        assert count == 1
        masks = {entry.block: entry.mask for entry in gather.entries()}
        assert not masks[sector // SECTORS] >> sector % SECTORS & 1
    assert log_segments(vol.dir / "absent") == []


def test_offline_leaves_out_what_was_never_synced(rig: CoreRig) -> None:
    """Torn by a power cut, as at a start: what it meant to replace stays, and the count says so."""
    vol = rig.vol()
    vol.core.pwrite(0, pattern(1, SECTOR), fua=True)
    vol.core.pwrite(0, pattern(2, SECTOR))
    vol.close()
    segment = vol.segments()[0]
    segment.flip(segment.data_at(2))  # the SYNC is the second record
    with Gather(None, vol.dir, b"v" * 16, b"l" * 16, 1) as gather:
        assert not gather.damage.losses
        assert gather.damage.torn == 1
        assert list(gather.entries()) == [(0, 1, 0)]
        data = bytearray(SECTOR)
        gather.fill(0, 1, data)
    assert data == pattern(1, SECTOR)


def test_what_is_lost_and_written_again_is_not_missed(rig: CoreRig) -> None:
    vol = rig.vol()
    vol.core.pwrite(0, pattern(1, 2 * SECTOR), fua=True)
    vol.core.zero(0, BLOCK)
    vol.core.pwrite(SECTOR, pattern(2, 2 * SECTOR), fua=True)
    vol.core.pwrite(SECTOR, pattern(3, SECTOR), fua=True)
    vol.close()
    segment = vol.segments()[0]
    for index in (0, 4):
        segment.flip(segment.data_at(index))
    with Gather(None, vol.dir, b"v" * 16, b"l" * 16, 1) as gather:
        assert [loss.count for loss in gather.damage.losses] == [2]
        assert gather.damage.sectors == ((2, 1),)
        assert list(gather.entries()) == [(0, 1 << 1, 0xFFFFFFF9)]


def test_segments_that_nobody_knows_the_store_to_have(rig: CoreRig) -> None:
    """The first may be gone because the store has it: only who knows what it has can miss one."""
    vol = rig.vol()
    for i in range(40):
        vol.core.pwrite(i * SECTOR, pattern(i, SECTOR), fua=True)
    vol.close()
    first = vol.segments()[0].path
    first.unlink()
    for sent, missed in ((None, 0), (1, 0), (0, 1)):
        with Gather(None, vol.dir, b"v" * 16, b"l" * 16, 1, sent=sent) as gather:
            assert len(gather.damage.losses) == missed, sent
    last = vol.segments()[-1].path
    last.unlink()
    with Gather(None, vol.dir, b"v" * 16, b"l" * 16, 1, sent=99) as gather:
        (loss,) = gather.damage.losses
        assert (loss.segment, loss.kind) == (int(last.stem, 16), "segment")
    for segment in vol.segments():
        segment.path.unlink()
    with Gather(None, vol.dir, b"v" * 16, b"l" * 16, 1) as gather:
        assert {loss.kind for loss in gather.damage.losses} == {"segment"}
        assert len(gather) == 0


@pytest.mark.parametrize("seed", range(6))
def test_against_a_model(rig: CoreRig, seed: int) -> None:
    """After random writes and discards, base + gathers = the volume."""
    rng = random.Random(seed)
    size = 2 * MIB
    vol = rig.vol(size)
    model = bytearray(size)
    for _ in range(8):
        for step in range(rng.randrange(1, 60)):
            offset = rng.randrange(0, size, SECTOR)
            length = min(rng.choice([1, 1, 2, 7, 32, 33, 100]) * SECTOR, size - offset)
            if rng.random() < 0.6:
                data = pattern(seed * 1000 + step, length)
                vol.core.pwrite(offset, data)
                model[offset : offset + length] = data
            else:
                vol.core.zero(offset, length)
                model[offset : offset + length] = bytes(length)
        vol.commit(retire=rng.random() < 0.5)
        image = b"".join(vol.base.get(block, bytes(BLOCK)) for block in range(size // BLOCK))
        assert image == model
    assert vol.core.pread(0, size) == model
