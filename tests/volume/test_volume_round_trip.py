"""What was drained is what another host reads from the store alone."""

from __future__ import annotations

import os
import random
import threading
import time

import pytest
from volume_rig import BLOCK, MIB, Rig

from glidefs.core.check import Closed

SIZE = 256 * MIB


def write_some(volume, model: bytearray, rng: random.Random, count: int, span: int = SIZE) -> None:
    for _ in range(count):
        length = rng.choice([512, 4096, 8192, 40960, BLOCK, 3 * BLOCK])
        offset = rng.randrange(0, (span - length) // 512) * 512
        if rng.random() < 0.2:
            volume.core.zero(offset, length)
            model[offset : offset + length] = bytes(length)
        else:
            data = rng.randbytes(length)
            volume.core.pwrite(offset, data)
            model[offset : offset + length] = data


def check(volume, model: bytearray, step: int = 1 * MIB) -> None:
    for offset in range(0, len(model), step):
        got = volume.core.pread(offset, min(step, len(model) - offset))
        if got != model[offset : offset + len(got)]:
            first = next(i for i in range(len(got)) if got[i] != model[offset + i])
            pytest.fail(f"differs at {offset + first}")


def test_reads_zeros_when_new(rig: Rig) -> None:
    volume = rig.create(rig.host())
    requests = sum(rig.memory.requests.values())
    assert volume.core.pread(0, 8192) == bytes(8192)
    assert volume.core.pread(SIZE - 4096, 4096) == bytes(4096)
    assert sum(rig.memory.requests.values()) == requests


def test_another_host_reads_what_was_drained(rig: Rig) -> None:
    rng = random.Random(1)
    model = bytearray(SIZE)
    host = rig.host("a")
    volume = rig.create(host, SIZE)
    for _ in range(4):
        write_some(volume, model, rng, 120)
        volume.drain(30)
    check(volume, model)
    name = volume.name
    rig.stop(host)
    other = rig.attach(rig.host("b"), name, take_over=True)
    check(other, model)


def test_reads_from_the_store_after_retire_and_eviction(rig: Rig) -> None:
    rng = random.Random(2)
    model = bytearray(SIZE)
    host = rig.host()
    volume = rig.create(host, SIZE)
    for _ in range(5):
        write_some(volume, model, rng, 100)
        volume.drain(30)
        if rng.random() < 0.7:
            volume.retire_committed()
            host.engine.cache.evict_all()
    volume.retire_committed()
    assert volume.core.info().log_bytes == 0
    host.engine.cache.evict_all()
    check(volume, model)


def test_restart_replays_the_log_and_the_local_manifest(rig: Rig) -> None:
    rng = random.Random(3)
    model = bytearray(SIZE)
    host = rig.host()
    volume = rig.create(host, SIZE)
    write_some(volume, model, rng, 100)
    volume.drain(30)
    write_some(volume, model, rng, 100)  # in the log only
    root = volume.root
    rig.stop(host)
    rig.memory.set_down(True)
    again = rig.reopen(rig.host(), root)
    assert again.status().dirty_bytes > 0
    rig.memory.set_down(False)
    check(again, model)
    again.drain(30)
    other = rig.attach(rig.host("b"), root.name, take_over=True)
    check(other, model)


def test_read_ahead_returns_the_same_bytes(rig: Rig) -> None:
    host = rig.host("a")
    volume = rig.create(host, SIZE)
    data = os.urandom(24 * MIB)
    for at in range(0, len(data), MIB):
        volume.core.pwrite(at, data[at : at + MIB])
    volume.drain(30)
    name = volume.name
    rig.stop(host)
    other = rig.attach(rig.host("b", prefetch_threads=8), name, take_over=True)
    rig.memory.requests.clear()
    rig.memory.latency = 0.003
    for at in range(0, len(data), BLOCK):
        assert other.core.pread(at, BLOCK) == data[at : at + BLOCK]
    # 192 blocks, but windows of many.
    assert rig.memory.requests["get_range"] < 96


def test_no_use_after_close(rig: Rig) -> None:
    volume = rig.create(rig.host())
    volume.close()
    with pytest.raises(Closed):
        volume.core.pread(0, 4096)
    with pytest.raises(Closed):
        volume.drain(1)


def test_everything_at_once(rig: Rig) -> None:
    """Readers and writers against uploads, retirement, compaction and a cache that is too small."""
    host = rig.host(
        engine={"cache_bytes": 24 * BLOCK, "segment_bytes": MIB, "log_limit": 24 * MIB},
        sync_interval=0.03,
        retire_segments=1,
        compaction=True,
        compact_width=5,
        settle_idle=0.1,
        pack_bytes=512 * 1024,
    )
    volumes = [rig.create(host, SIZE) for _ in range(2)]
    lanes = 3
    span = 24 * BLOCK  # of each lane, far apart: lanes share chunks in pairs
    models = {(v, lane): bytearray(span) for v in range(2) for lane in range(lanes)}
    failures: list[str] = []
    began = time.monotonic()

    def goes_on() -> bool:
        """For some seconds, and some more where the machine is busy: until there were commits enough."""
        seconds = time.monotonic() - began
        return seconds < 6 or (seconds < 60 and any(volume.root.sequence <= 5 for volume in volumes))

    def work(v: int, lane: int) -> None:
        rng = random.Random(100 * v + lane)
        model, base, core = models[v, lane], lane * 80 * MIB, volumes[v].core
        while goes_on() and not failures:
            length = rng.choice([512, 4096, 4096, 12288, BLOCK])
            at = rng.randrange(0, (span - length) // 512 + 1) * 512
            kind = rng.random()
            if kind < 0.45:
                data = rng.randbytes(length)
                core.pwrite(base + at, data)
                model[at : at + length] = data
            elif kind < 0.55:
                core.zero(base + at, length)
                model[at : at + length] = bytes(length)
            elif core.pread(base + at, length) != model[at : at + length]:
                failures.append(f"volume {v} lane {lane} at {at}+{length}")

    threads = [threading.Thread(target=work, args=key) for key in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    names = [volume.name for volume in volumes]
    assert all(volume.root.sequence > 5 for volume in volumes)
    for volume in volumes:
        volume.drain(30)
    rig.stop(host)
    other = rig.host("b")
    for v, name in enumerate(names):
        volume = rig.attach(other, name, take_over=True)
        for lane in range(lanes):
            assert volume.core.pread(lane * 80 * MIB, span) == models[v, lane]
