"""Structured replies: reads that say what is a hole, BLOCK_STATUS, CACHE, errors with words."""

from __future__ import annotations

import errno
import os
import struct
import time
from collections.abc import Iterator

import pytest
from nbd_client import (
    BLOCK_STATUS,
    CACHE,
    DF,
    FLUSH,
    FUA,
    NONE,
    OFFSET_DATA,
    OFFSET_HOLE,
    READ,
    REQ_ONE,
    TRIM,
    WRITE,
    Extent,
    RawClient,
    RequestFailed,
)
from nbd_serve import MIB, Served

SIZE = 64 * MIB
TIB = 1 << 40
SECTOR = 4096


@pytest.fixture
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with Served(tmp_path_factory.mktemp("nbd")) as made:
        made.add("disk", SIZE)
        yield made


@pytest.fixture
def client(served: Served) -> Iterator[RawClient]:
    with RawClient(served.path) as made:
        yield made.sparse("disk")


def test_a_hole_sends_no_bytes(client: RawClient) -> None:
    (chunk,) = client.ask_chunks(READ, 512, 32 * MIB - 1024)
    assert (chunk.kind, len(chunk.data)) == (OFFSET_HOLE, 12)
    assert client.read_sparse(4096, 4096) == (bytes(4096), [Extent(4096, 3)])


def test_data_and_holes_in_one_read(client: RawClient) -> None:
    one, two = os.urandom(MIB), os.urandom(SECTOR)
    client.pwrite(MIB, one)
    client.pwrite(5 * MIB - SECTOR, two)
    want = bytes(MIB) + one + bytes(3 * MIB - SECTOR) + two + bytes(MIB)
    data, parts = client.read_sparse(0, 6 * MIB)
    assert data == want
    assert parts == [
        Extent(MIB, 3),
        Extent(MIB, 0),
        Extent(3 * MIB - SECTOR, 3),
        Extent(SECTOR, 0),
        Extent(MIB, 3),
    ]
    data, parts = client.read_sparse(MIB - 512, MIB + 1024)
    assert data == want[MIB - 512 : 2 * MIB + 512]
    assert parts == [Extent(MIB + 1024, 0)]  # edges shorter than a vector is worth


def test_a_read_in_one_piece(client: RawClient) -> None:
    client.pwrite(MIB, b"x" * SECTOR)
    (chunk,) = client.ask_chunks(READ, 0, 4 * MIB, DF)
    assert chunk.kind == OFFSET_DATA
    assert chunk.data == struct.pack(">Q", 0) + bytes(MIB) + b"x" * SECTOR + bytes(3 * MIB - SECTOR)


def test_a_read_of_nothing(client: RawClient) -> None:
    (chunk,) = client.ask_chunks(READ, 0, 0)
    assert (chunk.kind, chunk.data) == (NONE, b"")


def test_many_small_holes_are_sent(client: RawClient) -> None:
    """A reply has a bounded number of parts, whatever is between them."""
    want = bytearray(4 * MIB)
    for at in range(0, 4 * MIB, 2 * SECTOR):
        want[at : at + SECTOR] = os.urandom(SECTOR)
        client.pwrite(at, bytes(want[at : at + SECTOR]))
    data, parts = client.read_sparse(0, 4 * MIB)
    assert data == want
    assert parts == [Extent(4 * MIB, 0)]
    for at in range(0, 32 * MIB, 256 * 1024):
        client.pwrite(at, b"y" * SECTOR)
    chunks = client.ask_chunks(READ, 0, 32 * MIB)
    assert 1 <= len(chunks) <= 130


def test_sectors_that_are_partly_read(client: RawClient) -> None:
    client.pwrite(SECTOR, b"a" * SECTOR)
    for offset, length in (
        (0, 512),
        (3584, 1024),
        (SECTOR + 512, 512),
        (2 * SECTOR - 512, 9 * SECTOR),
        (7680, 512),
    ):
        want = (bytes(SECTOR) + b"a" * SECTOR + bytes(20 * SECTOR))[offset : offset + length]
        assert client.read_sparse(offset, length)[0] == want


def test_block_status_by_sectors(client: RawClient) -> None:
    client.pwrite(SECTOR, b"a" * SECTOR)
    client.pwrite(3 * SECTOR, bytes(512) + b"b" * 512)
    assert client.block_status(0, SIZE) == [
        Extent(SECTOR, 3),
        Extent(SECTOR, 0),
        Extent(SECTOR, 3),
        Extent(SECTOR, 0),
        Extent(SIZE - 4 * SECTOR, 3),
    ]
    assert client.block_status(512, SECTOR) == [Extent(SECTOR - 512, 3), Extent(512, 0)]
    client.call_simple(TRIM, SECTOR, SECTOR)
    assert client.block_status(0, 3 * SECTOR) == [Extent(3 * SECTOR, 3)]


def test_one_extent_if_asked(client: RawClient) -> None:
    client.pwrite(MIB, b"a" * SECTOR)
    assert client.block_status(0, SIZE, REQ_ONE) == [Extent(MIB, 3)]
    assert client.block_status(MIB, SIZE - MIB, REQ_ONE) == [Extent(SECTOR, 0)]
    assert client.block_status(MIB - 512, 512, REQ_ONE) == [Extent(512, 3)]


def test_an_answer_is_bounded(client: RawClient) -> None:
    for at in range(0, 40 * MIB, 2 * SECTOR):
        client.send_write(at, b"z" * SECTOR)
    client.hear_all()
    extents = client.block_status(0, SIZE)
    assert len(extents) == 2048
    assert all(extent.length == SECTOR for extent in extents)
    found = client.allocation(SIZE)
    assert len(found) == 40 * MIB // SECTOR
    assert sum(extent.length for extent in found if not extent.flags) == 20 * MIB


def test_ten_tebibytes_cost_what_is_found(served: Served) -> None:
    """No look at single blocks of a hole: 10 TiB in requests of 4 GiB, with some data and a discard in it."""
    core = served.add("large", 10 * TIB)
    core.pwrite(5 * TIB, b"d" * MIB)
    core.zero(6 * TIB, TIB)
    with RawClient(served.path) as client:
        client.sparse("large")
        client.allocation(10 * TIB, (1 << 32) - MIB)  # every page is known
        faults, begin = core.stats().faults, time.thread_time()
        found = client.allocation(10 * TIB, (1 << 32) - MIB)
        assert time.thread_time() - begin < 5
    assert core.stats().faults == faults <= 81
    assert found == [Extent(5 * TIB, 3), Extent(MIB, 0), Extent(5 * TIB - MIB, 3)]


def test_who_asks_waits_for_the_store(served: Served, client: RawClient) -> None:
    """Parked as a read is, and the connection goes on."""
    served.answering.clear()
    first = client.submit(BLOCK_STATUS, 0, SIZE)
    second = client.submit(FLUSH)
    assert client.reply() == (second, 0)
    served.answering.set()
    (chunk,) = client.chunks(first)
    assert chunk.data[4:] == struct.pack(">II", SIZE, 3)


def test_who_leaves_while_waiting(served: Served) -> None:
    served.answering.clear()
    with RawClient(served.path) as client:
        client.sparse("disk").submit(BLOCK_STATUS, 0, SIZE)
        client.submit(READ, 0, SECTOR)
    served.answering.set()
    with RawClient(served.path) as again:
        assert again.sparse("disk").block_status(0, SIZE) == [Extent(SIZE, 3)]


@pytest.mark.parametrize(
    ("kind", "offset", "length", "flags"),
    [
        (BLOCK_STATUS, 0, 0, 0),
        (BLOCK_STATUS, SIZE, 512, 0),
        (BLOCK_STATUS, SIZE - 512, 1024, 0),
        (BLOCK_STATUS, (1 << 64) - 512, 1024, 0),
        (BLOCK_STATUS, 1, 512, 0),
        (BLOCK_STATUS, 0, 511, 0),
        (BLOCK_STATUS, 0, 512, DF),
        (READ, 0, 512, REQ_ONE),
        (READ, SIZE, 512, 0),
        (READ, 0, 33 * MIB, 0),
        (CACHE, SIZE - 512, 1024, 0),
        (CACHE, 0, 512, DF),
        (8, 0, 0, 0),
    ],
)
def test_errors_have_words(client: RawClient, kind: int, offset: int, length: int, flags: int) -> None:
    with pytest.raises(RequestFailed) as caught:
        client.ask_chunks(kind, offset, length, flags)
    assert caught.value.errno == errno.EINVAL
    assert "beyond the end" in caught.value.message
    client.pwrite(0, b"x" * 512)
    assert client.read_sparse(0, 512)[0] == b"x" * 512


def test_a_read_only_export(served: Served) -> None:
    served.add("view", SIZE, read_only=True)
    with RawClient(served.path) as client:
        client.sparse("view")
        assert client.block_status(0, SIZE) == [Extent(SIZE, 3)]
        client.call_simple(CACHE, 0, MIB)
        with pytest.raises(RequestFailed) as caught:
            client.chunks(client.submit(WRITE, 0, 512, data=bytes(512)))
        assert caught.value.errno == errno.EPERM
        assert "read-only" in caught.value.message


def test_cache_fetches_and_sends_nothing(served: Served, client: RawClient) -> None:
    core = served.volumes[1]
    client.call_simple(CACHE, 0, MIB)
    faults = core.stats().faults
    assert faults
    assert client.read_sparse(0, MIB)[0] == bytes(MIB)
    assert core.stats().faults == faults
    client.call_simple(CACHE, 0, SIZE)  # longer than what is fetched
    client.call_simple(CACHE, 0, 0)


def test_without_the_context_there_is_no_status(served: Served) -> None:
    with RawClient(served.path) as client:
        client.greet().structured().go("disk")
        with pytest.raises(RequestFailed) as caught:
            client.ask_chunks(BLOCK_STATUS, 0, SIZE)
        assert caught.value.errno == errno.EINVAL
    with RawClient(served.path) as plain:
        plain.greet().go("disk")
        for kind, flags in ((BLOCK_STATUS, 0), (READ, DF)):
            with pytest.raises(RequestFailed):
                plain.call(kind, 0, 512, flags=flags)
        assert plain.pread(0, 512) == bytes(512)
        plain.call(CACHE, 0, MIB)


def test_requests_side_by_side(client: RawClient) -> None:
    """Chunks of one reply are not mixed with those of another, and every request has one."""
    client.pwrite(0, b"a" * MIB)
    want = {client.submit(READ, at, 512 * 1024): at for at in range(0, 16 * MIB, 512 * 1024)}
    want |= {client.submit(BLOCK_STATUS, at, MIB): at for at in range(0, 16 * MIB, MIB)}
    open_ones = set(want)
    while open_ones:
        chunk = client.chunk()
        assert chunk.cookie in open_ones
        if chunk.flags & 1:
            open_ones.remove(chunk.cookie)
    client.pwrite(0, b"b" * 512, FUA)


def test_small_buffers(served: Served, client: RawClient) -> None:
    """A client that reads slowly gets the parts of a reply in order, cut anywhere."""
    want = bytearray(24 * MIB)
    for at in range(0, 24 * MIB, 2 * MIB):
        want[at : at + MIB] = os.urandom(MIB)
        client.pwrite(at, bytes(want[at : at + MIB]))
    for _ in range(3):
        cookie = client.submit(READ, 0, 24 * MIB)
        data = bytearray(24 * MIB)
        while True:
            chunk = client.chunk()
            assert chunk.cookie == cookie
            (at,) = struct.unpack_from(">Q", chunk.data)
            if chunk.kind == OFFSET_DATA:
                data[at : at + len(chunk.data) - 8] = chunk.data[8:]
            time.sleep(0.002)
            if chunk.flags & 1:
                break
        assert data == want
