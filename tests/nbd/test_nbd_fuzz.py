"""Any bytes in the transmission phase: errors or a hang-up, never a hang, never harm to others."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import time
from collections.abc import Iterator

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nbd_client import EXTENDED, EXTENDED_MAGIC, REQUEST_MAGIC, RawClient
from nbd_fakes import FakeSnapshots
from nbd_serve import MIB, Served

from glidefs.core.engine import Fault
from glidefs.core.volume import Changed

SIZE = 16 * MIB
PATTERN = os.urandom(4096)

OFFSETS = st.one_of(
    st.integers(0, SIZE // 512).map(lambda n: n * 512),
    st.integers(0, (1 << 64) - 1),
    st.sampled_from([0, SIZE - 512, SIZE, (1 << 63) - 512, (1 << 64) - 512, (1 << 64) - 1]),
)
LENGTHS = st.one_of(
    st.integers(0, 64).map(lambda n: n * 512),
    st.integers(0, 0xFFFFFFFF),
    st.sampled_from([0, 1, 512, 131072, 32 * MIB, 32 * MIB + 1, 0xFFFFFFFF]),
)
KINDS = st.integers(0, 8) | st.integers(0, 0xFFFF)
FLAGS = st.sampled_from([0, 0, 0, 1, 2, 4, 8, 16]) | st.integers(0, 0xFFFF)
PAYLOADS = st.binary(max_size=64) | st.integers(0, 40000).map(lambda n: b"\x5a" * n)


def _frame(magic: int, flags: int, kind: int, offset: int, length: int, payload: bytes) -> bytes:
    return struct.pack(">IHHQQI", magic, flags, kind, 7, offset, length) + payload


def _write(offset: int, length: int) -> bytes:
    return _frame(REQUEST_MAGIC, 0, 1, offset, length, b"\xa5" * length)


MAGICS = st.sampled_from([REQUEST_MAGIC] * 30 + [0, 0x67446698])
FRAMES = st.one_of(
    st.builds(_frame, MAGICS, FLAGS, KINDS, OFFSETS, LENGTHS, PAYLOADS),
    st.builds(_write, st.integers(0, 1000).map(lambda n: n * 512), st.integers(0, 40).map(lambda n: n * 512)),
    st.builds(_frame, MAGICS, st.just(0), st.just(0), OFFSETS, LENGTHS, st.just(b"")),
    st.builds(
        _frame,
        MAGICS,
        st.sampled_from([0, 4, 8]),
        st.sampled_from([0, 5, 7]),
        OFFSETS,
        LENGTHS,
        st.just(b""),
    ),
    st.binary(max_size=100),
)


def _extended(magic: int, flags: int, kind: int, offset: int, length: int, payload: bytes) -> bytes:
    return EXTENDED.pack(magic, flags, kind, 7, offset, length) + payload


def _payload(flags: int, kind: int, offset: int, length: int) -> bytes:
    return _extended(EXTENDED_MAGIC, flags | 32, kind, offset, length, b"\xa5" * length)


LONG = st.one_of(
    LENGTHS,
    st.integers(0, (1 << 64) - 1),
    st.sampled_from([1 << 32, (1 << 32) + 512, SIZE, 1 << 40, (1 << 63), (1 << 64) - 512, (1 << 64) - 1]),
)
EXTENDED_MAGICS = st.sampled_from([EXTENDED_MAGIC] * 30 + [0, REQUEST_MAGIC])
EXTENDED_FRAMES = st.one_of(
    st.builds(_extended, EXTENDED_MAGICS, FLAGS, KINDS, OFFSETS, LONG, PAYLOADS),
    st.builds(
        _payload,
        st.sampled_from([0, 1, 16]),
        st.integers(0, 8),
        st.integers(0, 1000).map(lambda n: n * 512),
        st.integers(0, 40).map(lambda n: n * 512),
    ),
    st.builds(
        _extended,
        st.just(EXTENDED_MAGIC),
        st.sampled_from([0, 4, 8]),
        st.sampled_from([0, 3, 4, 5, 6, 7]),
        OFFSETS,
        LONG,
        st.just(b""),
    ),
    st.binary(max_size=100),
)


def _window(fault: Fault) -> Changed | int:
    """Of one snapshot windows of any length, of the other none."""
    first = fault.block * 32
    if fault.snapshot == 2:
        return errno.ENOENT
    return Changed(first, first + 64, fault.block % 2 == 1, (first + 1, first + 40), 0)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with Served(tmp_path_factory.mktemp("fuzz")) as made:
        made.add("victim", SIZE)
        made.exports["victim"] = msgspec.structs.replace(
            made.exports["victim"], snapshots=FakeSnapshots(1, 2)
        )
        made.windows = _window
        made.add("other", SIZE).pwrite(0, PATTERN)
        yield made


@settings(max_examples=400, deadline=None)
@given(
    frames=st.lists(FRAMES, max_size=12),
    cut=st.integers(0, 1 << 16),
    reads=st.booleans(),
    modes=st.sampled_from(["simple", "structured", "sparse", "sparse"]),
)
def test_any_bytes(served: Served, frames: list[bytes], cut: int, reads: bool, modes: str) -> None:
    stream = b"".join(frames)
    if cut < len(stream):
        stream = stream[:cut]
    with RawClient(served.path) as client:
        client.greet()
        if modes != "simple":
            client.structured()
        if modes == "sparse":
            client.contexts("victim", "base:allocation", "glidefs:changed:1", "glidefs:changed:2")
        _let_loose(served, client, stream, reads)


@settings(max_examples=400, deadline=None)
@given(
    frames=st.lists(EXTENDED_FRAMES, max_size=12),
    cut=st.integers(0, 1 << 16),
    reads=st.booleans(),
    contexts=st.booleans(),
)
def test_any_bytes_with_extended_headers(
    served: Served, frames: list[bytes], cut: int, reads: bool, contexts: bool
) -> None:
    stream = b"".join(frames)
    if cut < len(stream):
        stream = stream[:cut]
    with RawClient(served.path) as client:
        client.greet().extend()
        if contexts:
            client.contexts("victim", "base:allocation", "glidefs:changed:1", "glidefs:changed:2")
        _let_loose(served, client, stream, reads)


def _let_loose(served: Served, client: RawClient, stream: bytes, reads: bool) -> None:
    """Say all of it, and see that the server and other clients go on."""
    client.go("victim")
    client.socket.settimeout(20)
    with contextlib.suppress(ConnectionError):
        _converse(client.socket, stream, reads)
    client.close()
    end = time.monotonic() + 20
    while served.server.connections("victim"):
        assert time.monotonic() < end, "the connection does not end"
        time.sleep(0.001)
    with RawClient(served.path) as good:
        good.greet().go("other")
        assert good.pread(0, 4096) == PATTERN
        good.pwrite(4096, PATTERN)


def _converse(connection: socket.socket, stream: bytes, reads: bool) -> None:
    """Send everything, say that this was all, and read to the end (or leave at once)."""
    connection.setblocking(False)
    end = time.monotonic() + 20
    rest = memoryview(stream)
    while rest:
        assert time.monotonic() < end, "the server neither reads nor hangs up"
        try:
            rest = rest[connection.send(rest) :]
        except BlockingIOError:
            with contextlib.suppress(BlockingIOError):
                if not connection.recv(1 << 20):
                    return
    connection.setblocking(True)
    connection.settimeout(20)
    if not reads:
        return
    connection.shutdown(socket.SHUT_WR)
    while connection.recv(1 << 20):
        pass
