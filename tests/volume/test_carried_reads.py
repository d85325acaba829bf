"""Cold reads by way of the core: from files and from S3, whole and partial blocks, damage, many volumes."""

from __future__ import annotations

import errno
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from bad_s3 import BUCKET, BadS3
from certificates import Tls
from hypothesis import given
from hypothesis import strategies as st
from volume_rig import BLOCK, MIB, Rig
from waiting import wait_for

from glidefs.core.check import CoreError
from glidefs.host.host import Host
from glidefs.reading import carry
from glidefs.reading.ahead import runs_of
from glidefs.reading.carry import Request, Task
from glidefs.reading.reader import block_key
from glidefs.reading.shares import Shares
from glidefs.store.base import ObjectStore
from glidefs.store.file import FileStore
from glidefs.store.s3.client import S3Options
from glidefs.store.s3.store import S3Store
from glidefs.volume.volume import Volume


@pytest.fixture(params=["file", "s3", "s3 over TLS"])
def store(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ObjectStore]:
    if request.param == "file":
        yield FileStore(tmp_path / "store", create=True)
        return
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    context = None
    if request.param == "s3 over TLS":
        tls = Tls(tmp_path)
        context = tls.server
        monkeypatch.setenv("AWS_CA_BUNDLE", str(tls.ca))
    with BadS3(context) as server:
        options = S3Options(endpoint_url=server.endpoint, region="us-east-1", connect_timeout=20.0)
        made = S3Store(BUCKET, "root", options)
        yield made
        made.close()


@pytest.fixture
def rig(tmp_path: Path, store: ObjectStore) -> Iterator[Rig]:
    made = Rig(tmp_path, store)  # type: ignore[arg-type]
    yield made
    for host, _ in list(made.live):
        made.stop(host)


def cold(host: Host, volume: Volume) -> None:
    volume.drain(20)
    volume.retire_committed()
    host.engine.cache.evict_all()


def fill(volume: Volume, rng: random.Random, size: int) -> bytearray:
    """Whole blocks, parts of them, zeros, in several packs; some of it compresses."""
    model = bytearray(size)
    for _ in range(3):
        for _ in range(60):
            count = rng.choice([1, 1, 3, 32, 64])
            at = rng.randrange(size // 4096 - count) * 4096
            data = rng.randbytes(4096) * count if rng.random() < 0.5 else rng.randbytes(4096 * count)
            volume.core.pwrite(at, data)
            model[at : at + len(data)] = data
        at = rng.randrange(size // BLOCK - 2) * BLOCK
        volume.core.zero(at, BLOCK)
        model[at : at + BLOCK] = bytes(BLOCK)
        volume.drain(20)
    return model


def test_what_is_carried_is_what_was_written(rig: Rig) -> None:
    host = rig.host(coalesce_gap=4096)
    rng = random.Random(7)
    volumes = [rig.create(host, 300 * MIB) for _ in range(2)]
    models = [fill(volume, rng, 24 * MIB) for volume in volumes]
    for round_ in range(3):
        for volume in volumes:
            cold(host, volume)
        wrong: list[int] = []

        def read(seed: int, wrong: list[int] = wrong) -> None:
            mine = random.Random(seed)
            for _ in range(40):
                which, at = mine.randrange(2), mine.randrange(24 * MIB // 4096 - 64) * 4096
                length = mine.choice([1, 1, 8, 64]) * 4096
                if volumes[which].core.pread(at, length) != models[which][at : at + length]:
                    wrong.append(at)

        threads = [threading.Thread(target=read, args=(round_ * 10 + i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
    assert volumes[0].core.pread(200 * MIB, BLOCK) == bytes(BLOCK)
    assert host.faults.carrier.begun > 20
    wait_for(lambda: not host.faults.busy, "all faults are answered")
    assert not host.faults.reader.flights
    assert host.store.metrics().requests["get_range"] >= host.faults.carrier.begun


def test_a_sequential_reader_is_carried_ahead(rig: Rig) -> None:
    host = rig.host()
    volume = rig.create(host)
    data = random.Random(3).randbytes(32 * MIB)
    volume.core.pwrite(0, data)
    cold(host, volume)
    assert b"".join(volume.core.pread(at, BLOCK) for at in range(0, len(data), BLOCK)) == data
    assert host.faults.fetches < 128  # of 256 blocks


def test_damage_is_an_error_of_its_block_alone(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    host = rig.host(read_ahead_bytes=0)
    volume = rig.create(host)
    data = random.Random(5).randbytes(16 * BLOCK)
    volume.core.pwrite(0, data)
    cold(host, volume)
    assert volume.core.pread(0, BLOCK) == data[:BLOCK]
    begun = host.faults.carrier.begun
    (key,) = rig.packs()
    whole = rig.memory.get(key).data
    damaged = bytearray(whole)
    damaged[16 + 5 * BLOCK + 9] ^= 1
    rig.memory.put(key, bytes(damaged))
    host.engine.cache.evict_all()
    with pytest.raises(CoreError) as caught:
        volume.core.pread(4 * BLOCK, 4 * BLOCK)
    assert caught.value.errno == errno.EIO
    assert host.faults.carrier.begun > begun
    assert volume.core.pread(6 * BLOCK, 10 * BLOCK) == data[6 * BLOCK :]
    assert any("block 5 cannot be read" in message for message in caplog.messages)
    rig.memory.put(key, whole)
    assert volume.core.pread(0, len(data)) == data


def test_a_pack_that_is_gone_is_asked_of_the_store(rig: Rig) -> None:
    host = rig.host(read_ahead_bytes=0)
    volume = rig.create(host)
    data = random.Random(6).randbytes(2 * BLOCK)
    volume.core.pwrite(0, data)
    cold(host, volume)
    assert volume.core.pread(0, BLOCK) == data[:BLOCK]
    (key,) = rig.packs()
    whole = rig.memory.get(key).data
    rig.memory.delete(key)
    with pytest.raises(CoreError):
        volume.core.pread(BLOCK, BLOCK)
    rig.memory.put(key, whole)
    assert volume.core.pread(BLOCK, BLOCK) == data[BLOCK:]


def test_a_volume_closes_while_it_is_read(rig: Rig) -> None:
    host = rig.host()
    volume = rig.create(host)
    volume.core.pwrite(0, random.Random(8).randbytes(32 * MIB))
    cold(host, volume)

    def read(first: int) -> None:
        try:
            # Far from each other: nothing is read ahead.
            for at in random.Random(first).sample(range(0, 32 * MIB, BLOCK), 32):
                volume.core.pread(at, 4096)
        except Exception:
            return

    threads = [threading.Thread(target=read, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    wait_for(lambda: host.faults.fetches > 4, "reads are under way")
    volume.close()
    for thread in threads:
        thread.join()
    wait_for(lambda: not host.faults.busy and not host.faults.reader.flights, "what was under way has ended")


def test_sources_that_fail_together_fail_once(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A load balancer that resets all connections is no reason to stay away from it for half a minute."""
    now = 100.0
    monkeypatch.setattr(carry, "time", SimpleNamespace(monotonic=lambda: now))
    carrier = rig.host().faults.carrier
    for _ in range(20):
        carrier._judge(-errno.ECONNRESET)
    assert carrier.pausing
    now += 0.1
    assert not carrier.pausing


@given(st.lists(st.integers(0, 60)), st.integers(1, 8))
def test_runs_cover_each_block_once(blocks: list[int], longest: int) -> None:
    runs = list(runs_of(blocks, longest))
    assert [block for first, count in runs for block in range(first, first + count)] == sorted(set(blocks))
    assert all(0 < count <= longest for _, count in runs)


@given(st.lists(st.tuples(st.sampled_from("ptl"), st.integers(1, 4)), max_size=120))
def test_no_volume_takes_more_than_its_share(steps: list[tuple[str, int]]) -> None:
    """Items come in their order, places are never exceeded, and one with none under way is served next."""
    shares: Shares[int] = Shares(16)
    waiting: dict[int, list[int]] = {}
    for number, (step, volume) in enumerate(steps):
        if step == "p":
            shares.put(volume, number)
            waiting.setdefault(volume, []).append(number)
        elif step == "l" and shares.taken[volume]:
            shares.leave(volume)
        elif step == "t":
            turn = shares.take()
            idle = [v for v in waiting if not shares.taken[v]]
            if turn is None:
                assert not waiting or (shares.total >= 16 if idle else shares.total >= 14)
                continue
            which, items = turn
            assert items
            assert items == waiting[which][: len(items)]
            assert not idle or which in idle
            shares.enter(which, len(items))
            assert shares.total <= 16
            waiting[which] = waiting[which][len(items) :]
            if not waiting[which]:
                del waiting[which]
        assert len(shares) == sum(map(len, waiting.values()))


def test_a_service_closes_while_a_thread_waits_for_what_is_carried(rig: Rig) -> None:
    """The thread fetches the block itself, and the service ends."""
    host = rig.host(read_ahead_bytes=0)
    volume = rig.create(host)
    data = random.Random(9).randbytes(BLOCK)
    volume.core.pwrite(0, data)
    cold(host, volume)
    flights = host.faults.reader.flights
    carrier = host.faults.carrier
    key = block_key(volume.manifest(host.store), 0)
    assert key is not None
    assert flights.board([key], [None]) == [True]
    carrier._tasks[1 << 40] = Task(Request(volume, host.faults._reads, 0, -1, False), {0: key})
    ended = threading.Thread(target=host.faults.prefetch, args=(volume, 0, 1))
    ended.start()
    wait_for(lambda: flights._table[key].landed is not None, "the thread waits")
    carrier.close()
    ended.join(20)
    assert not ended.is_alive()
    assert not flights
