"""Connections with structured replies that move to another process, with what waits on them."""

from __future__ import annotations

import socket

import pytest
from core_handoff_rig import MakeRig, Pair
from core_rig import BLOCK, MIB, SECTOR, Vol, pattern
from nbd_client import (
    BLOCK_STATUS,
    DF,
    FUA,
    NONE,
    OFFSET_DATA,
    READ,
    REQ_ONE,
    STATUS_EXT,
    WRITE,
    Extent,
    RawClient,
    RequestFailed,
    extended_request,
)
from waiting import wait_for

from glidefs.core import handoff
from glidefs.core.volume import NbdModes

SPARSE = NbdModes(structured=True, allocation=True)
CHUNK = 1024 * BLOCK


def connect(vol: Vol, modes: NbdModes = SPARSE) -> RawClient:
    mine, theirs = socket.socketpair()
    vol.core.attach_nbd(theirs.detach(), 1, modes)
    client = RawClient(mine)
    client.context = 1
    return client


def test_a_structured_connection_goes_on(pair: Pair) -> None:
    client = connect(pair.vol)
    pair.vol.core.pwrite(MIB, pattern(1, SECTOR))
    want = [Extent(MIB, 3), Extent(SECTOR, 0), Extent(MIB - SECTOR, 3)]
    assert client.block_status(0, 2 * MIB) == want
    pair.warm()
    pair.move()
    assert client.block_status(0, 2 * MIB) == want
    data, parts = client.read_sparse(0, 2 * MIB)
    assert (data, parts) == (bytes(MIB) + pattern(1, SECTOR) + bytes(MIB - SECTOR), want)
    with pytest.raises(RequestFailed, match="beyond the end"):
        client.read_sparse(1 << 40, SECTOR)


@pytest.mark.parametrize("structured", [False, True])
def test_modes_are_told(pair: Pair, structured: bool) -> None:
    modes = NbdModes(read_only=True, structured=structured)
    client = connect(pair.vol, modes)
    handoff.freeze(pair.vol.core)
    ((_, connection),) = handoff.connections(pair.vol.core)
    assert connection.modes == modes
    handoff.unfreeze(pair.vol.core)
    client.close()


def test_what_waits_is_asked_again_by_the_new_process(pair: Pair) -> None:
    """Flags included: DF and REQ_ONE mean what they meant."""
    pair.vol.base = {0: pattern(5, BLOCK), 2: pattern(6, BLOCK)}
    client = connect(pair.vol)
    with pair.old.hold():
        asked = [
            client.submit(BLOCK_STATUS, 0, 4 * BLOCK),
            client.submit(BLOCK_STATUS, 0, 4 * BLOCK, REQ_ONE),
            client.submit(READ, 0, 4 * BLOCK, DF),
        ]
        wait_for(lambda: pair.vol.core.info().parked >= 4, "they wait")
        pair.warm()
        pair.move()
    heard = {chunk.cookie: chunk for chunk in (client.chunk() for _ in asked)}
    assert len(heard[asked[0]].data) == 4 + 4 * 8
    assert len(heard[asked[1]].data) == 4 + 8
    assert heard[asked[2]].kind == OFFSET_DATA
    assert heard[asked[2]].data[8:] == pattern(5, BLOCK) + bytes(BLOCK) + pattern(6, BLOCK) + bytes(BLOCK)


def test_a_reply_in_parts_that_is_half_sent(pair: Pair) -> None:
    """Chunks of a reply that the socket did not take go on where they stopped."""
    core = pair.vol.core
    want = bytearray(16 * MIB)
    for at in range(0, 16 * MIB, MIB):
        want[at : at + BLOCK] = pattern(at, BLOCK)
        core.pwrite(at, pattern(at, BLOCK))
    client = connect(pair.vol)
    cookies = [client.submit(READ, 0, 16 * MIB) for _ in range(4)]
    client.read(0)
    wait_for(lambda: not core.info().parked, "the reads are done")
    pair.warm()
    pair.move()
    for cookie in cookies:
        data = bytearray(16 * MIB)
        for chunk in client.chunks(cookie):
            at = int.from_bytes(chunk.data[:8], "big")
            if chunk.kind == OFFSET_DATA:
                data[at : at + len(chunk.data) - 8] = chunk.data[8:]
        assert data == want
    assert client.block_status(0, MIB) == [Extent(BLOCK, 0), Extent(MIB - BLOCK, 3)]


def test_extended_headers_go_on(pair: Pair) -> None:
    """What waits is written out again with its 64 bits, and half a header is received to its end."""
    pair.vol.base = {3: pattern(5, BLOCK)}
    client = connect(pair.vol, NbdModes(structured=True, allocation=True, extended=True))
    client.extended = True
    with pair.old.hold():
        asked = [
            client.submit(BLOCK_STATUS, 0, 64 * MIB),
            client.submit(READ, 3 * BLOCK, BLOCK, DF),
            client.submit(WRITE, 4 * BLOCK + 512, 512, data=b"w" * 512),
        ]
        wait_for(lambda: pair.vol.core.info().parked >= 3, "they wait")
        handoff.freeze(pair.vol.core)
        ((_, connection),) = handoff.connections(pair.vol.core)
        assert connection.modes == NbdModes(structured=True, allocation=True, extended=True)
        assert len(connection.received) == 3 * 32 + 512
        handoff.unfreeze(pair.vol.core)
        client.send(extended_request(READ, 9, 3 * BLOCK, SECTOR)[:17])
        client.offsets[9] = 3 * BLOCK
        pair.warm()
        pair.move()
    client.send(extended_request(READ, 9, 3 * BLOCK, SECTOR)[17:])
    heard = {chunk.cookie: chunk for chunk in (client.chunk() for _ in range(4))}
    assert heard[asked[0]].kind == STATUS_EXT
    assert heard[asked[1]].data[8:] == pattern(5, BLOCK)
    assert heard[asked[2]].kind == NONE
    assert heard[9].data[8:] == pattern(5, SECTOR)
    assert client.pread(4 * BLOCK, 2 * SECTOR) == bytes(512) + b"w" * 512 + bytes(2 * SECTOR - 1024)


def test_a_logged_write_with_an_extended_header(make_rig: MakeRig) -> None:
    """Its FLUSH has the offset of the write, which the reply must repeat."""
    pair = Pair(make_rig, flush_store=True)
    client = connect(pair.vol, NbdModes(structured=True, extended=True))
    client.extended = True
    cookie = client.submit(WRITE, 5 * SECTOR, SECTOR, FUA, pattern(1, SECTOR))
    wait_for(lambda: pair.vol.core.info().parked, "it waits for the store")
    pair.warm()
    pair.move()
    pair.next.commit()
    (chunk,) = client.chunks(cookie)
    assert chunk.kind == NONE
    assert client.pread(5 * SECTOR, SECTOR) == pattern(1, SECTOR)
