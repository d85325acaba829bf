"""Uploads: what they cost, what they survive, and when they happen."""

from __future__ import annotations

import os
import random
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from waiting import wait_for

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "model"))

from power_cut import read_trace
from volume_rig import BLOCK, MIB, PREFIX, Rig, record_of

from glidefs import clock
from glidefs.core.check import CoreError
from glidefs.core.gather import log_segments
from glidefs.core.testing import DiskKind, disk_inject, disk_trace
from glidefs.errors import AccessDenied
from glidefs.formats.manifest import decode_root
from glidefs.formats.pack import CHUNK, SECTOR
from glidefs.manifest import lease
from glidefs.names import manifest_key, pack_key
from glidefs.volume.volume import DrainTimeout
from glidefs.writing import pace

GIB = 1 << 30


def total(rig: Rig) -> int:
    return sum(rig.memory.requests.values())


def test_a_small_write_to_a_cold_block_asks_nothing_of_the_store(rig: Rig) -> None:
    host = rig.host()
    volume = rig.create(host)
    volume.core.pwrite(0, os.urandom(4 * BLOCK))
    volume.drain(20)
    volume.retire_committed()
    host.engine.cache.evict_all()
    before = total(rig)
    volume.core.pwrite(4096, b"x" * 4096)
    volume.core.flush()
    volume.core.zero(BLOCK, 8192)
    assert volume.core.pread(4096, 4096) == b"x" * 4096
    assert volume.core.pread(BLOCK, 8192) == bytes(8192)
    assert total(rig) == before
    volume.drain(20)
    assert rig.memory.requests["get_range"] == 0
    assert rig.memory.requests["get_suffix"] == 0


def test_scattered_small_writes_cost_what_they_are(rig: Rig) -> None:
    """256 MiB over 64 GiB, scaled down sixteen times: bytes within 1.15, full packs."""
    host = rig.host(engine={"segment_bytes": 4 * MIB}, pack_bytes=2 * MIB)
    volume = rig.create(host, 4 * GIB)
    rng = random.Random(1)
    written = 16 * MIB
    for _ in range(written // 4096):
        volume.core.pwrite(rng.randrange(GIB // 1024) * 4096, rng.randbytes(4096))
    rig.memory.requests.clear()
    volume.drain(60)
    assert rig.pack_bytes() <= 1.15 * written
    assert len(rig.packs()) <= 12
    # One put per pack, and one for the root of the one commit.
    assert rig.memory.requests["put"] <= 12 + 2


def test_compressible_data_is_compressed(rig: Rig) -> None:
    host = rig.host()
    volume = rig.create(host)
    block = (b"all work and no play " * 7000)[:BLOCK]
    for i in range(64):
        volume.core.pwrite(i * BLOCK, block)
    volume.drain(20)
    assert rig.pack_bytes() < 64 * BLOCK / 20
    volume.retire_committed()
    host.engine.cache.evict_all()
    assert volume.core.pread(5 * BLOCK, BLOCK) == block
    # 64 equal blocks are one slot of the cache.
    assert volume.core.pread(0, 64 * BLOCK) == block * 64
    assert host.engine.stats().cache_used == 1


def test_a_rewritten_chunk_drops_its_old_packs(rig: Rig) -> None:
    host = rig.host(pack_bytes=32 * MIB, engine={"segment_bytes": 64 * MIB, "log_limit": 4 * GIB})
    volume = rig.create(host, CHUNK + BLOCK)
    for _ in range(2):
        for at in range(0, CHUNK, MIB):
            volume.core.pwrite(at, bytes([at >> 20 | 1]) * MIB)
        volume.core.pwrite(CHUNK, os.urandom(4096))
        volume.drain(30)
    page = volume.root.inline_page
    assert page is not None
    assert len(page.chunks[1]) == 2
    assert len(page.chunks[0]) == 4
    assert len(page.packs) == 6  # those of the first round are gone but for the last block's


def test_flush_to_the_store_waits_for_the_commit(rig: Rig) -> None:
    host = rig.host()
    volume = rig.create(host, flush="store")
    volume.core.pwrite(0, b"a" * 4096)
    sequence = volume.root.sequence
    volume.core.flush()
    assert volume.root.sequence == sequence + 1
    assert lease.read_root(host.store, PREFIX, volume.name)[0].last_segment > 0
    rig.memory.set_down(True)
    volume.core.pwrite(4096, b"b" * 4096)
    done = threading.Event()
    threads = [threading.Thread(target=lambda: (volume.core.flush(), done.set())) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert not done.wait(0.5)
    rig.memory.requests.clear()
    rig.memory.set_down(False)
    for thread in threads:
        thread.join(10)
    assert done.is_set()
    volume.core.pwrite(8192, b"c" * 4096, fua=True)
    root = lease.read_root(host.store, PREFIX, volume.name)[0]
    assert root == volume.root
    # Four flushes at once share commits: far fewer than one each with retries of an outage aside.
    assert root.sequence <= sequence + 4


def test_an_outage_delays_uploads_and_loses_nothing(rig: Rig) -> None:
    host = rig.host()
    volume = rig.create(host)
    rig.memory.set_down(True)
    data = os.urandom(MIB)
    volume.core.pwrite(0, data)
    volume.core.flush()
    with pytest.raises(DrainTimeout) as caught:
        volume.drain(0.5)
    assert caught.value.temporary
    assert volume.core.pread(0, MIB) == data
    rig.memory.set_down(False)
    started = time.monotonic()
    wait_for(lambda: volume.status().dirty_bytes == 0, "uploaded after the outage")
    assert time.monotonic() - started < 10
    volume.retire_committed()
    host.engine.cache.evict_all()
    assert volume.core.pread(0, MIB) == data


def test_reads_wait_for_the_store(rig: Rig) -> None:
    host = rig.host()
    volume = rig.create(host)
    data = os.urandom(BLOCK)
    volume.core.pwrite(0, data)
    volume.drain(20)
    volume.retire_committed()
    host.engine.cache.evict_all()
    host.meta.indices.clear()
    rig.memory.set_down(True)
    got: list[bytes] = []
    thread = threading.Thread(target=lambda: got.append(volume.core.pread(0, BLOCK)))
    thread.start()
    thread.join(0.8)
    assert thread.is_alive()
    rig.memory.set_down(False)
    thread.join(10)
    assert got == [data]


def test_errors_that_are_not_temporary_are_tried_again_too(rig: Rig) -> None:
    volume = rig.create(rig.host())
    volume.core.pwrite(0, b"a" * 4096)
    rig.memory.fail_next("put", AccessDenied(key="x", op="put"), AccessDenied(key="x", op="put"))
    volume.drain(20)
    assert volume.status().last_error == ""


def test_age_makes_a_volume_due(rig: Rig) -> None:
    volume = rig.create(rig.host(sync_interval=0.2))
    volume.core.pwrite(0, b"a" * 4096)
    wait_for(lambda: volume.root.last_segment > 0, "uploaded by age")
    wait_for(lambda: volume.status().dirty_bytes == 0, "clean")


def test_the_log_limit_makes_writers_wait_not_fail(rig: Rig) -> None:
    host = rig.host(engine={"log_limit": 24 * MIB, "segment_bytes": 2 * MIB})
    volume = rig.create(host)
    data = os.urandom(MIB)
    for i in range(96):
        volume.core.pwrite(i * MIB, data)
    assert host.engine.stats().log_bytes <= 26 * MIB
    volume.drain(30)
    assert volume.core.pread(95 * MIB, MIB) == data


def test_committed_segments_are_kept_as_a_cache_up_to_a_number(rig: Rig) -> None:
    host = rig.host(retire_segments=3)
    volume = rig.create(host)
    for i in range(8):
        volume.core.pwrite(i * 4096, b"x" * 4096)
        volume.drain(20)
    info = volume.core.info()
    assert info.last_seq - info.first_seq + 1 <= 4


def test_segments_are_synced_before_they_are_uploaded(rig: Rig) -> None:
    """! The log never lags behind what the store has from it: data, then directory, then the first put."""
    host = rig.host(engine={"segment_bytes": 16 * 4096})
    volume = rig.create(host)
    path = rig.tmp / "trace"
    unsynced: list[set[str]] = []
    original = rig.memory.put

    def put(key: str, data: Any, **conditions: Any) -> str:
        unsynced.append(unsynced_files(path))
        return original(key, data, **conditions)

    rig.memory.put = put  # type: ignore[method-assign]
    disk_trace(path)
    try:
        volume.core.pwrite(0, os.urandom(BLOCK * 2))
        volume.drain(20)
    finally:
        disk_trace(None)
    assert len(log_segments(volume.log_dir)) > 2
    assert len(unsynced) >= 2  # a pack and the root
    assert not any(unsynced)


def unsynced_files(trace: Path) -> set[str]:
    """The files of a log that were written to, or made in a directory, since the last sync of either."""
    left: set[str] = set()
    for record in read_trace(trace.read_bytes()):
        is_vouch = record.kind == DiskKind.WRITE and SECTOR <= record.offset < 2 * SECTOR
        if is_vouch or record.path.endswith((".witness", ".spare")):
            continue  # what says of a sync that it was done comes after it; a spare holds nothing
        if record.kind in (DiskKind.CREATE, DiskKind.WRITE):
            left.add(record.path)
            if record.kind == DiskKind.CREATE:
                left.add(record.path.rpartition("/")[0])
        elif record.kind in (DiskKind.SYNC_END, DiskKind.DIR_END):
            left.discard(record.path)
    return left


def test_packs_that_took_too_long_are_made_anew(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """! Half of the grace after they were put, the collector may have taken packs that no root names."""
    host = rig.host(gc_grace=200.0)
    volume = rig.create(host)
    original, elapsed = rig.memory.put, clock.elapsed
    packs: list[str] = []

    def put(key: str, data: Any, **conditions: Any) -> str:
        if "/packs/" in key:
            packs.append(key)
            if len(packs) == 1:
                monkeypatch.setattr(clock, "elapsed", lambda: elapsed() + 101.0)
        return original(key, data, **conditions)

    rig.memory.put = put  # type: ignore[method-assign]
    volume.core.pwrite(0, b"a" * 4096)
    volume.drain(20)
    assert len(packs) == 2
    page = volume.root.inline_page
    assert page is not None
    assert [pack_key(PREFIX, pack.id.hex()) for pack in page.packs] == packs[1:]


def test_a_pause_stops_commits(rig: Rig) -> None:
    host = rig.host()
    volume = rig.create(host)
    volume.core.pwrite(0, b"a" * 4096)
    host.pause(20)
    before = total(rig)
    with pytest.raises(DrainTimeout):
        volume.drain(0.3)
    assert total(rig) == before
    host.resume()
    volume.drain(20)


def test_commits_are_prefixes_of_the_writes(rig: Rig) -> None:
    """Each write bumps a counter in two places; any root in the store shows both alike."""
    host = rig.host(sync_interval=0.02, engine={"segment_bytes": 32 * 4096})
    volume = rig.create(host, 2 * CHUNK)
    roots = []
    original = rig.memory.put

    def put(key, data, **conditions):  # type: ignore[no-untyped-def]
        etag = original(key, data, **conditions)
        if key == manifest_key(PREFIX, volume.name):
            roots.append(data)
        return etag

    rig.memory.put = put  # type: ignore[method-assign]
    for i in range(1, 400):
        volume.core.pwrite(0, i.to_bytes(8, "little") * 512)
        volume.core.pwrite(CHUNK, i.to_bytes(8, "little") * 512)
        if i % 40 == 0:
            host.scheduler.request(volume, seal=i % 80 == 0)
            time.sleep(0.01)  # gives the uploader a chance; nothing here depends on it
    volume.drain(20)
    assert len(roots) >= 2
    reader = rig.host("b")
    for data in roots:
        root = decode_root(manifest_key(PREFIX, volume.name), bytes(data))
        snapshot = reader.open(record_of(root, read_only=True), root, None)
        first = int.from_bytes(snapshot.core.pread(0, 512)[:8], "little")
        second = int.from_bytes(snapshot.core.pread(CHUNK, 512)[:8], "little")
        assert second in (first, first - 1)
        snapshot.close()


def test_a_failed_sync_ends_with_an_early_upload(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    host = rig.host()
    volume = rig.create(host)
    volume.core.pwrite(0, b"a" * 4096)
    disk_inject(DiskKind.SYNC_BEGIN, 5)
    with pytest.raises(CoreError):
        volume.core.flush()
    wait_for(lambda: volume.root.last_segment > 0, "uploaded early")
    wait_for(lambda: volume.status().dirty_bytes == 0, "clean")
    volume.core.flush()
    assert any("fdatasync" in record.message for record in caplog.records)
    volume.retire_committed()
    assert volume.core.pread(0, 4096) == b"a" * 4096


def test_an_upload_steps_back_in_a_burst_and_a_drain_does_not_wait(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace, "BURST_RATE", 0)  # it lasts, also where the writer is held up
    monkeypatch.setattr(pace, "BURST_SHARE", 1000)
    host = rig.host(batch_bytes=4 * MIB)
    volume = rig.create(host)
    stop = threading.Event()

    def write() -> None:
        at = 0
        while not stop.is_set():
            volume.core.pwrite(at % (128 * MIB), os.urandom(MIB))
            at += MIB
            stop.wait(0.02)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        wait_for(lambda: volume.core.info().dirty_bytes > 24 * MIB, "a backlog of several batches")
        assert len(rig.packs()) <= 2  # the first one, and the pause after it
        began = time.monotonic()
        volume.drain(30.0)
        assert time.monotonic() - began < 30.0
    finally:
        stop.set()
        writer.join()


def test_retiring_in_the_middle_of_a_commit_is_no_error(rig: Rig) -> None:
    """The local copy is durable, but the core has not heard of the commit yet."""
    host = rig.host()
    volume = rig.create(host)
    heard = volume.committer._on_change

    def retire_first() -> None:
        volume.retire_committed()
        heard()

    volume.committer._on_change = retire_first
    volume.core.pwrite(0, b"x" * 4096)
    volume.drain(20)
    volume.retire_committed()
    assert volume.core.info().first_seq == 0
    assert volume.core.pread(0, 4096) == b"x" * 4096
