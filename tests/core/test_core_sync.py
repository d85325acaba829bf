"""FLUSH and FUA: what is synced when, and what a failed sync means."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from core_rig import (
    CREATE,
    DIR,
    DIR_END,
    MIB,
    SECTOR,
    SYNC,
    SYNC_END,
    WRITE,
    Background,
    CoreRig,
    Vol,
    inject,
    pattern,
    trace,
)
from power_cut import Record, read_trace
from waiting import wait_for

from glidefs.core.check import CoreError
from glidefs.core.engine import EventKind


def trace_of(path: Path) -> list[Record]:
    return read_trace(path.read_bytes())


def sync_events(path: Path) -> list[tuple[int, str]]:
    """(kind, file name) of a trace."""
    return [(record.kind, Path(record.path).name) for record in trace_of(path)]


def write_much(vol: Vol) -> None:
    """So that the next sync takes a while."""
    for offset in range(0, 32 * MIB, 4 * MIB):
        vol.core.pwrite(offset, os.urandom(4 * MIB))


def begin_flush(vol: Vol, path: Path) -> Background:
    """A flush whose sync has begun; ``path`` has the trace from there on."""
    trace(path)
    flush = Background(vol.core.flush)
    wait_for(lambda: any(record.kind == SYNC for record in trace_of(path)), "a sync runs")
    return flush


@pytest.fixture
def traced(tmp_path: Path) -> Callable[[], list[tuple[int, str]]]:
    path = tmp_path / "trace"
    trace(path)

    def stop() -> list[tuple[int, str]]:
        trace(None)
        return sync_events(path)

    return stop


def test_flush_syncs_file_and_directory(rig: CoreRig, traced: Any) -> None:
    vol = rig.vol()
    vol.core.pwrite(0, bytes(SECTOR))
    vol.core.flush()
    vol.core.flush()  # nothing new: no sync
    events = traced()
    name = "0000000000000001.seg"
    assert events.count((SYNC, name)) == 1
    assert events.count((DIR, vol.dir.name)) == 1
    assert events.count((DIR, vol.dir.parent.name)) == 1  # the entry of the log directory itself


def test_a_directory_whose_sync_failed_is_synced_the_next_time(rig: CoreRig, traced: Any) -> None:
    """! One that is there counts as durable: a power cut would take all that was flushed below it."""
    vol = rig.vol()
    inject(DIR, errno.EIO)
    vol.core.pwrite(0, bytes(SECTOR))  # waits, and is tried again
    vol.core.flush()
    assert traced().count((DIR_END, vol.dir.parent.name)) == 1


def test_fua_syncs_after_its_record(rig: CoreRig, traced: Any) -> None:
    vol = rig.vol()
    vol.core.pwrite(0, bytes(SECTOR), fua=True)
    events = [kind for kind, name in traced() if name.endswith(".seg")]
    # header, data and record before the sync begins; the witnesses of the sync, vouch and record, after it
    assert events == [CREATE, WRITE, WRITE, WRITE, SYNC, SYNC + 1, WRITE, WRITE]


def test_a_write_is_data_then_record(rig: CoreRig, tmp_path: Path) -> None:
    """! Else a crash between the two leaves a record for data that is not there."""
    vol = rig.vol()
    path = tmp_path / "trace"
    trace(path)
    for i in range(20):
        vol.core.pwrite(i * SECTOR, pattern(i, SECTOR))
    trace(None)
    writes = [record.offset for record in trace_of(path) if record.kind == WRITE and record.offset]
    data_at = 2 * SECTOR + SECTOR  # two headers and one sector of journal
    assert all(first >= data_at > second for first, second in zip(writes[::2], writes[1::2], strict=True))


def test_a_flush_joins_only_a_sync_that_starts_after_it_came(
    make_rig: Callable[..., CoreRig], tmp_path: Path
) -> None:
    """! What is written while a sync runs is synced by another one before its own flush returns."""
    rig = make_rig(segment_bytes=64 * MIB, log_limit=512 * MIB)
    vol = rig.vol(directory=tmp_path / "on-disk" / "id", size=64 * MIB)
    path = tmp_path / "trace"
    overlaps = 0
    for _ in range(5):
        write_much(vol)
        first = begin_flush(vol, path)
        vol.core.pwrite(48 * MIB, pattern(1, SECTOR))
        vol.core.flush()
        end = path.stat().st_size
        first.result()
        trace(None)
        records = [record for record in trace_of(path) if record.at <= end]
        written = next(i for i, record in enumerate(records) if pattern(1, SECTOR) in record.data)
        kinds = [record.kind for record in records]
        overlaps += SYNC_END not in kinds[:written]
        assert SYNC in kinds[written:], "no sync of what was written before the flush"
        assert SYNC_END in kinds[written + kinds[written:].index(SYNC) :]
    if not overlaps:
        pytest.skip("the disk syncs at once")


def test_a_sync_does_not_vouch_for_the_segment_after_it(
    make_rig: Callable[..., CoreRig], tmp_path: Path
) -> None:
    """A sync that begins between two segments names the first position of the next. That segment is none of
    its business: its header may be lost in a power cut, which is not bit rot."""
    rig = make_rig(segment_bytes=64 * MIB, log_limit=512 * MIB)
    for attempt in range(20):
        vol = rig.vol(directory=tmp_path / f"on-disk-{attempt}" / "id", size=64 * MIB)
        write_much(vol)
        vol.core.seal()
        flush = begin_flush(vol, tmp_path / "trace")
        vol.core.pwrite(0, pattern(2, SECTOR))
        vol.core.seal()
        vol.core.pwrite(SECTOR, pattern(3, SECTOR))
        overlaps = (SYNC_END, "0000000000000001.seg") not in sync_events(tmp_path / "trace")
        flush.result()
        trace(None)
        vol.close()
        if overlaps:
            break
    else:
        pytest.skip("the disk syncs at once")
    with vol.segments()[1].path.open("r+b") as file:
        file.write(bytes(SECTOR))
    vol.open(always_verify=True)
    assert vol.core.pread(SECTOR, SECTOR) == pattern(3, SECTOR)


def test_the_witness_of_a_sync_is_synced_before_its_segment_is_left(rig: CoreRig, traced: Any) -> None:
    """The next header counts the SYNC record in: if it were lost, replay would call that bit rot."""
    vol = rig.vol()
    vol.core.pwrite(0, bytes(SECTOR))
    vol.core.flush()
    vol.core.seal()
    vol.core.sync()
    assert traced().count((SYNC, "0000000000000001.seg")) == 2


def test_a_failed_sync_is_sticky(rig: CoreRig) -> None:
    """! Flush fails until the store has what may be lost; also for the next process."""
    vol = rig.vol()
    vol.core.pwrite(0, pattern(1, SECTOR))
    inject(SYNC, errno.EIO)
    for _ in range(3):
        with pytest.raises(CoreError) as caught:
            vol.core.flush()
        assert caught.value.errno == errno.EIO
    event = rig.events(EventKind.SYNC_FAILED)[0]
    assert (event.a, event.b) == (1, errno.EIO)
    vol.core.pwrite(SECTOR, pattern(2, SECTOR))  # writes go on
    with pytest.raises(CoreError):
        vol.core.pwrite(SECTOR, pattern(2, SECTOR), fua=True)
    vol.reopen()
    with pytest.raises(CoreError):
        vol.core.flush()
    vol.commit(retire=False)
    vol.core.flush()
    vol.core.pwrite(2 * SECTOR, pattern(3, SECTOR), fua=True)
    vol.core.retire(vol.committed_seq)
    assert not list(vol.dir.glob("*.syncfail"))
    assert vol.core.pread(0, 3 * SECTOR) == b"".join(pattern(i, SECTOR) for i in (1, 2, 3))


def test_a_segment_whose_sync_failed_is_verified_on_replay(rig: CoreRig) -> None:
    """! Nobody knows which of its pages reached the disk, even without a power cut."""
    vol = rig.vol()
    vol.core.pwrite(0, pattern(1, SECTOR))
    vol.core.pwrite(0, pattern(2, SECTOR))
    inject(SYNC, errno.EIO)
    with pytest.raises(CoreError):
        vol.core.flush()
    vol.close()
    segment = vol.segments()[0]
    segment.flip(segment.data_at(1) + 100)
    vol.open()
    assert vol.recovery.dropped == 1
    assert vol.core.pread(0, SECTOR) == pattern(1, SECTOR)


def test_no_sync_vouches_for_what_an_earlier_one_lost(rig: CoreRig) -> None:
    """The uploader's sync goes on after a failed one; its witness must not turn a torn write into bit rot."""
    vol = rig.vol()
    vol.core.pwrite(0, pattern(1, SECTOR))
    vol.core.flush()
    vol.core.pwrite(0, pattern(2, SECTOR))
    inject(SYNC, errno.EIO)
    with pytest.raises(CoreError):
        vol.core.flush()
    vol.core.pwrite(SECTOR, pattern(3, SECTOR))
    vol.core.sync()
    vol.close()
    segment = vol.segments()[0]
    segment.flip(segment.data_at(2) + 100)
    vol.open(always_verify=True)
    assert vol.recovery.dropped == 1
    assert vol.core.pread(0, 2 * SECTOR) == pattern(1, SECTOR) + pattern(3, SECTOR)


def test_a_failed_sync_of_the_directory_is_sticky(rig: CoreRig) -> None:
    vol = rig.vol()
    vol.core.pwrite(0, pattern(1, SECTOR))
    inject(DIR, errno.EIO)
    for _ in range(2):
        with pytest.raises(CoreError):
            vol.core.flush()
    vol.commit()
    vol.core.flush()


def test_flush_store_waits_for_the_commit(rig: CoreRig) -> None:
    vol = rig.vol(flush_store=True)
    vol.core.flush()  # nothing to wait for
    vol.core.pwrite(0, bytes(SECTOR))
    flush = Background(vol.core.flush)
    fua = Background(lambda: vol.core.pwrite(SECTOR, bytes(SECTOR), fua=True))
    assert rig.events(EventKind.STORE_FLUSH)[0].a == 1
    wait_for(lambda: vol.core.info().parked == 2, "two that wait")
    vol.core.sync()
    assert not flush.done
    assert not fua.done
    vol.commit()
    flush.result()
    fua.result()
    vol.core.pwrite(0, bytes(SECTOR))
    late = Background(vol.core.flush)
    wait_for(lambda: vol.core.info().parked, "one that waits")
    vol.core.committed(vol.committed_seq)  # an older commit
    assert not late.done
    vol.commit()
    late.result()
