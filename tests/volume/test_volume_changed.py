"""What changed since a snapshot, of real volumes: by manifests alone, exactly where those can tell.

Random histories are in ``tests/model/changed_machine.py``.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import socket
import threading
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nbd_client import BLOCK_STATUS, Extent, RawClient, RequestFailed
from volume_rig import BLOCK, MIB, PREFIX, Rig
from waiting import wait_for

from glidefs.core.volume import NbdModes
from glidefs.errors import GlideError
from glidefs.exports.copies.pins import kept_copy
from glidefs.formats.manifest import PAGE_BYTES, Root, encode_root
from glidefs.formats.pack import CHUNK, PackEntry, PackIndex, encode_records
from glidefs.names import snapshot_key
from glidefs.reading import changed
from glidefs.reading.changed import VolumeSnapshots
from glidefs.volume.volume import Volume

SECTOR = 4096
_ids = itertools.count(1)


def snapshot(rig: Rig, volume: Volume, number: int) -> Root:
    volume.drain(30)
    root, key = kept_copy(volume.root), snapshot_key(PREFIX, volume.root.name, number)
    rig.memory.put(key, encode_root(root, key))
    return root


def connect(volume: Volume, *numbers: int) -> RawClient:
    mine, theirs = socket.socketpair()
    volume.core.attach_nbd(theirs.detach(), next(_ids), NbdModes(structured=True, changed=numbers))
    client = RawClient(mine)
    client.context = 2
    return client


def changed_parts(client: RawClient, size: int, context: int = 2) -> list[tuple[int, int]]:
    """(offset, length) of what may have changed."""
    at, found = 0, []
    for extent in client.map_of(context, size):
        if extent.flags:
            found.append((at, extent.length))
        at += extent.length
    return found


def test_it_is_exact_to_sectors_in_the_log_and_in_the_store(rig: Rig) -> None:
    volume = rig.create(rig.host(), 256 * MIB)
    volume.core.pwrite(0, os.urandom(4 * MIB))
    snapshot(rig, volume, 1)
    client = connect(volume, 1)
    assert changed_parts(client, 256 * MIB) == []
    volume.core.pwrite(MIB + SECTOR, os.urandom(SECTOR))
    volume.core.pwrite(200 * MIB, os.urandom(512))
    volume.core.zero(2 * MIB, 3 * SECTOR)
    want = [(MIB + SECTOR, SECTOR), (2 * MIB, 3 * SECTOR), (200 * MIB, SECTOR)]
    assert changed_parts(client, 256 * MIB) == want
    volume.drain(30)
    assert changed_parts(client, 256 * MIB) == want
    volume.retire_committed()
    assert changed_parts(client, 256 * MIB) == want
    snapshot(rig, volume, 2)
    both = connect(volume, 1, 2)
    assert changed_parts(both, 256 * MIB) == want
    assert changed_parts(both, 256 * MIB, 3) == []
    for each in (client, both):
        each.close()


@pytest.mark.parametrize("whole", [True, False])
def test_compaction(rig: Rig, whole: bool) -> None:
    """Blocks that were one payload stay unchanged; those that become one of several count as changed."""
    host = rig.host(compact_width=2, settle_width=1)
    volume = rig.create(host, 256 * MIB)
    for i in range(4):
        if whole:
            volume.core.pwrite(0, os.urandom(2 * BLOCK))
        else:
            volume.core.pwrite(SECTOR * i, os.urandom(SECTOR))
        volume.drain(30)
    snapshot(rig, volume, 1)
    assert host.compactor.compact(volume, settle=True)
    volume.retire_committed()
    client = connect(volume, 1)
    merged = [] if whole else [(SECTOR, 3 * SECTOR)]  # the bottom is not worth it
    assert changed_parts(client, 256 * MIB) == merged
    volume.core.pwrite(2 * BLOCK, os.urandom(SECTOR))
    volume.drain(30)
    volume.retire_committed()
    assert changed_parts(client, 256 * MIB) == [*merged, (2 * BLOCK, SECTOR)]
    client.close()


def test_no_data_is_read_and_equal_pages_are_skipped(rig: Rig) -> None:
    """The cost is that of what changed: the root, pages and indices of that."""
    host = rig.host()
    size = 80 * PAGE_BYTES
    volume = rig.create(host, size)
    for page in range(40):
        volume.core.pwrite(page * PAGE_BYTES, os.urandom(SECTOR))
    snapshot(rig, volume, 1)
    volume.core.pwrite(7 * PAGE_BYTES, os.urandom(SECTOR))
    volume.drain(30)
    volume.retire_committed()
    host.meta.pages.clear()
    host.meta.indices.clear()
    host.meta._files = None
    client = connect(volume, 1)
    before = dict(rig.memory.requests)
    assert changed_parts(client, size) == [(7 * PAGE_BYTES, SECTOR)]
    asked = {kind: rig.memory.requests[kind] - before.get(kind, 0) for kind in rig.memory.requests}
    assert sum(asked.values()) <= 4, asked  # the snapshot, its page, the page in use, the index of a pack
    assert host.faults.fetches == 0
    client.close()


def test_many_edges(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers that end in the middle of a chunk, and then of the volume's."""
    volume = rig.create(rig.host(), 3 * CHUNK)
    snapshot(rig, volume, 1)
    want = []
    for at in [*range(0, 3 * MIB, 4 * SECTOR), *range(CHUNK, CHUNK + MIB, 2 * SECTOR)]:
        volume.core.pwrite(at, bytes(SECTOR - 8) + at.to_bytes(8, "big"))
        want.append((at, SECTOR))
    volume.drain(30)
    volume.retire_committed()
    for edges, chunks in ((4096, 256), (100, 256), (1, 256), (4096, 1)):
        monkeypatch.setattr(changed, "MAX_EDGES", edges)
        monkeypatch.setattr(changed, "MAX_CHUNKS", chunks)
        client = connect(volume, 1)
        assert changed_parts(client, 3 * CHUNK) == want
        client.close()


def test_a_snapshot_that_is_deleted(rig: Rig) -> None:
    """A clear error, for a client that has the context, and what others ask goes on."""
    host = rig.host()
    volume = rig.create(host, 256 * MIB)
    for number in (1, 2):
        snapshot(rig, volume, number)
    client, other = connect(volume, 1), connect(volume, 2)
    rig.memory.delete(snapshot_key(PREFIX, volume.name, 1))
    with pytest.raises(RequestFailed, match="was deleted") as caught:
        client.block_status(0, MIB)
    assert caught.value.errno == 22
    assert other.block_status(0, MIB) == [Extent(MIB, 0)]
    assert VolumeSnapshots(volume, host.store).listed() == [2]
    client.close()
    other.close()


def test_snapshots_of_an_earlier_volume_of_the_name(rig: Rig) -> None:
    """They lie under the same key, and are not this volume's."""
    host = rig.host()
    first, second = rig.create(host, 256 * MIB, name="a"), rig.create(host, 256 * MIB, name="b")
    snapshot(rig, first, 1)
    snapshot(rig, second, 2)
    root = kept_copy(first.root)
    key = snapshot_key(PREFIX, "b", 1)
    foreign = Root(**{**{f: getattr(root, f) for f in root.__struct_fields__}, "name": "b"})
    rig.memory.put(key, encode_root(foreign, key))
    found = VolumeSnapshots(second, host.store)
    assert found.listed() == [2]
    assert [found.has(number) for number in (1, 2, 3, 1 << 64)] == [False, True, False, False]
    client = connect(second, 1)
    with pytest.raises(RequestFailed, match="was deleted"):
        client.block_status(0, MIB)
    client.close()


def test_damage_is_an_error_and_no_guess(rig: Rig) -> None:
    host = rig.host()
    volume = rig.create(host, 256 * MIB)
    snapshot(rig, volume, 1)
    volume.core.pwrite(0, os.urandom(MIB))
    volume.drain(30)
    volume.retire_committed()
    host.meta.indices.clear()
    host.meta._files = None
    (key,) = rig.packs()
    data = bytearray(rig.memory.get(key).data)
    data[-40] ^= 1
    rig.memory.put(key, bytes(data))
    client = connect(volume, 1)
    with pytest.raises(RequestFailed) as caught:
        client.block_status(0, MIB)
    assert caught.value.errno == 5
    data[-40] ^= 1
    rig.memory.put(key, bytes(data))
    assert client.block_status(0, 2 * MIB) == [Extent(MIB, 1), Extent(MIB, 0)]
    client.close()


def test_while_the_store_is_away_it_waits(rig: Rig) -> None:
    volume = rig.create(rig.host(), 256 * MIB)
    snapshot(rig, volume, 1)
    client = connect(volume, 1)
    rig.memory.set_down(True)
    cookie = client.submit(BLOCK_STATUS, 0, MIB)
    wait_for(lambda: volume.core.info().parked == 1, "it waits")
    rig.memory.set_down(False)
    (chunk,) = client.chunks(cookie)
    assert len(chunk.data) == 12
    client.close()


def test_a_view_of_a_snapshot(rig: Rig) -> None:
    """What is between two snapshots, from either of them."""
    host = rig.host()
    volume = rig.create(host, 256 * MIB)
    old = snapshot(rig, volume, 1)
    volume.core.pwrite(MIB, os.urandom(SECTOR))
    new = snapshot(rig, volume, 2)
    volume.core.pwrite(2 * MIB, os.urandom(SECTOR))
    volume.drain(30)
    for root in (old, new):
        view = open_view(host, root)
        assert VolumeSnapshots(view, host.store).listed() == [1, 2]
        client = connect(view, 1, 2)
        told = [changed_parts(client, 256 * MIB, context) for context in (2, 3)]
        assert sorted(told) == [[], [(MIB, SECTOR)]]
        assert not told[0 if root is old else 1]
        client.close()
        view.close()


def open_view(host: Any, root: Root) -> Volume:
    from volume_rig import record_of

    found: Volume = host.open(record_of(root, read_only=True), root, None)
    return found


def test_under_writes_commits_and_compaction(rig: Rig) -> None:
    """! What was acknowledged before the question is told, whatever goes on meanwhile."""
    host = rig.host(
        engine={"segment_bytes": 64 * SECTOR},
        sync_interval=0.02,
        poll_interval=0.05,
        compaction=True,
        compact_width=3,
        settle_idle=0.05,
        settle_width=1,
        retire_segments=1,
    )
    size = 64 * MIB
    volume = rig.create(host, size)
    volume.core.pwrite(0, os.urandom(size // 2))
    snapshot(rig, volume, 1)
    stop, acknowledged = threading.Event(), list[int]()

    def write(seed: int) -> None:
        choose = random.Random(seed)
        while not stop.is_set():
            sector, count = choose.randrange(size // SECTOR - 16), choose.randrange(1, 16)
            if choose.random() < 0.3:
                volume.core.zero(sector * SECTOR, count * SECTOR)
            else:
                volume.core.pwrite(sector * SECTOR, choose.randbytes(count * SECTOR))
            acknowledged.extend(range(sector, min(sector + count, size // 2 // SECTOR)))

    def merge() -> None:
        while not stop.is_set():
            with contextlib.suppress(GlideError):
                host.compactor.compact(volume, settle=True)
                volume.retire_committed()
            stop.wait(0.02)

    threads = [threading.Thread(target=write, args=(seed,)) for seed in (1, 2)]
    threads.append(threading.Thread(target=merge))
    for thread in threads:
        thread.start()
    try:
        began = time.monotonic()
        client = connect(volume, 1)
        while (took := time.monotonic() - began) < 6 or (took < 60 and volume.root.sequence <= 5):
            before = set(acknowledged)
            said = set[int]()
            for at, length in changed_parts(client, size):
                said.update(range(at // SECTOR, (at + length) // SECTOR))
            assert before <= said
        assert volume.root.sequence > 5
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    client.close()


# ---- the comparison alone ----

ENTRIES = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 255), st.integers(0, 255), st.integers(0, 2)), max_size=4
)


class Packs:
    """Chunk 0 of a manifest of these packs, oldest first."""

    def __init__(self, packs: list[list[tuple[int, int, int, int]]]) -> None:
        self.packs = packs
        self.root = type(
            "R", (), {"last_segment": 0, "size": CHUNK, "inline_page": None, "page_ids": (id(self),)}
        )
        refs = tuple(_Ref(tuple(pack)) for pack in packs)
        self.chunk = type("P", (), {"packs": refs, "chunks": {0: tuple(range(len(refs)))} if refs else {}})

    def page(self, number: int) -> Any:
        assert number == 0
        return self.chunk

    def cached_index(self, ref: _Ref) -> PackIndex:
        entries = {
            block: PackEntry(
                block, mask, zeros & ~mask, 16 if mask else 0, 1 if mask else 0, bytes([tag]) * 16
            )
            for block, mask, zeros, tag in ref.pack
            if mask | zeros
        }
        return PackIndex("", encode_records(entries.values()))

    def sector(self, block: int, sector: int) -> object:
        """Where a sector comes from: a payload and a place in it, or None for zeros."""
        for ref in self.chunk.packs[::-1]:
            entry = self.cached_index(ref).find(block)
            if entry is not None and entry.mask >> sector & 1:
                return entry.hash, entry.mask
            if entry is not None and entry.zero_mask >> sector & 1:
                return None
        return None


class _Ref(tuple[Any, ...]):
    """A pack that is equal to another of the same entries."""

    def __new__(cls, pack: tuple[Any, ...]) -> _Ref:
        return super().__new__(cls, pack)

    @property
    def pack(self) -> tuple[Any, ...]:
        return tuple(self)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(
    shared=st.lists(ENTRIES, max_size=3),
    now=st.lists(ENTRIES, max_size=3),
    then=st.lists(ENTRIES, max_size=3),
    first=st.integers(0, 4),
)
def test_any_two_manifests(shared: list[Any], now: list[Any], then: list[Any], first: int) -> None:
    """! Where a sector comes from elsewhere it is changed; where no pack differs it is not."""
    newer, older = Packs(shared + now), Packs(shared + then)
    told = changed.compare(newer, older, first)  # type: ignore[arg-type]
    assert told.first == first * 32
    touched = {
        (block, i) for pack in now + then for block, m, z, _ in pack for i in range(8) if (m | z) >> i & 1
    }
    for block, sector in itertools.product(range(first, 5), range(9)):
        at = block * 32 + sector
        said = told.changed ^ bool(sum(edge <= at for edge in told.edges) % 2)
        differs = newer.sector(block, sector) != older.sector(block, sector)
        assert said or not differs, (block, sector)
        assert (block, sector) in touched or not said, (block, sector)
    assert list(told.edges) == sorted(set(told.edges))


@given(mask=st.integers(0, (1 << 32) - 1))
def test_bit_runs(mask: int) -> None:
    runs = list(changed.bit_runs(mask))
    assert sum(((1 << end - start) - 1) << start for start, end in runs) == mask
    assert all(one[1] < other[0] for one, other in itertools.pairwise(runs))
