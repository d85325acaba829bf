"""Replay: what a crash, a power cut, bit rot and a writer that lost the log leave behind."""

from __future__ import annotations

import shutil

import pytest
from core_rig import BLOCK, SECTOR, CoreRig, Vol, pattern

from glidefs.core.check import CoreError
from glidefs.errors import CorruptLog


def test_everything_acknowledged_is_there_after_a_crash(rig: CoreRig) -> None:
    vol = rig.vol()
    vol.base = {0: pattern(9, BLOCK)}
    for i in range(40):
        vol.core.pwrite(i * SECTOR, pattern(i, SECTOR))
    vol.core.zero(3 * SECTOR, 2 * SECTOR)
    vol.core.pwrite(512, b"x" * 512)
    want = vol.core.pread(0, 2 * BLOCK)
    for verify in (False, True):
        vol.reopen(always_verify=verify)
        assert vol.core.pread(0, 2 * BLOCK) == want
        assert vol.recovery.dropped == 0
        assert vol.recovery.verified == (vol.recovery.bytes if verify else 0)
    assert vol.recovery.records == 42
    assert vol.recovery.bytes >= 40 * SECTOR


def test_recovery_appends_to_a_new_segment(rig: CoreRig) -> None:
    """! A dying process may still be writing into the old one."""
    vol = rig.vol()
    vol.core.pwrite(0, pattern(1, SECTOR))
    vol.reopen()
    assert vol.core.info().sealed_seq == 1
    vol.core.pwrite(0, pattern(2, SECTOR))
    assert vol.core.info().last_seq == 2
    vol.reopen()
    assert vol.core.pread(0, SECTOR) == pattern(2, SECTOR)


def test_recovered_segments_count_as_unsynced(rig: CoreRig) -> None:
    """! Who made them may have died before it synced."""
    vol = rig.vol()
    vol.core.pwrite(0, pattern(1, SECTOR))
    vol.core.flush()
    vol.reopen()
    before = vol.core.stats().syncs
    vol.core.flush()
    assert vol.core.stats().syncs == before + 1


def test_sequence_numbers_are_never_used_twice(rig: CoreRig) -> None:
    vol = rig.vol()
    vol.core.pwrite(0, pattern(1, SECTOR))
    vol.commit()
    vol.reopen()
    vol.core.pwrite(0, pattern(2, SECTOR))
    assert vol.core.info().last_seq == 2


# -- damage above and below the synced position ----------------------------------------------------


def two_versions(rig: CoreRig, *, sync: bool) -> Vol:
    """Records 0 and 1 of segment 1 write sector 0; record 2 is the witness if synced."""
    vol = rig.vol(always_verify=True)
    vol.core.pwrite(0, pattern(1, SECTOR))
    vol.core.pwrite(0, pattern(2, SECTOR))
    if sync:
        vol.core.flush()
    vol.close()
    return vol


@pytest.mark.parametrize("where", ["data", "record"])
def test_a_torn_write_is_dropped_and_the_old_data_is_there(rig: CoreRig, where: str) -> None:
    vol = two_versions(rig, sync=False)
    segment = vol.segments()[0]
    segment.flip(segment.data_at(1) + 7 if where == "data" else segment.record_at(1) + 3)
    vol.open()
    assert vol.core.pread(0, SECTOR) == pattern(1, SECTOR)
    assert vol.recovery.records == 1


@pytest.mark.parametrize("where", ["data", "record"])
def test_damage_below_a_sync_is_an_error_that_names_it(rig: CoreRig, where: str) -> None:
    """! Bit rot is never silently older data."""
    vol = two_versions(rig, sync=True)
    segment = vol.segments()[0]
    segment.flip(segment.data_at(1) + 7 if where == "data" else segment.record_at(1) + 3)
    with pytest.raises(CorruptLog) as caught:
        vol.open()
    assert "0000000000000001.seg" in str(caught.value)
    assert "record 1" in str(caught.value)


def test_replay_goes_on_behind_a_bad_record(rig: CoreRig) -> None:
    vol = two_versions(rig, sync=False)
    vol.open()
    vol.core.pwrite(SECTOR, pattern(3, SECTOR))
    vol.close()
    segment = vol.segments()[0]
    segment.flip(segment.data_at(0))
    vol.open()
    assert vol.recovery.dropped == 1
    assert vol.core.pread(0, 2 * SECTOR) == pattern(2, SECTOR) + pattern(3, SECTOR)


def test_a_sync_covers_segments_before_its_own(rig: CoreRig) -> None:
    vol = rig.vol(always_verify=True)
    vol.core.pwrite(0, pattern(1, 20 * SECTOR))
    vol.core.flush()
    vol.close()
    first = vol.segments()[0]
    saved = first.path.read_bytes()
    first.flip(first.data_at(15))
    with pytest.raises(CorruptLog):
        vol.open()
    first.path.write_bytes(saved)
    first.flip(5)  # its header, both copies
    first.flip(SECTOR + 5)
    with pytest.raises(CorruptLog):
        vol.open()
    first.path.unlink()
    with pytest.raises(CorruptLog) as caught:
        vol.open()
    assert "missing" in str(caught.value)
    first.path.write_bytes(saved)
    vol.open()
    assert vol.core.pread(0, 20 * SECTOR) == pattern(1, 20 * SECTOR)


def test_a_header_that_never_arrived_costs_only_its_segment(rig: CoreRig) -> None:
    vol = rig.vol(always_verify=True)
    vol.core.pwrite(0, pattern(1, 16 * SECTOR))
    vol.core.flush()
    vol.core.pwrite(0, pattern(2, 16 * SECTOR))
    vol.close()
    with vol.segments()[1].path.open("r+b") as file:
        file.write(bytes(2 * SECTOR))
    vol.open()
    with pytest.raises(CoreError) as caught:
        vol.core.pread(1, 1)
    assert "header" not in str(caught.value)  # an error of its own, not what was overlooked before
    assert vol.core.pread(0, 16 * SECTOR) == pattern(1, 16 * SECTOR)
    vol.core.pwrite(0, pattern(3, SECTOR), fua=True)
    assert vol.core.info().last_seq == 3
    vol.reopen()
    assert vol.core.pread(0, 16 * SECTOR) == pattern(3, SECTOR) + pattern(1, 16 * SECTOR)[SECTOR:]
    vol.commit()
    assert vol.core.pread(0, 16 * SECTOR) == pattern(3, SECTOR) + pattern(1, 16 * SECTOR)[SECTOR:]
    assert not vol.segments()


@pytest.mark.parametrize("damage", ["data", "record", "header", "missing"])
def test_what_was_dropped_once_stays_dropped(rig: CoreRig, damage: str) -> None:
    """Syncs after a recovery do not vouch for what that recovery did not find."""
    vol = rig.vol(always_verify=True)
    vol.core.pwrite(0, pattern(1, SECTOR))
    vol.core.flush()
    vol.core.pwrite(0, pattern(2, SECTOR))
    vol.core.pwrite(SECTOR, pattern(3, SECTOR))
    vol.core.seal()
    vol.core.pwrite(2 * SECTOR, pattern(4, SECTOR))
    vol.core.seal()
    vol.core.pwrite(3 * SECTOR, pattern(5, SECTOR))
    vol.close()
    first, second, _ = vol.segments()
    match damage:
        case "data":
            first.flip(first.data_at(2) + 9)
        case "record":
            first.flip(first.record_at(2) + 9)
        case "header":
            second.flip(40)
            second.flip(SECTOR + 40)
        case _:
            second.path.unlink()
    whole = damage in ("data", "record")
    want = pattern(1 if whole else 2, SECTOR) + pattern(3, SECTOR)
    want += (pattern(4, SECTOR) if whole else bytes(SECTOR)) + pattern(5, SECTOR)
    vol.open()
    assert vol.core.pread(0, 4 * SECTOR) == want
    for i in range(3):
        vol.core.pwrite(8 * SECTOR, pattern(i, SECTOR))
        vol.core.flush()
        vol.core.seal()
        vol.core.flush()
        vol.reopen()
        assert vol.core.pread(0, 4 * SECTOR) == want
        assert vol.core.pread(8 * SECTOR, SECTOR) == pattern(i, SECTOR)
    # What was synced before the damage, and what is synced since, is still vouched for.
    vol.close()
    last = vol.segments()[-1]
    last.flip(last.data_at(0))
    with pytest.raises(CorruptLog):
        vol.open()
    last.flip(last.data_at(0))
    first.flip(first.data_at(0))
    with pytest.raises(CorruptLog):
        vol.open()
    first.flip(first.data_at(0))
    vol.open()
    vol.commit()
    assert vol.core.pread(0, 4 * SECTOR) == want


# -- other writers ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "says"),
    [({"log_id": b"L" * 16}, "another log of this volume"), ({"volume_id": b"V" * 16}, "another volume")],
)
def test_a_foreign_log_is_refused_and_left_alone(rig: CoreRig, other: dict[str, bytes], says: str) -> None:
    """! A directory of another log is never replayed and never deleted."""
    vol = rig.vol()
    vol.core.pwrite(0, pattern(1, SECTOR))
    vol.close()
    before = vol.segments()[0].path.read_bytes()
    with pytest.raises(CoreError) as caught:
        Vol(rig, vol.dir, 1 << 20, **other).open()
    assert says in str(caught.value)
    assert vol.segments()[0].path.read_bytes() == before
    vol.open()
    assert vol.core.pread(0, SECTOR) == pattern(1, SECTOR)


def test_records_of_a_writer_that_lost_the_log_do_not_count(rig: CoreRig) -> None:
    """! What a dying process appends after another took the log over is behind the end of its segment."""
    vol = rig.vol(always_verify=True)
    vol.core.pwrite(0, pattern(1, SECTOR))
    taken_over = vol.segments()[0].path.read_bytes()
    vol.core.pwrite(0, pattern(2, SECTOR))  # the old writer, after the take-over
    vol.close()
    path = vol.segments()[0].path
    late = path.read_bytes()
    path.write_bytes(taken_over)
    vol.open()
    assert vol.core.pread(0, SECTOR) == pattern(1, SECTOR)
    vol.core.pwrite(SECTOR, pattern(3, SECTOR))
    path.write_bytes(late)
    vol.reopen()
    assert vol.core.pread(0, 2 * SECTOR) == pattern(1, SECTOR) + pattern(3, SECTOR)
    vol.commit()
    assert vol.core.pread(0, 2 * SECTOR) == pattern(1, SECTOR) + pattern(3, SECTOR)


def test_an_empty_or_short_file_is_no_data(rig: CoreRig) -> None:
    vol = rig.vol(always_verify=True)
    vol.core.pwrite(0, pattern(1, SECTOR))
    vol.close()
    (vol.dir / "0000000000000002.seg").write_bytes(b"")
    (vol.dir / "0000000000000003.seg").write_bytes(b"GLIDELOG" + bytes(20))
    (vol.dir / "nonsense").write_bytes(b"x")
    vol.open()
    assert vol.core.pread(0, SECTOR) == pattern(1, SECTOR)
    vol.core.pwrite(0, pattern(2, SECTOR))
    assert vol.core.info().last_seq == 4
    vol.commit()
    assert [path.name for path in vol.dir.iterdir()] == ["nonsense"]


def test_files_of_retired_segments_are_used_again_and_never_believed(rig: CoreRig) -> None:
    """A recycled file is full of old records: none of them may come back."""
    vol = rig.vol(always_verify=True)
    inodes: set[int] = set()
    for round_ in range(4):
        for i in range(64):
            vol.core.pwrite(i * SECTOR, pattern(100 * round_ + i, SECTOR))
        inodes |= {segment.path.stat().st_ino for segment in vol.segments()}
        vol.commit()
    want = b"".join(pattern(300 + i, SECTOR) for i in range(64))
    vol.core.pwrite(0, pattern(77, SECTOR))
    assert vol.segments()[0].path.stat().st_ino in inodes  # else this tests nothing
    copy = vol.dir.parent / "copy"
    shutil.copytree(vol.dir, copy)
    twin = Vol(rig, copy, vol.config["size"], always_verify=True)
    twin.base, twin.committed_seq = vol.base, vol.committed_seq
    twin.open()
    assert twin.recovery.records == 1
    assert twin.core.pread(0, 64 * SECTOR) == pattern(77, SECTOR) + want[SECTOR:]
    assert vol.core.pread(0, 64 * SECTOR) == pattern(77, SECTOR) + want[SECTOR:]
