"""base:allocation of real volumes: no hole where there is data, and data only in blocks that have some."""

from __future__ import annotations

import itertools
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nbd_client import Extent, RawClient, RequestFailed
from volume_rig import BLOCK, Rig

from glidefs.core.volume import NbdModes
from glidefs.formats.manifest import PAGE_BYTES
from glidefs.formats.pack import CHUNK
from glidefs.store.memory import MemoryStore

SECTOR = 4096
SECTORS = 32
SIZE = PAGE_BYTES + 2 * CHUNK + 3 * SECTOR
HOT = [0, 1, 5, 1023, 1024, 1030, 1 << 20, (1 << 20) + 1024, (1 << 20) + 2047, (1 << 20) + 2048]
"""Blocks that are written to, in five chunks of two pages; the last one is partly beyond the end."""

BLOCKS = st.sampled_from(HOT)
OPS = st.one_of(
    st.tuples(st.just("write"), BLOCKS, st.integers(0, 31), st.integers(1, 32)),
    st.tuples(st.just("write"), BLOCKS, st.integers(0, 31), st.integers(1, 3)),
    st.tuples(st.just("zero"), BLOCKS, st.integers(0, 31), st.integers(1, 64)),
    st.tuples(st.just("discard"), BLOCKS, BLOCKS),
    st.tuples(st.just("zero"), BLOCKS, st.just(0), st.just(32)),
    st.tuples(st.sampled_from(["drain", "retire", "evict", "forget", "restart", "look", "look"])),
)


class World:
    """One volume, and which of its sectors were written and not discarded since."""

    def __init__(self, rig: Rig, host: Any) -> None:
        self.rig, self.host = rig, host
        self.volume = rig.create(host, SIZE)
        self.sectors: dict[int, bytes] = {}
        self.tags = itertools.count(1)
        self.connect()

    def connect(self) -> None:
        mine, theirs = socket.socketpair()
        self.volume.core.attach_nbd(theirs.detach(), 1, NbdModes(structured=True, allocation=True))
        self.client = RawClient(mine)
        self.client.context = 1

    def write(self, block: int, sector: int, count: int) -> None:
        first = block * SECTORS + sector
        count = min(count, SIZE // SECTOR - first)
        if count > 0:
            data = [next(self.tags).to_bytes(8, "little") * (SECTOR // 8) for _ in range(count)]
            self.volume.core.pwrite(first * SECTOR, b"".join(data))
            self.sectors.update(zip(range(first, first + count), data, strict=True))

    def zero(self, block: int, sector: int, count: int) -> None:
        first = block * SECTORS + sector
        self.zero_sectors(first, min(first + count, SIZE // SECTOR))

    def discard(self, one: int, other: int) -> None:
        end = (max(one, other) // 1024 + 1) * CHUNK // SECTOR
        self.zero_sectors(min(one, other) // 1024 * CHUNK // SECTOR, min(end, SIZE // SECTOR))

    def zero_sectors(self, first: int, end: int) -> None:
        if first < end:
            self.volume.core.zero(first * SECTOR, (end - first) * SECTOR)
            for sector in [at for at in self.sectors if first <= at < end]:
                del self.sectors[sector]

    def drain(self) -> None:
        self.volume.drain(30)

    def retire(self) -> None:
        self.volume.drain(30)
        self.volume.retire_committed()

    def evict(self) -> None:
        self.host.engine.cache.evict_all()

    def forget(self) -> None:
        self.host.meta.indices.clear()
        self.host.meta.pages.clear()

    def restart(self) -> None:
        """What is not in the store is in the log."""
        self.client.close()
        self.volume.drain(30)
        root = self.volume.root
        self.volume.close()
        self.volume = self.rig.reopen(self.host, root)
        self.connect()

    def look(self) -> None:
        extents = self.client.allocation(SIZE)
        assert sum(extent.length for extent in extents) == SIZE
        self.check_extents(extents)
        for block in HOT:
            length = min(BLOCK, SIZE - block * BLOCK)
            data, parts = self.client.read_sparse(block * BLOCK, length)
            first = block * SECTORS
            want = (self.sectors.get(first + i, bytes(SECTOR)) for i in range(length // SECTOR))
            assert data == b"".join(want), block
            assert len(parts) == 1 or any(part.flags for part in parts)

    def check_extents(self, extents: list[Extent]) -> None:
        blocks = {sector // SECTORS for sector in self.sectors}
        data: list[tuple[int, int]] = []
        at = 0
        for extent in extents:
            assert extent.flags in (0, 3)
            if not extent.flags:
                data.append((at, at + extent.length))
            at += extent.length
        for start, end in data:
            assert set(range(start // BLOCK, -(-end // BLOCK))) <= blocks, "data where nothing is"
        for sector in self.sectors:
            assert any(start <= sector * SECTOR < end for start, end in data), f"sector {sector} is no hole"

    def close(self) -> None:
        self.client.close()
        self.volume.close()


@pytest.fixture(scope="module")
def shared() -> Iterator[tuple[Rig, Any]]:
    with tempfile.TemporaryDirectory(prefix="glidefs-allocation-") as home:
        rig = Rig(Path(home), MemoryStore())
        host = rig.host()
        yield rig, host
        rig.stop(host)
        rig.differences.close()
        assert rig.differences.lines == []


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(ops=st.lists(OPS, max_size=30))
def test_the_map_is_that_of_what_was_written(shared: tuple[Rig, Any], ops: list[tuple[Any, ...]]) -> None:
    world = World(*shared)
    try:
        for name, *arguments in ops:
            getattr(world, name)(*arguments)
        world.look()
        world.retire()
        world.look()
        world.restart()
        world.look()
    finally:
        world.close()


def test_a_block_that_is_discarded_becomes_a_hole(rig: Rig) -> None:
    """What was known to be data is asked for again once the log has given it back."""
    world = World(rig, rig.host())
    for block in (0, 1, 5):
        world.write(block, 0, 4)
    world.retire()
    world.look()
    world.zero(1, 0, 32)
    world.look()
    world.retire()
    assert world.client.block_status(0, 4 * BLOCK) == [Extent(BLOCK, 0), Extent(3 * BLOCK, 3)]
    world.zero(0, 0, 6 * 32)
    world.retire()
    assert world.client.block_status(0, CHUNK) == [Extent(CHUNK, 3)]
    world.close()


def test_damage_is_an_error_of_the_status(rig: Rig) -> None:
    """Where the index of a pack cannot be had nothing is guessed."""
    host = rig.host()
    world = World(rig, host)
    world.write(0, 0, 1)
    world.retire()
    world.forget()
    host.meta._files = None
    (key,) = rig.packs()
    data = bytearray(rig.memory.get(key).data)
    data[-40] ^= 1
    rig.memory.put(key, bytes(data))
    with pytest.raises(RequestFailed) as caught:
        world.client.block_status(0, CHUNK)
    assert caught.value.errno == 5
    data[-40] ^= 1
    rig.memory.put(key, bytes(data))
    assert world.client.block_status(0, CHUNK) == [Extent(BLOCK, 0), Extent(CHUNK - BLOCK, 3)]
    world.close()
