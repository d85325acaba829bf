"""What clients that stall can take of the host: memory within its budget, for a time within its limit."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from nbd_client import READ, WRITE, RawClient, request
from nbd_serve import MIB, Served
from waiting import wait_for

SIZE = 64 * MIB
MEMORY = 64 * MIB
SLACK = 24 * MIB
"""Of the process besides: the allocator's, the receive buffers of workers, Python's."""


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[[int], Served]]:
    made: list[Served] = []

    def start(stall_ms: int) -> Served:
        served = Served(tmp_path, nbd_memory=MEMORY, nbd_stall_ms=stall_ms)
        made.append(served)
        served.add("disk", SIZE)
        return served

    yield start
    for each in made:
        each.close()


def connect(served: Served) -> RawClient:
    client = RawClient(served.path)
    client.greet().go("disk")
    return client


def resident_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def ask_and_do_not_read(client: RawClient, count: int, length: int = MIB) -> None:
    client.socket.setblocking(False)
    try:
        for i in range(count):
            client.send(request(READ, i, (i % 32) * MIB, length))
    except BlockingIOError:
        pass


def settle(served: Served) -> None:
    """Until the server takes no more."""
    ops = -1
    while ops != (ops := served.volumes[1].stats().ops[0]):
        time.sleep(0.4)


def seconds_for_reads(client: RawClient, count: int = 300) -> float:
    began = time.monotonic()
    for i in range(count):
        assert len(client.pread((i % 512) * 65536, 65536)) == 65536
    return time.monotonic() - began


def test_clients_that_do_not_read_take_no_more_than_the_budget(make: Callable[[int], Served]) -> None:
    served = make(0)
    with connect(served) as fast:
        for at in range(32):
            fast.pwrite(at * MIB, os.urandom(MIB))
        alone = seconds_for_reads(fast)
        before = resident_bytes()
        slow = [connect(served) for _ in range(24)]
        for client in slow:
            ask_and_do_not_read(client, 2000)
        settle(served)
        assert served.engine.stats().nbd_replies <= MEMORY
        assert resident_bytes() - before < MEMORY + SLACK
        beside = min(seconds_for_reads(fast) for _ in range(3))  # the machine may stall in one of them
        assert beside < 5 * alone + 1.0, (alone, beside)
        for client in slow:
            client.close()
    wait_for(lambda: not served.server.connections())


def test_a_client_that_comes_late_gets_its_share(make: Callable[[int], Served]) -> None:
    served = make(0)
    with connect(served) as hog, connect(served) as late:
        ask_and_do_not_read(hog, 2000)
        settle(served)
        for i in range(64):  # more than the memory that the other one left, in all
            late.send(request(READ, i, 0, MIB))
        for _ in range(64):
            assert late.reply()[1] == 0
            late.read(MIB)
        assert len(late.pread(0, 32 * MIB)) == 32 * MIB  # the largest there is


def test_who_takes_nothing_is_cut_off(
    make: Callable[[int], Served], caplog: pytest.LogCaptureFixture
) -> None:
    served = make(4000)
    with connect(served) as slow, connect(served) as other:
        ask_and_do_not_read(slow, 2000)
        wait_for(lambda: len(served.server.connections()) == 1)
        assert len(other.pread(0, MIB)) == MIB
        wait_for(lambda: served.engine.stats().nbd_replies <= 8 * MIB)  # the other's send buffer
    wait_for(lambda: "stall_timeout" in caplog.text)
    caplog.clear()


def test_who_takes_a_little_is_not(make: Callable[[int], Served]) -> None:
    served = make(4000)
    with connect(served) as slow:
        ask_and_do_not_read(slow, 200)
        slow.socket.setblocking(True)
        slow.socket.settimeout(20)
        until = time.monotonic() + 9.0
        taken = 0
        while time.monotonic() < until:
            taken += len(slow.read(256 << 10))
            time.sleep(0.4)  # so slow that the socket does not become writable meanwhile
        assert len(served.server.connections()) == 1
        whole = 16 + MIB
        slow.read(-taken % whole)
        magic, error, _ = struct.unpack(">IIQ", slow.read(16))
        assert (magic, error) == (0x67446698, 0)


def test_who_leaves_a_write_unfinished_is_cut_off(
    make: Callable[[int], Served], caplog: pytest.LogCaptureFixture
) -> None:
    served = make(500)
    with connect(served) as slow:
        slow.send(request(WRITE, 1, 0, 32 * MIB) + bytes(100))
        assert slow.hung_up()
    wait_for(lambda: "stall_timeout" in caplog.text)
    caplog.clear()


def test_a_write_waits_for_memory_and_goes_on(make: Callable[[int], Served]) -> None:
    """Those that wait for the memory of others hold nobody up, and nothing is lost of what they sent."""
    served = make(0)
    with connect(served) as first, connect(served) as second, connect(served) as small:
        first.send(request(WRITE, 1, 0, 32 * MIB) + b"1" * 100)
        wait_for(lambda: served.engine.stats().nbd_payloads >= 32 * MIB)
        second.socket.setblocking(False)
        data = request(WRITE, 2, 32 * MIB, 32 * MIB) + b"2" * (32 * MIB)
        sent = 0
        with contextlib.suppress(BlockingIOError):
            while sent < len(data):
                sent += second.socket.send(data[sent:])
        assert sent < len(data)
        small.pwrite(0, b"s" * 4096)
        assert served.engine.stats().nbd_payloads <= MEMORY * 5 // 4
        first.send(b"1" * (32 * MIB - 100))
        assert first.reply() == (1, 0)
        second.socket.settimeout(20)
        second.send(data[sent:])
        assert second.reply() == (2, 0)
        assert small.pread(32 * MIB, MIB) == b"2" * MIB


def test_a_half_closed_client_gets_what_waits_for_memory(make: Callable[[int], Served]) -> None:
    served = make(0)
    with connect(served) as client:
        for i in range(40):
            client.send(request(READ, i, 0, MIB))
        client.socket.shutdown(socket.SHUT_WR)
        for _ in range(40):
            assert client.reply()[1] == 0
            client.read(MIB)
        assert client.hung_up()
