"""Extended headers: requests and replies of 64-bit lengths, beside what structured replies do."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from nbd_client import (
    BLOCK_STATUS,
    CACHE,
    DF,
    EXTENDED,
    EXTENDED_MAGIC,
    FLUSH,
    FUA,
    NONE,
    OFFSET_DATA,
    OFFSET_HOLE,
    PAYLOAD_LEN,
    READ,
    REQ_ONE,
    TRIM,
    WRITE,
    WRITE_ZEROES,
    Extent,
    RawClient,
    RequestFailed,
    extended_request,
    request,
)
from nbd_fakes import GIB, Bench
from nbd_serve import MIB, Served

from glidefs.core.volume import Changed, NbdModes
from glidefs.transport.nbd.proto import Option, Reply

SECTOR = 4096
TIB = 1 << 40
SIZE = 40 * TIB


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with Served(tmp_path) as made:
        made.add("disk", SIZE)
        yield made


@pytest.fixture
def client(served: Served) -> Iterator[RawClient]:
    with RawClient(served.path) as made:
        made.greet().extend()
        (made.context,) = made.contexts("disk", "base:allocation").values()
        made.go("disk")
        yield made


# ---- handshake ----


@pytest.mark.parametrize("first", [False, True])
def test_they_include_structured_replies(bench: Bench, first: bool) -> None:
    with bench.connect() as client:
        client.greet()
        if first:
            client.structured()
        client.extend()
        assert client.contexts("disk", "base:allocation", "glidefs:changed:3")
        client.go("disk")
        (conn_id,) = bench.core.wait_attached()
        assert bench.core.modes[conn_id] == NbdModes(
            structured=True, allocation=True, changed=(3,), extended=True
        )


def test_what_may_not_follow(bench: Bench) -> None:
    with bench.connect() as client:
        client.greet()
        assert client.ask(Option.EXTENDED_HEADERS, b"x")[-1].kind == Reply.ERR_INVALID
        client.extend()
        assert client.ask(Option.EXTENDED_HEADERS)[-1].kind == Reply.ERR_INVALID
        assert client.ask(Option.STRUCTURED_REPLY)[-1].kind == Reply.ERR_EXT_HEADER_REQD
        assert client.go("disk").size == GIB
    with bench.connect() as client:
        client.greet().extend()
        client.option(Option.EXPORT_NAME, b"disk")
        assert client.hung_up()


# ---- transmission ----


def test_every_command(client: RawClient) -> None:
    data = os.urandom(MIB)
    client.pwrite(7 * TIB, data, FUA)
    client.flush()
    assert client.pread(7 * TIB, MIB) == data
    assert client.read_sparse(7 * TIB - MIB, 2 * MIB) == (
        bytes(MIB) + data,
        [Extent(MIB, 3), Extent(MIB, 0)],
    )
    (chunk,) = client.ask_chunks(READ, 7 * TIB - SECTOR, 2 * SECTOR, DF)
    assert (chunk.kind, chunk.data[8:]) == (OFFSET_DATA, bytes(SECTOR) + data[:SECTOR])
    (chunk,) = client.ask_chunks(READ, 0, 32 * MIB)
    assert (chunk.kind, len(chunk.data)) == (OFFSET_HOLE, 12)
    (chunk,) = client.ask_chunks(READ, 0, 0)
    assert (chunk.kind, chunk.data) == (NONE, b"")
    client.call(CACHE, 0, 20 * TIB)
    client.call(FLUSH, 12345 * 512, 0)  # what has no meaning is repeated all the same
    client.disconnect()
    assert client.hung_up()


def test_lengths_of_64_bits(client: RawClient) -> None:
    """A discard and a write of zeroes of terabytes are one request; a status goes by terabytes."""
    assert client.allocation(SIZE, SIZE) == [Extent(SIZE, 3)]  # page by page of the manifest, the first time
    assert client.block_status(0, SIZE) == [Extent(TIB, 3)]
    assert client.block_status(TIB - 512, TIB) == [Extent(TIB, 3)]
    for at in (TIB, 20 * TIB, 39 * TIB):
        client.pwrite(at, os.urandom(SECTOR))
    gap = 19 * TIB - SECTOR
    assert client.allocation(SIZE, SIZE) == [
        *(Extent(TIB, 3), Extent(SECTOR, 0), Extent(gap, 3), Extent(SECTOR, 0)),
        *(Extent(gap, 3), Extent(SECTOR, 0), Extent(TIB - SECTOR, 3)),
    ]
    assert client.block_status(0, SIZE, REQ_ONE) == [Extent(TIB, 3)]
    client.call(TRIM, 0, 20 * TIB)
    assert client.allocation(SIZE, SIZE)[0] == Extent(20 * TIB, 3)
    client.call(WRITE_ZEROES, SECTOR, SIZE - SECTOR, flags=FUA)
    assert client.allocation(SIZE, SIZE) == [Extent(SIZE, 3)]
    client.call(WRITE_ZEROES, 512, SIZE - 1024)  # parts of sectors are written as data
    ends = Extent(SECTOR, 0)
    assert client.allocation(SIZE, SIZE) == [ends, Extent(SIZE - 2 * SECTOR, 3), ends]
    assert client.pread(39 * TIB, SECTOR) == bytes(SECTOR)


def test_contexts_of_snapshots(served: Served) -> None:
    core = served.volumes[1]
    served.windows = lambda fault: Changed(0, SIZE // SECTOR, False, (1 << 31, (1 << 31) + 1), 0)
    mine, theirs = socket.socketpair()
    core.attach_nbd(theirs.detach(), 1, NbdModes(structured=True, changed=(7,), extended=True))
    with RawClient(mine) as client:
        client.extended, client.context = True, 2
        at = (1 << 31) * SECTOR
        assert client.block_status(0, SIZE) == [Extent(TIB, 0)]
        assert client.allocation(SIZE, SIZE) == [
            *(Extent(at, 0), Extent(SECTOR, 1), Extent(SIZE - at - SECTOR, 0))
        ]
        client.disconnect()


@pytest.mark.parametrize(
    ("kind", "offset", "length", "flags", "code"),
    [
        (READ, 0, 32 * MIB + 512, 0, errno.EINVAL),
        (READ, 0, 1 << 63, 0, errno.EINVAL),
        (READ, SIZE, 512, 0, errno.EINVAL),
        (TRIM, 512, SIZE, 0, errno.EINVAL),
        (TRIM, (1 << 64) - 512, 1024, 0, errno.EINVAL),
        (WRITE_ZEROES, 512, (1 << 64) - 512, 0, errno.ENOSPC),
        (BLOCK_STATUS, 0, 0, 0, errno.EINVAL),
        (BLOCK_STATUS, 0, SIZE + 512, 0, errno.EINVAL),
        (BLOCK_STATUS, (1 << 64) - 512, 1024, 0, errno.EINVAL),
        (CACHE, 512, SIZE, 0, errno.EINVAL),
        (CACHE, (1 << 64) - 512, 1024, 0, errno.EINVAL),
        (READ, 0, 512, 1 << 9, errno.EINVAL),
        (99, 0, 512, 0, errno.EINVAL),
    ],
)
def test_what_is_refused(
    client: RawClient, kind: int, offset: int, length: int, flags: int, code: int
) -> None:
    with pytest.raises(RequestFailed) as caught:
        client.ask_chunks(kind, offset, length, flags)
    assert caught.value.errno == code
    assert caught.value.message
    assert client.pread(0, 512) == bytes(512)


@pytest.mark.parametrize("kind", [READ, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS, 50])
def test_a_payload_where_none_belongs_is_thrown_away(client: RawClient, kind: int) -> None:
    """The stream goes on behind it."""
    payload = b"\x25\x60\x95\x13" * 512
    client.offsets[9] = 0
    client.send(extended_request(kind, 9, 0, len(payload), PAYLOAD_LEN) + payload)
    with pytest.raises(RequestFailed) as caught:
        client.chunks(9)
    assert caught.value.errno == errno.EINVAL
    assert client.pread(0, 512) == bytes(512)


def test_writes(client: RawClient) -> None:
    """A write without the flag is one all the same; one that is too long is refused and skipped."""
    data = os.urandom(SECTOR)
    client.offsets |= {7: SECTOR, 8: 0}
    client.send(extended_request(WRITE, 7, SECTOR, SECTOR) + data)
    assert client.chunks(7)[0].kind == NONE
    assert client.pread(SECTOR, SECTOR) == data
    client.send(extended_request(WRITE, 8, 0, 32 * MIB + 512, PAYLOAD_LEN))
    client.send(bytes(32 * MIB + 512))
    with pytest.raises(RequestFailed):
        client.chunks(8)
    assert client.pread(SECTOR, SECTOR) == data


@pytest.mark.parametrize(
    "header",
    [
        request(READ, 1, 0, 512) + bytes(8),
        extended_request(WRITE, 1, 0, 1 << 32, PAYLOAD_LEN),
        extended_request(WRITE, 1, 0, (1 << 64) - 1),
        extended_request(READ, 1, 0, 1 << 40, PAYLOAD_LEN),
        EXTENDED.pack(EXTENDED_MAGIC + 1, 0, READ, 1, 0, 512),
    ],
)
def test_what_ends_the_connection(client: RawClient, header: bytes) -> None:
    client.send(header)
    assert client.hung_up()


def test_headers_that_come_in_pieces(client: RawClient) -> None:
    stream = b"".join(extended_request(READ, i, i * SECTOR, SECTOR) for i in range(1, 5))
    client.offsets = {i: i * SECTOR for i in range(1, 5)}
    for at in range(0, len(stream), 7):
        client.send(stream[at : at + 7])
    assert sorted(client.chunk().cookie for _ in range(4)) == [1, 2, 3, 4]


def test_an_extended_request_to_others_is_none(served: Served) -> None:
    with RawClient(served.path) as plain:
        plain.greet().structured().go("disk")
        plain.send(extended_request(READ, 1, 0, 512))
        assert plain.hung_up()
