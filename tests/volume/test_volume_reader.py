"""Reads of what is not here: verification, sharing, damage."""

from __future__ import annotations

import errno
import os
import shutil
import struct
import threading
import time

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from volume_rig import BLOCK, MIB, PREFIX, Rig, record_of
from waiting import wait_for

from glidefs.core.check import CoreError
from glidefs.errors import AccessDenied
from glidefs.formats.pack import PackEntry, PackIndex, payload_hash
from glidefs.host.host import Host
from glidefs.manifest import lease, local
from glidefs.manifest.keys import merged_key, scoped_key
from glidefs.names import pack_key
from glidefs.reading.ahead import Pace, ReadAhead
from glidefs.reading.fetch import Wanted, plan_ranges
from glidefs.store.base import Object
from glidefs.volume.volume import DrainTimeout, Volume


def test_what_cannot_be_prepared_is_read_all_the_same(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever goes wrong: somebody waits for the block."""
    host = rig.host()
    volume = rig.create(host)
    volume.core.pwrite(0, b"x" * BLOCK)
    cold(host, volume)

    def fail(*_args: object) -> bool:
        raise OSError("the bundle of CAs cannot be read")

    monkeypatch.setattr(host.faults.carrier, "prepare", fail)
    assert volume.core.pread(0, BLOCK) == b"x" * BLOCK


def cold(host: Host, volume: Volume) -> None:
    volume.drain(20)
    volume.retire_committed()
    host.engine.cache.evict_all()


def damage(rig: Rig, key: str, at: int) -> None:
    data = bytearray(rig.memory.get(key).data)
    data[at] ^= 0xFF
    rig.memory.put(key, bytes(data))


def test_a_damaged_payload_is_an_error_not_wrong_data(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    host = rig.host()
    volume = rig.create(host)
    data = os.urandom(4 * BLOCK)
    volume.core.pwrite(0, data)
    cold(host, volume)
    (key,) = rig.packs()
    damage(rig, key, 16 + BLOCK + 5)  # in the payload of block 1
    with pytest.raises(CoreError) as caught:
        volume.core.pread(0, 4 * BLOCK)
    assert caught.value.errno == errno.EIO
    assert volume.core.pread(0, BLOCK) == data[:BLOCK]
    assert volume.core.pread(2 * BLOCK, 2 * BLOCK) == data[2 * BLOCK :]
    assert any("block 1 cannot be read" in record.message for record in caplog.records)
    damage(rig, key, 16 + BLOCK + 5)  # repaired
    assert volume.core.pread(0, 4 * BLOCK) == data


def test_a_damaged_index_is_an_error(rig: Rig) -> None:
    host = rig.host()
    volume = rig.create(host)
    volume.core.pwrite(0, os.urandom(BLOCK))
    cold(host, volume)
    host.meta.indices.clear()
    shutil.rmtree(host.state_dir / "indices")
    (key,) = rig.packs()
    damage(rig, key, -40)
    with pytest.raises(CoreError):
        volume.core.pread(0, 4096)


class Flipping:
    """A store in memory whose answers of one operation are damaged on their way, a few times."""

    def __init__(self, rig: Rig, op: str, times: int, at: int) -> None:
        self.left = times
        real = getattr(rig.memory, op)

        def flipped(key: str, *args: object) -> object:
            found = real(key, *args)
            if not self.left:
                return found
            self.left -= 1
            if isinstance(found, Object):
                return Object(flip(found.data, at), found.etag)
            return (flip(found[0], at), found[1]) if isinstance(found, tuple) else flip(found, at)

        setattr(rig.memory, op, flipped)


def flip(data: bytes, at: int) -> bytes:
    changed = bytearray(data)
    changed[at] ^= 0xFF
    return bytes(changed)


@pytest.mark.parametrize(("op", "at"), [("get_range", 5), ("get_suffix", -40), ("get", -5)])
def test_what_was_damaged_on_its_way_is_fetched_again(
    rig: Rig, caplog: pytest.LogCaptureFixture, op: str, at: int
) -> None:
    """Payload, index, page: each is read right the second time, and nobody sees the first."""
    host = rig.host(read_ahead_bytes=0)
    volume = rig.create(host, 4 << 40)  # of several pages, so that they are objects
    data = os.urandom(BLOCK)
    volume.core.pwrite(0, data)
    cold(host, volume)
    host.meta.indices.clear()
    host.meta.pages.clear()
    shutil.rmtree(host.state_dir / "indices")
    shutil.rmtree(local.page_dir(host.state_dir, volume.id))
    flipping = Flipping(rig, op, 1, at)
    assert volume.core.pread(0, BLOCK) == data
    assert flipping.left == 0
    said = lambda: any("again" in line or "second" in line for line in caplog.messages)  # noqa: E731
    wait_for(said, "the line that says so")


def test_a_wrong_index_that_was_kept_here_is_not_believed(rig: Rig) -> None:
    """Whole by its checksum, but not the pack's: the payload tells, and the store is asked for both."""
    host = rig.host(read_ahead_bytes=0)
    volume = rig.create(host)
    data = [os.urandom(BLOCK), os.urandom(BLOCK)]
    for block in data:
        volume.core.pwrite(0, block)
        volume.drain(20)
    cold(host, volume)
    (first, second) = volume.manifest(host.store).packs(0)
    old = host.meta.index(host.store, PREFIX, first)
    host.meta.indices.put(second.id, PackIndex(pack_key(PREFIX, second.id.hex()), old._data))
    assert volume.core.pread(0, BLOCK) == data[1]


def test_a_pack_that_is_gone_is_an_error(rig: Rig) -> None:
    host = rig.host()
    volume = rig.create(host)
    volume.core.pwrite(0, os.urandom(BLOCK))
    cold(host, volume)
    rig.memory.delete(rig.packs()[0])
    with pytest.raises(CoreError):
        volume.core.pread(0, 4096)


def test_one_flight_for_all_who_wait(rig: Rig) -> None:
    host = rig.host(read_ahead_bytes=0)
    volume = rig.create(host)
    data = os.urandom(BLOCK)
    volume.core.pwrite(0, data)
    cold(host, volume)
    root = volume.root
    view = msgspec.structs.replace(record_of(root, read_only=True), log_id=lease.new_id())
    reader = host.open(view, root, volume.etag)
    rig.memory.requests.clear()
    rig.memory.latency = 0.05
    results: list[bytes] = []
    threads = [
        threading.Thread(target=lambda v=v: results.append(v.core.pread(0, BLOCK)))
        for v in (volume, reader, volume, reader)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert results == [data] * 4
    assert rig.memory.requests["get_range"] == 1


def test_slots_of_an_earlier_process_are_verified(rig: Rig) -> None:
    host = rig.host()
    volume = rig.create(host)
    data = os.urandom(8 * BLOCK)
    volume.core.pwrite(0, data)
    cold(host, volume)
    assert volume.core.pread(0, 8 * BLOCK) == data
    root = volume.root
    cache = host.settings.log_dir.parent / "blocks" / "blocks.data"
    rig.stop(host)
    with cache.open("r+b") as file:
        content = bytearray(file.read())
        at = content.find(data[3 * BLOCK : 3 * BLOCK + 64])
        assert at >= 0
        file.seek(at)
        file.write(b"rotten")
    rig.memory.requests.clear()
    again = rig.reopen(rig.host(read_ahead_bytes=0), root)
    assert again.core.pread(0, 8 * BLOCK) == data
    assert rig.memory.requests["get_range"] == 1  # the rotten one alone


def test_unrelated_volumes_share_blocks_unless_told_otherwise(rig: Rig) -> None:
    for scope, slots in (("host", 1), ("prefix", 1)):
        host = rig.host(scope, cache_scope=scope)
        data = os.urandom(BLOCK)
        volumes = [rig.create(host, 64 * MIB) for _ in range(2)]
        for volume in volumes:
            volume.core.pwrite(0, data)
            cold(host, volume)
        for volume in volumes:
            assert volume.core.pread(0, BLOCK) == data
        assert host.engine.stats().cache_used == slots
    key = os.urandom(16)
    assert scoped_key(key, "a") != scoped_key(key, "b")


def test_merged_keys_depend_on_order_and_masks() -> None:
    a = PackEntry(0, 3, 0, 16, 100, os.urandom(16))
    b = PackEntry(0, 12, 0, 16, 100, os.urandom(16))
    keys = {
        merged_key([a, b]),
        merged_key([b, a]),
        merged_key([a, b._replace(zero_mask=16)]),
        merged_key([a._replace(mask=1), b]),
        a.hash,
    }
    assert len(keys) == 5
    assert merged_key([a._replace(offset=99), b]) == merged_key([a, b])


def test_merged_keys_have_a_name_space_of_their_own() -> None:
    """! No content has the key of a merged block as its hash, not even that which the key is made of."""
    part = PackEntry(0, 3, 0, 16, 100, os.urandom(16))
    assert merged_key([part]) != payload_hash(part.hash + struct.pack("<II", part.mask, part.zero_mask))


def test_a_tiny_cache_still_serves(rig: Rig) -> None:
    host = rig.host(engine={"cache_bytes": 8 * BLOCK})
    volume = rig.create(host)
    data = os.urandom(64 * BLOCK)
    volume.core.pwrite(0, data)
    cold(host, volume)
    threads = [
        threading.Thread(target=lambda: got.append(volume.core.pread(0, 64 * BLOCK) == data))
        for _ in range(3)
    ]
    got: list[bool] = []
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(50)
    assert got == [True] * 3


def test_a_fault_of_a_closed_volume_is_dropped(rig: Rig) -> None:
    host = rig.host()
    volume = rig.create(host)
    volume.core.pwrite(0, os.urandom(BLOCK))
    cold(host, volume)
    host.meta.indices.clear()
    rig.memory.set_down(True)
    failed: list[CoreError | Exception] = []

    def read() -> None:
        try:
            volume.core.pread(0, 4096)
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    while not volume.core.info().parked:
        pass
    volume.close()
    thread.join(10)
    assert len(failed) == 1


def test_a_read_only_export_takes_no_ownership(rig: Rig) -> None:
    host = rig.host("a")
    volume = rig.create(host)
    data = os.urandom(MIB)
    volume.core.pwrite(0, data)
    volume.drain(20)
    other = rig.host("b")
    root, etag = lease.read_root(other.store, PREFIX, volume.name)
    puts = rig.memory.requests["put"]
    reader = other.open(record_of(root, read_only=True), root, etag)
    assert reader.core.pread(0, MIB) == data
    with pytest.raises(CoreError):
        reader.core.pwrite(0, bytes(4096))
    reader.drain()
    reader.close()
    assert rig.memory.requests["put"] == puts


def test_prefetch_of_a_hot_set(rig: Rig) -> None:
    host = rig.host(read_ahead_bytes=0)
    volume = rig.create(host)
    data = os.urandom(32 * BLOCK)
    volume.core.pwrite(0, data)
    cold(host, volume)
    blocks = [5, 6, 7, 20, 1, 2]
    assert host.prefetcher.run(volume, blocks) == 6
    rig.memory.requests.clear()
    for block in blocks:
        assert volume.core.pread(block * BLOCK, BLOCK) == data[block * BLOCK : (block + 1) * BLOCK]
    assert sum(rig.memory.requests.values()) == 0
    assert host.prefetcher.run(volume, range(32), max_bytes=8 * BLOCK) == 8
    assert host.prefetcher.run(volume, range(32), cancelled=lambda: True) == 0


def test_faults_can_be_recorded(rig: Rig) -> None:
    host = rig.host(read_ahead_bytes=0)
    volume = rig.create(host)
    volume.core.pwrite(0, os.urandom(32 * BLOCK))
    cold(host, volume)
    seen: list[tuple[int, int]] = []
    volume.on_fault = lambda first, count: seen.append((first, count))
    for block in (9, 3, 30):
        volume.core.pread(block * BLOCK, 4096)
    assert seen == [(9, 1), (3, 1), (30, 1)]


def test_ranges_join_neighbours_within_bounds() -> None:
    def part(key: str, offset: int, length: int) -> Wanted:
        return Wanted(key, PackEntry(0, 1, 0, offset, length, bytes(16)))

    parts = [part("a", 16, 100), part("a", 116, 100), part("a", 5000, 10), part("b", 216, 10)]
    ranges = plan_ranges(reversed(parts), gap=64, limit=1000)
    assert [(r.key, r.offset, r.length) for r in ranges] == [("a", 16, 200), ("a", 5000, 10), ("b", 216, 10)]
    assert len(plan_ranges(parts, gap=10000, limit=150)) == 4
    assert plan_ranges([], 1, 1) == []


def test_read_ahead_doubles_and_leaves_markers() -> None:
    ahead = ReadAhead()
    assert ahead.on_fault(10, 1, 64, 1000) == []
    (first,) = ahead.on_fault(11, 1, 64, 1000)
    assert (first.first, first.count, first.marker) == (12, 4, 12)
    second = ahead.on_fault(12, 1, 64, 1000)
    assert [(w.first, w.count) for w in second] == [(16, 4)]
    assert ahead.on_fault(13, 1, 64, 1000) == []  # a block that was still on its way
    third = ahead.on_fault(16, 1, 64, 1000)
    assert [(w.first, w.count, w.marker) for w in third] == [(20, 4, 20), (24, 4, 24), (28, 4, 28)]
    assert ahead.on_fault(500, 1, 64, 1000) == []  # elsewhere
    assert ahead.on_fault(400, 1, 64, 1000) == []
    assert ReadAhead().on_fault(0, 1, 0, 1000) == []


@given(
    st.lists(st.tuples(st.integers(0, 300), st.integers(1, 8)), max_size=60),
    st.integers(0, 128),
    st.integers(4, 16),
    st.integers(0, 256),
)
def test_read_ahead_stays_within_its_bounds(
    faults: list[tuple[int, int]], limit: int, piece: int, goal: int
) -> None:
    """Whatever comes: pieces are in the volume, and none is beyond the window."""
    ahead, end = ReadAhead(), 300
    for first, count in faults:
        before = ahead.ahead
        pieces = ahead.on_fault(first, count, limit, end, piece=piece, goal=goal)
        for window in pieces:
            assert window.marker == window.first >= before or first + count > before
            assert 0 < window.count <= piece
            assert window.first + window.count <= min(end, ahead.position + limit)
        assert [w.first for w in pieces] == sorted({w.first for w in pieces})


def test_a_sequential_reader_gets_the_whole_volume_ahead_of_it() -> None:
    """Each block is covered once, by a piece or by a fault, and the window ends at its goal."""
    ahead, covered = ReadAhead(), set[int]()
    for block in range(2000):
        if block in covered and block not in ahead.markers:
            continue
        for window in ahead.on_fault(block, 1, 512, 2000, goal=128):
            mine = set(range(window.first, window.first + window.count))
            assert not mine & covered
            covered |= mine
    assert covered | {0, 1} == set(range(2000))
    assert ahead.window == 128


def test_the_goal_is_bandwidth_times_delay() -> None:
    now = 100.0
    pace = Pace(lambda: now)
    for _ in range(200):
        now += 0.01
        pace.landed(2 * MIB, 0.1)
    assert pace.goal() == pytest.approx(2 * 200 * MIB * 0.1, rel=0.2)
    for _ in range(200):
        now += 0.01
        pace.landed(2 * MIB, 0.001)
    assert pace.goal() == 8 * MIB  # near: the least


def test_a_host_closes_during_an_outage(rig: Rig) -> None:
    host = rig.host()
    volume = rig.create(host)
    volume.core.pwrite(0, os.urandom(BLOCK))
    cold(host, volume)
    host.meta.indices.clear()
    rig.memory.set_down(True)
    volume.core.pwrite(BLOCK, os.urandom(BLOCK))
    errors: list[Exception] = []

    def read() -> None:
        try:
            volume.core.pread(0, 4096)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    with pytest.raises(DrainTimeout):
        volume.drain(0.2)
    started = time.monotonic()
    rig.stop(host)
    assert time.monotonic() - started < 20
    thread.join(20)
    assert len(errors) == 1


def test_reads_that_the_store_refuses_wait_and_say_so(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    host = rig.host()
    volume = rig.create(host)
    data = os.urandom(BLOCK)
    volume.core.pwrite(0, data)
    cold(host, volume)
    rig.memory.fail_next("get_range", AccessDenied(op="get_range"), AccessDenied(op="get_range"))
    assert volume.core.pread(0, BLOCK) == data
    assert any("the store refuses" in record.message for record in caplog.records)
