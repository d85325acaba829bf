"""Front-ends that are wrong: the device of each stops, with one line, and nothing else does."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import struct
import time
from collections.abc import Callable

import pytest
from core_rig import BLOCK, MIB, pattern
from front_end import INDIRECT, NEXT, OUT, PAGE, USER, WRITE, FrontEnd, Lost, Memory, Region, Ring
from vhost_rig import VhostRig
from waiting import wait_for

from glidefs.transport.vhost_user.messages import Request

MakeVhost = Callable[..., VhostRig]
Wrong = Callable[[FrontEnd], None]

HOLE = 4 * MIB
"""No region is there."""


def offer(guest: FrontEnd, *descriptors: tuple[int, int, int, int], head: int = 0) -> None:
    """Write descriptors from number 0 on, and offer one."""
    ring = guest.rings[0]
    for i, (address, length, flags, following) in enumerate(descriptors):
        ring.put(i, address, length, flags, following)
    ring.offer(head)
    ring.kick()


def parts(guest: FrontEnd) -> tuple[int, int]:
    """A header of a read, and a place for its status."""
    header = guest.memory.alloc(16)
    guest.memory.write(header, struct.pack("<IIQ", 0, 0, 0))
    return header, guest.memory.alloc(16)


def loop(guest: FrontEnd) -> None:
    header, _ = parts(guest)
    offer(guest, (header, 16, NEXT, 1), (header, 16, NEXT, 0))


def no_such_head(guest: FrontEnd) -> None:
    offer(guest, head=guest.num)


def no_such_next(guest: FrontEnd) -> None:
    header, _ = parts(guest)
    offer(guest, (header, 16, NEXT, guest.num))


def buffer_in_a_hole(guest: FrontEnd) -> None:
    header, status = parts(guest)
    offer(guest, (header, 16, NEXT, 1), (HOLE, 512, NEXT | WRITE, 2), (status, 1, WRITE, 0))


def buffer_beyond_a_region(guest: FrontEnd) -> None:
    header, status = parts(guest)
    end = guest.memory.regions[-1].guest + guest.memory.regions[-1].size
    offer(guest, (header, 16, NEXT, 1), (end - 256, 512, NEXT | WRITE, 2), (status, 1, WRITE, 0))


def buffer_that_wraps(guest: FrontEnd) -> None:
    header, status = parts(guest)
    offer(guest, (header, 16, NEXT, 1), ((1 << 64) - 256, 512, NEXT | WRITE, 2), (status, 1, WRITE, 0))


def read_behind_write(guest: FrontEnd) -> None:
    header, status = parts(guest)
    offer(guest, (status, 1, WRITE | NEXT, 1), (header, 16, 0, 0))


def no_status(guest: FrontEnd) -> None:
    header, _ = parts(guest)
    offer(guest, (header, 16, 0, 0))


def short_header(guest: FrontEnd) -> None:
    header, status = parts(guest)
    offer(guest, (header, 15, NEXT, 1), (status, 1, WRITE, 0))


def nothing_at_all(guest: FrontEnd) -> None:
    offer(guest, (0, 0, 0, 0))


def index_jumps(guest: FrontEnd) -> None:
    guest.memory.put16(guest.rings[0].available + 2, guest.num + 2)  # one was answered
    guest.rings[0].kick()


def twice(guest: FrontEnd) -> None:
    """A second time while it is under way: what it reads is not here."""
    pending = guest.prepare(0, 3 * BLOCK // 512, room=4096)
    guest.rings[0].offer(pending.head, pending.head)
    guest.rings[0].kick()


def indirect_in_indirect(guest: FrontEnd) -> None:
    table = guest.memory.alloc(32)
    guest.memory.write(table, struct.pack("<QIHH", table, 16, INDIRECT, 0))
    offer(guest, (table, 16, INDIRECT, 0))


def indirect_and_next(guest: FrontEnd) -> None:
    offer(guest, (guest.memory.alloc(32), 32, INDIRECT | NEXT, 1))


def indirect_of_odd_length(guest: FrontEnd) -> None:
    offer(guest, (guest.memory.alloc(32), 17, INDIRECT, 0))


def indirect_too_long(guest: FrontEnd) -> None:
    offer(guest, (guest.memory.alloc(32), 16 * 1025, INDIRECT, 0))


def indirect_empty(guest: FrontEnd) -> None:
    offer(guest, (guest.memory.alloc(32), 0, INDIRECT, 0))


def indirect_in_a_hole(guest: FrontEnd) -> None:
    offer(guest, (HOLE, 32, INDIRECT, 0))


def indirect_loop(guest: FrontEnd) -> None:
    header, _ = parts(guest)
    table = guest.memory.alloc(32)
    guest.memory.write(table, struct.pack("<QIHH", header, 16, NEXT, 0) * 2)
    offer(guest, (table, 32, INDIRECT, 0))


def file_shrinks(guest: FrontEnd) -> None:
    """All of a region's file goes away, with the memory that a request names."""
    pending = guest.prepare(OUT, 0, out=pattern(1, BLOCK))
    os.ftruncate(guest.memory.regions[-1].fd, 0)
    guest.rings[0].offer(pending.head)
    guest.rings[0].kick()


def rings_file_shrinks(guest: FrontEnd) -> None:
    os.ftruncate(guest.memory.regions[0].fd, 0)
    guest.rings[0].kick()


RINGS: dict[Wrong, str] = {
    loop: "has no end",
    no_such_head: "there is no descriptor 64",
    no_such_next: "there is no descriptor 64 in a table of 64",
    buffer_in_a_hole: "512 bytes at 0x400000 are not in the memory table",
    buffer_beyond_a_region: "are not in the memory table",
    buffer_that_wraps: "are not in the memory table",
    read_behind_write: "comes behind memory to be written",
    no_status: "without a place for its status",
    short_header: "a request without a header",
    nothing_at_all: "a request without a header",
    index_jumps: "65 requests are available in a ring of 64",
    twice: "is used again before it was answered",
    indirect_in_indirect: "an indirect table within another",
    indirect_and_next: "an indirect table where there can be none",
    indirect_of_odd_length: "an indirect table of 17 bytes",
    indirect_too_long: "an indirect table of 16400 bytes",
    indirect_empty: "an indirect table of 0 bytes",
    indirect_in_a_hole: "is not in the memory table",
    indirect_loop: "has no end",
    file_shrinks: "its memory is not there any more",
    rings_file_shrinks: "its memory is not there any more",
}


@pytest.mark.parametrize("wrong", RINGS, ids=lambda wrong: wrong.__name__)
def test_wrong_rings(vhost: VhostRig, caplog: pytest.LogCaptureFixture, wrong: Wrong) -> None:
    caplog.set_level(logging.WARNING)
    vhost.vol.base[3] = pattern(3, BLOCK)
    guest = vhost.front_end()
    guest.write(0, pattern(1, 4096))
    guest.rings[0].free = guest.rings[0].free[8:]  # the tests' own
    with vhost.rig.hold():
        wrong(guest)
        assert guest.lost()
    wait_for(lambda: vhost.transport.in_use("v") == "", "the end of the session")
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1, lines
    assert lines[0].startswith("v: the vhost-user front-end (unix:pid=")
    assert RINGS[wrong] in lines[0]
    other = vhost.front_end()  # the export goes on
    assert other.read(0, 4096) == pattern(1, 4096)


def test_reads_into_memory_that_goes_blame_no_disk(vhost: VhostRig, caplog: pytest.LogCaptureFixture) -> None:
    """The kernel cannot copy what it read, which looks like a disk that fails: the cache keeps its block."""
    vhost.vol.base[3] = pattern(3, BLOCK)
    guest = vhost.front_end()
    assert guest.read(3 * BLOCK, 4096) == pattern(3, BLOCK)[:4096]
    guest.write(0, pattern(1, 4096))
    faults = len(vhost.rig.faults_seen)
    for sector in (3 * BLOCK // 512, 0):
        pending = guest.prepare(0, sector, room=4096)
        ring = guest.rings[0]
        header = guest.memory.alloc(PAGE, region=0)  # what it needs lies in the region that stays
        guest.memory.write(header, struct.pack("<IIQ", 0, 0, sector))
        ring.put(pending.head, header, 16, NEXT, ring.chains[pending.head][1])
        ring.put(ring.chains[pending.head][2], header + 64, 1, WRITE, 0)
        os.ftruncate(guest.memory.regions[-1].fd, 0)
        ring.offer(pending.head)
        ring.kick()
        assert guest.lost()
        guest = vhost.front_end()
    assert guest.read(3 * BLOCK, 4096) == pattern(3, BLOCK)[:4096]
    assert guest.read(0, 4096) == pattern(1, 4096)
    assert len(vhost.rig.faults_seen) == faults
    stats = vhost.rig.engine.stats()
    assert (stats.cache_lost, stats.cache_errno) == (0, 0)


# -- messages --------------------------------------------------------------------------------------------


def message(request: int, payload: bytes = b"", **how: int) -> Wrong:
    return lambda guest: guest.send(request, payload, **how)


def with_fds(request: int, payload: bytes, count: int) -> Wrong:
    def send(guest: FrontEnd) -> None:
        fds = [os.eventfd(0) for _ in range(count)]
        guest.send(request, payload, fds)
        for fd in fds:
            os.close(fd)

    return send


def table(*regions: tuple[int, int, int, int], count: int | None = None) -> bytes:
    packed = b"".join(struct.pack("<QQQQ", *region) for region in regions)
    return struct.pack("<II", len(regions) if count is None else count, 0) + packed


def share(*regions: tuple[int, int, int, int], size: int = MIB) -> Wrong:
    def send(guest: FrontEnd) -> None:
        fd = os.memfd_create("guest")
        os.ftruncate(fd, size)
        guest.send(Request.SET_MEM_TABLE, table(*regions), [fd] * len(regions))
        os.close(fd)

    return send


def share_a(path: str) -> Wrong:
    def send(guest: FrontEnd) -> None:
        fd = os.open(path, os.O_RDWR)
        guest.send(Request.SET_MEM_TABLE, table((0, PAGE, USER, 0)), [fd])
        os.close(fd)

    return send


def kick_by_a_pipe(guest: FrontEnd) -> None:
    ends = os.pipe()
    guest.send(Request.SET_VRING_KICK, struct.pack("<Q", 0), [ends[0]])
    for fd in ends:
        os.close(fd)


def bad_inflight(guest: FrontEnd) -> None:
    with open(__file__, "rb") as file:
        guest.send(Request.SET_INFLIGHT_FD, struct.pack("<QQHH", 1 << 20, 0, 1, 64), [file.fileno()])


STATE, NUMBER = struct.Struct("<II"), struct.Struct("<Q")
SESSIONS: dict[str, tuple[Wrong, str]] = {
    "unknown request": (message(99), "request 99 is not known"),
    "request zero": (message(0), "request 0 is not known"),
    "another version": (message(Request.GET_FEATURES, flags=2), "GET_FEATURES has flags"),
    "a reply": (message(Request.GET_FEATURES, flags=5), "GET_FEATURES has flags"),
    "strange flags": (message(Request.GET_FEATURES, flags=0x101), "GET_FEATURES has flags"),
    "payload too long": (message(Request.GET_FEATURES, bytes(8)), "a payload of 8 bytes"),
    "payload too short": (message(Request.SET_FEATURES, bytes(4)), "a payload of 4 bytes"),
    "endless payload": (message(Request.SET_FEATURES, size=0xFFFFFFFF), "a payload of 4294967295 bytes"),
    "features of others": (message(Request.SET_FEATURES, NUMBER.pack(1 << 34)), "not offered"),
    "protocol of others": (message(Request.SET_PROTOCOL_FEATURES, NUMBER.pack(2)), "not offered"),
    "descriptors for nothing": (with_fds(Request.GET_FEATURES, b"", 1), "came with 1 descriptors"),
    "too many descriptors": (with_fds(Request.SET_VRING_CALL, NUMBER.pack(0), 2), "2 descriptors"),
    "very many descriptors": (with_fds(Request.SET_MEM_TABLE, table(), 100), "more than 16 descriptors"),
    "queue that is not there": (message(Request.SET_VRING_NUM, STATE.pack(4, 64)), "no queue 4"),
    "queue of no entry": (message(Request.SET_VRING_NUM, STATE.pack(0, 0)), "a queue of 0 entries"),
    "queue of 65": (message(Request.SET_VRING_NUM, STATE.pack(0, 65)), "a queue of 65 entries"),
    "queue of 2048": (message(Request.SET_VRING_NUM, STATE.pack(0, 2048)), "a queue of 2048 entries"),
    "base beyond": (message(Request.SET_VRING_BASE, STATE.pack(0, 65536)), "SET_VRING_BASE of 65536"),
    "enable": (message(Request.SET_VRING_ENABLE, STATE.pack(0, 2)), "SET_VRING_ENABLE of 2"),
    "log": (message(Request.SET_VRING_ADDR, struct.pack("<IIQQQQ", 0, 1, 0, 0, 0, 0)), "with flags 0x1"),
    "kick too early": (with_fds(Request.SET_VRING_KICK, NUMBER.pack(0), 1), "no size yet"),
    "polled queue": (message(Request.SET_VRING_KICK, NUMBER.pack(256)), "to be polled"),
    "kick without one": (message(Request.SET_VRING_KICK, NUMBER.pack(0)), "came with 0 descriptors"),
    "kick by a pipe": (kick_by_a_pipe, "is no eventfd"),
    "call of a far queue": (with_fds(Request.SET_VRING_CALL, NUMBER.pack(0x200), 1), "SET_VRING_CALL of"),
    "table of nine": (message(Request.SET_MEM_TABLE, table(*[(0, PAGE, 0, 0)] * 8, count=9)), "9 regions"),
    "table without files": (message(Request.SET_MEM_TABLE, table((0, PAGE, 0, 0))), "0 descriptors"),
    "empty region": (share((0, 0, USER, 0)), "is empty or has no end"),
    "region without end": (share(((1 << 64) - PAGE, 2 * PAGE, USER, 0)), "is empty or has no end"),
    "region beyond its file": (share((0, 2 * MIB, USER, 0)), "has 1048576 bytes and should have 2097152"),
    "region far into its file": (share((0, PAGE, USER, 1 << 60)), "should have"),
    "regions that overlap": (share((0, 2 * PAGE, USER, 0), (PAGE, PAGE, 2 * USER, 0)), "overlap"),
    "memory on a disk": (share_a(__file__), "not a memfd"),
    "memory of a device": (share_a("/dev/zero"), "not a memfd"),
    "region that is not there": (
        message(Request.REM_MEM_REG, bytes(8) + struct.pack("<QQQQ", 1, 1, 1, 1)),
        "not in the memory table",
    ),
    "configuration beyond": (
        message(Request.GET_CONFIG, struct.pack("<III", 200, 100, 0) + bytes(100)),
        "no 100 bytes at 200",
    ),
    "configuration changed": (
        message(Request.SET_CONFIG, struct.pack("<III", 0, 8, 0) + bytes(8)),
        "cannot be changed",
    ),
    "record of a file": (bad_inflight, "not a memfd"),
    "record of no queue": (
        message(Request.GET_INFLIGHT_FD, struct.pack("<QQHH", 0, 0, 0, 64)),
        "in 0 queues of 64",
    ),
    "record of 40 queues": (
        message(Request.GET_INFLIGHT_FD, struct.pack("<QQHH", 0, 0, 40, 64)),
        "in 40 queues of 64",
    ),
}


@pytest.mark.parametrize("which", SESSIONS)
def test_wrong_messages(vhost: VhostRig, caplog: pytest.LogCaptureFixture, which: str) -> None:
    caplog.set_level(logging.WARNING)
    wrong, why = SESSIONS[which]
    guest = vhost.connect().negotiate()
    wrong(guest)
    assert guest.lost()
    wait_for(lambda: vhost.transport.in_use("v") == "", "the end of the session")
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1, lines
    assert why in lines[0]
    assert vhost.front_end().read(0, 512) == bytes(512)


def test_what_a_queue_that_runs_cannot_be_told(vhost: VhostRig) -> None:
    for wrong in (
        message(Request.SET_VRING_NUM, STATE.pack(0, 64)),
        message(Request.SET_VRING_BASE, STATE.pack(0, 0)),
        message(Request.SET_VRING_ADDR, struct.pack("<IIQQQQ", 0, 0, 1, 2, 3, 4)),
        with_fds(Request.SET_VRING_KICK, NUMBER.pack(0), 1),
    ):
        guest = vhost.front_end()
        wrong(guest)
        assert guest.lost()
        wait_for(lambda: vhost.transport.in_use("v") == "", "the end of the session")


def test_an_error_that_is_acknowledged_ends_nothing(
    vhost: VhostRig, caplog: pytest.LogCaptureFixture
) -> None:
    """The line in the log says why, too."""
    guest = vhost.front_end()
    with open(__file__, "rb") as file:
        region = bytes(8) + struct.pack("<QQQQ", 1 << 40, PAGE, USER + (1 << 40), 0)
        assert guest.tell(Request.ADD_MEM_REG, region, [file.fileno()]) == 1
    assert guest.read(0, 512) == bytes(512)
    begin = "v: the vhost-user front-end ("
    # The front-end has its answer first.
    wait_for(lambda: any(text.startswith(begin) for text in caplog.messages), "the line in the log")
    (line,) = [text for text in caplog.messages if text.startswith(begin)]
    assert len(line.partition("): ")[2]) > 20, line


def test_a_second_front_end_is_told_no(vhost: VhostRig) -> None:
    guest = vhost.front_end()
    for _ in range(3):
        second = vhost.connect()
        assert second.lost()
    assert guest.read(0, 512) == bytes(512)
    guest.sock.close()
    assert vhost.connect().reconnect().read(0, 512) == bytes(512)


def test_one_that_sends_half_a_message(vhost: VhostRig) -> None:
    slow = vhost.connect()
    slow.sock.send(struct.pack("<I", 1))
    time.sleep(0.01)
    slow.sock.send(struct.pack("<II", 1, 0))
    assert len(slow.receive(1)[0]) == 8
    slow.sock.send(struct.pack("<I", 1))
    slow.sock.shutdown(socket.SHUT_WR)
    assert slow.lost()


def test_one_that_does_not_read(vhost: VhostRig, caplog: pytest.LogCaptureFixture) -> None:
    guest = vhost.connect().negotiate()
    guest.sock.settimeout(5)
    with contextlib.suppress(Lost, TimeoutError):
        for _ in range(100_000):
            guest.send(Request.GET_CONFIG, struct.pack("<III", 0, 256, 0) + bytes(256))
    wait_for(lambda: "does not read" in caplog.text, "the end of it")


def test_calls_that_would_wait_hold_nobody_up(vhost: VhostRig) -> None:
    """An eventfd that blocks, and is full."""
    guest = vhost.connect()
    guest.negotiate()
    guest.share_memory()
    ring = Ring(guest.memory)
    os.close(ring.call_fd)
    ring.call_fd = os.eventfd(0)
    os.eventfd_write(ring.call_fd, (1 << 64) - 2)
    guest.rings.append(ring)
    guest.start(0, ring)
    for at in range(4):
        pending = guest.prepare(OUT, at * 8, out=pattern(at, 4096))
        guest.submit(pending)
        wait_for(lambda pending=pending: guest.memory.read(pending.status, 1) == b"\0", "the answer")
    guest.sock.close()
    wait_for(lambda: vhost.transport.in_use("v") == "", "the end of the session")


def test_a_region_that_goes_lives_until_its_last_request(vhost: VhostRig) -> None:
    """The read waits for the store, straight into memory that is taken away meanwhile."""
    vhost.vol.base[3] = pattern(3, BLOCK)
    memory = Memory([Region(0, MIB), Region(16 * MIB, MIB), Region(32 * MIB, MIB)])
    guest = vhost.front_end(memory)
    with vhost.rig.hold():
        pending = guest.prepare(0, 3 * BLOCK // 512, room=4096, region=1)
        guest.submit(pending)
        guest.remove_region(memory.regions[1])
        guest.write(0, pattern(1, 4096))
    assert guest.finish(pending) == (0, pattern(3, BLOCK)[:4096])
    guest.add_region(memory.regions[1])
    assert guest.read(0, 4096, region=1) == pattern(1, 4096)
    guest.remove_region(memory.regions[1])
    pending = guest.prepare(0, 0, room=4096, region=1)
    guest.submit(pending)
    assert guest.lost(), "it is not in the table any more"


def test_the_table_is_replaced_while_rings_run(vhost: VhostRig) -> None:
    guest = vhost.front_end()
    guest.write(0, pattern(1, 4096))
    assert guest.set_table() == 0
    assert guest.read(0, 4096) == pattern(1, 4096)
    rings, guest.memory.regions = guest.memory.regions[0], guest.memory.regions[1:]
    guest.set_table()
    assert guest.lost(), "its rings are not in it"
    guest.memory.regions.insert(0, rings)
