"""When committed segments go: as late as can be, and never while a handoff is under way."""

from __future__ import annotations

import random
import threading
import time

import pytest
from volume_rig import MIB, Rig

from glidefs.formats.pack import SECTOR
from glidefs.volume.volume import Volume
from glidefs.writing.retire import Retirer


def segments(volume: Volume) -> int:
    return len(list(volume.log_dir.glob("*.seg")))


def commit(volume: Volume, sector: int) -> None:
    volume.core.pwrite(sector * SECTOR, bytes([sector]) * SECTOR)
    volume.drain(20)


def test_committed_segments_stay_until_all_of_them_was_written_again(rig: Rig) -> None:
    host = rig.host()
    volume = rig.create(host)
    for sector in range(20):
        commit(volume, sector)
    assert segments(volume) == 20
    for sector in range(8):
        commit(volume, sector)
    commit(volume, 30)  # after a commit it is looked whether segments are kept for nothing
    assert segments(volume) == 21
    before = volume.core.stats().faults
    assert volume.core.pread(19 * SECTOR, SECTOR) == bytes([19]) * SECTOR
    assert volume.core.stats().faults == before


def test_nothing_is_retired_while_the_host_pauses(rig: Rig) -> None:
    """! A successor has read which segments there are."""
    host = rig.host(retire_fraction=1e-9)
    volume = rig.create(host)
    commit(volume, 1)
    host.pause(20)
    volume.core.pwrite(2 * SECTOR, b"b" * SECTOR)
    seq = volume.core.seal()
    volume.committer.local_segment = seq  # as if it was committed, and all may go
    volume.core.committed(seq)
    count = segments(volume)
    assert count
    host._retirer.make_room()
    time.sleep(0.3)  # the throttle looks, too
    assert segments(volume) == count
    host.resume()
    host._retirer.make_room()
    assert not segments(volume)


def test_writers_that_can_go_on_cost_nothing_that_is_warm(rig: Rig) -> None:
    """They waited, and an upload ended that: the logs are not beyond the mark any more."""
    host = rig.host(engine={"log_limit": 64 * MIB, "segment_bytes": 2 * MIB})
    volume = rig.create(host)
    for first in range(0, 5120, 64):  # 20 MiB
        volume.core.pwrite(first * SECTOR, bytes([1 + first % 251]) * (64 * SECTOR))
    volume.drain(20)
    host._retirer.squeeze(volume)
    assert volume.core.pread(64 * SECTOR, SECTOR) == bytes([65]) * SECTOR
    assert volume.core.stats().faults == 0
    assert volume.core.info().log_bytes > 20 * MIB


def test_logs_that_grow_while_they_are_thinned(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thinning ended as it had got enough; a writer was quicker. The next look thins on, nothing goes."""
    host = rig.host(engine={"log_limit": 64 * MIB, "segment_bytes": 2 * MIB})
    volume = rig.create(host)
    for first in range(0, 5120, 64):  # 20 MiB
        volume.core.pwrite(first * SECTOR, bytes([1 + first % 251]) * (64 * SECTOR))
    volume.drain(20)
    kept = segments(volume)
    looks = iter([True, True, True, True, False])  # not after the first segment
    retirer = Retirer(host.engine, host.settings, host.demoter)  # not that of the thread of the throttle
    retirer.watch(volume)
    monkeypatch.setattr(retirer, "_logs_too_much", lambda fraction: next(looks, fraction < 0.85))
    retirer.make_room()
    assert segments(volume) == kept


def test_what_is_hot_stays_in_a_log_that_fills(rig: Rig) -> None:
    """A working set of 4 MiB, 200 MiB written over a log of 64: the store is asked for nothing."""
    host = rig.host(engine={"log_limit": 64 * MIB, "segment_bytes": 2 * MIB})
    volume = rig.create(host)
    ended, written, newest = threading.Event(), [0], [b""] * 1024
    for sector in range(1024):
        newest[sector] = bytes([1, sector % 251]) * (SECTOR // 2)
        volume.core.pwrite(sector * SECTOR, newest[sector])

    def write() -> None:
        rng = random.Random(3)
        while not ended.is_set():
            info = volume.core.info()
            if info.dirty_bytes > 16 * MIB or info.log_bytes > 54 * MIB:  # never full, though uploads wait
                time.sleep(0.001)
                continue
            sector = rng.randrange(1024 if rng.random() < 0.02 else 64)  # of an old segment some is alive
            newest[sector] = rng.randbytes(16) * (SECTOR // 16)
            volume.core.pwrite(sector * SECTOR, newest[sector])
            written[0] += SECTOR

    writer = threading.Thread(target=write)
    writer.start()
    rng = random.Random(4)
    while written[0] < 200 * MIB:
        volume.drain(60)
        for _ in range(200):
            volume.core.pread(rng.randrange(1024) * SECTOR, SECTOR)
    ended.set()
    writer.join()
    assert volume.core.stats().faults == 0
    for sector in range(1024):
        assert volume.core.pread(sector * SECTOR, SECTOR) == newest[sector]
