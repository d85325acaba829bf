"""Queues that stop and go on, front-ends that come back, and what was in flight meanwhile."""

from __future__ import annotations

import contextlib
import os
import struct
import threading
from collections.abc import Callable

import pytest
from core_rig import BLOCK, MIB, Background, pattern
from front_end import ALL_PROTOCOL, FLUSH, IN, INFLIGHT, IOERR, OK, OUT, FrontEnd, Lost, Pending, Ring
from vhost_rig import VhostRig
from waiting import wait_for

from glidefs.transport.vhost_user.messages import Request

MakeVhost = Callable[..., VhostRig]
ENTRY = 16


def record(guest: FrontEnd, queue: int = 0) -> tuple[int, int, int, int, list[tuple[int, int, int, int]]]:
    """Version, entries, last head, used index, and (in flight, logged, next, counter) of each entry."""
    assert guest.inflight is not None
    each = guest.inflight[0] // guest.wanted_queues
    data = os.pread(guest.inflight_fd, each, guest.inflight[1] + queue * each)
    _, version, depth, head, used = struct.unpack_from("<QHHHH", data)
    entries = [struct.unpack_from("<BB4xHQ", data, ENTRY + ENTRY * i) for i in range(guest.num)]
    return version, depth, head, used, entries


def under_way(guest: FrontEnd) -> list[int]:
    return [head for head, entry in enumerate(record(guest)[4]) if entry[0]]


def stop_all(guest: FrontEnd) -> list[int]:
    return [guest.base(index) for index in range(len(guest.rings))]


def test_a_queue_stops_and_goes_on(vhost: VhostRig) -> None:
    guest = vhost.front_end(queues=2)
    for queue in (0, 1, 1):
        guest.write(queue * 4096, pattern(queue, 4096), queue=queue)
    assert stop_all(guest) == [1, 2]
    pending = guest.prepare(IN, 0, room=8192)
    guest.submit(pending)
    assert stop_all(guest) == [1, 2], "nothing of what came later was looked at"
    for index, ring in enumerate(guest.rings):
        guest.start(index, ring, base=index + 1)
    assert guest.finish(pending) == (OK, pattern(0, 4096) + pattern(1, 4096))


def test_a_stop_waits_for_what_is_under_way(vhost: VhostRig) -> None:
    """And nothing else waits for it: other queues, other front-ends, the control of the export."""
    vhost.vol.base[3] = pattern(3, BLOCK)
    guest = vhost.front_end(queues=2)
    with vhost.rig.hold():
        pending = guest.prepare(IN, 3 * BLOCK // 512, room=4096)
        guest.submit(pending)
        wait_for(lambda: under_way(guest), "the request")
        stop = Background(lambda: guest.base(0))
        guest.write(0, pattern(1, 4096), queue=1)
        assert vhost.connect().lost(), "a second one is told no meanwhile"
        assert "is connected" in vhost.transport.in_use("v")
        assert not stop.done
    assert stop.result() == 1
    assert guest.finish(pending) == (OK, pattern(3, BLOCK)[:4096])
    assert guest.base(1) == 1


def test_a_stop_that_waits_and_a_front_end_that_goes(vhost: VhostRig) -> None:
    guest = vhost.front_end()
    vhost.vol.base[3] = pattern(3, BLOCK)
    with vhost.rig.hold():
        pending = guest.prepare(IN, 3 * BLOCK // 512, room=4096)
        guest.submit(pending)
        wait_for(lambda: under_way(guest), "the request")
        guest.send(Request.GET_VRING_BASE, struct.pack("<II", 0, 0))
        guest.sock.close()
        wait_for(lambda: vhost.transport.in_use("v") == "", "the end of the session")
    assert under_way(guest) == [pending.head], "it had no answer"


@pytest.mark.parametrize("how", ["stop", "release"])
def test_an_export_ends_while_a_stop_waits(vhost: VhostRig, how: str) -> None:
    guest = vhost.front_end()
    vhost.vol.base[3] = pattern(3, BLOCK)
    with vhost.rig.hold():
        guest.submit(guest.prepare(IN, 3 * BLOCK // 512, room=4096))
        wait_for(lambda: under_way(guest), "the request")
        guest.send(Request.GET_VRING_BASE, struct.pack("<II", 0, 0))
        getattr(vhost.transport, how)("v")
    assert guest.lost()
    assert not os.path.exists(vhost.path)


def test_a_disabled_queue_waits(vhost: VhostRig) -> None:
    guest = vhost.front_end()
    assert guest.tell(Request.SET_VRING_ENABLE, struct.pack("<II", 0, 0)) == 0
    pending = guest.prepare(OUT, 0, out=pattern(1, 4096))
    guest.submit(pending)
    guest.config()
    assert guest.memory.read(pending.status, 1) == b"\xff"
    assert guest.tell(Request.SET_VRING_ENABLE, struct.pack("<II", 0, 1)) == 0
    assert guest.finish(pending)[0] == OK


def test_another_call_descriptor(vhost: VhostRig) -> None:
    guest = vhost.front_end()
    ring = guest.rings[0]
    for _ in range(3):
        os.close(ring.call_fd)
        ring.call_fd = os.eventfd(0, os.EFD_NONBLOCK)
        guest.send(Request.SET_VRING_CALL, struct.pack("<Q", 0), [ring.call_fd])
        guest.write(0, pattern(1, 4096))
    guest.send(Request.SET_VRING_CALL, struct.pack("<Q", 0x100))
    pending = guest.prepare(OUT, 0, out=pattern(2, 4096))
    guest.submit(pending)
    wait_for(lambda: guest.memory.read(pending.status, 1) == b"\0", "the answer")


def test_the_record_follows_what_is_under_way(vhost: VhostRig) -> None:
    vhost.vol.base[3] = pattern(3, BLOCK)
    guest = vhost.front_end(num=16)
    for i in range(3):
        guest.write(i * 4096, pattern(i, 4096))
    with vhost.rig.hold():
        waits = [guest.prepare(IN, 3 * BLOCK // 512, room=512) for _ in range(2)]
        guest.submit(*waits)
        guest.write(0, pattern(1, 4096))
        version, depth, _, used, entries = record(guest)
        assert (version, depth, used) == (1, 16, 4)
        flying = {head: entry[3] for head, entry in enumerate(entries) if entry[0]}
        assert flying == {waits[0].head: 3, waits[1].head: 4}
    for one in waits:
        guest.finish(one)
    assert under_way(guest) == []


@pytest.mark.parametrize("reads", [1, 5])
def test_a_front_end_that_comes_back(vhost: VhostRig, reads: int) -> None:
    """What had no answer is carried out again, and answered once."""
    vhost.vol.base[3] = pattern(3, BLOCK)
    guest = vhost.front_end()
    with vhost.rig.hold():
        waits = [guest.prepare(IN, 3 * BLOCK // 512 + 8 * i, room=4096) for i in range(reads)]
        guest.submit(*waits)
        guest.write(0, pattern(1, 4096))
        wait_for(lambda: len(under_way(guest)) == reads, "the requests")
        guest.reconnect()
        later = guest.prepare(IN, 0, room=4096)
        guest.submit(later)
        assert guest.finish(later) == (OK, pattern(1, 4096))
    for i, one in enumerate(waits):
        assert guest.finish(one) == (OK, pattern(3, BLOCK)[4096 * i : 4096 * (i + 1)])
    assert under_way(guest) == []
    assert len(guest.rings[0].free) == guest.num


def write_record(guest: FrontEnd, entries: dict[int, tuple[int, int]], **fields: int) -> None:
    """Change the record as a process that died would leave it: head to (logged, counter)."""
    assert guest.inflight is not None
    for head, (logged, counter) in entries.items():
        at = guest.inflight[1] + ENTRY + ENTRY * head
        os.pwrite(guest.inflight_fd, struct.pack("<BB4xHQ", 1, logged, 0, counter), at)
    for name, value in fields.items():
        at = guest.inflight[1] + {"version": 8, "depth": 10, "last": 12, "used": 14}[name]
        os.pwrite(guest.inflight_fd, struct.pack("<H", value), at)


def test_what_a_dead_process_left_is_done_again_in_its_order(vhost: VhostRig) -> None:
    """Three writes to the same place: the last by the counter wins, whatever its head."""
    guest = vhost.front_end()
    stop_all(guest)
    writes = [guest.prepare(OUT, 0, out=pattern(i, 4096)) for i in range(3)]
    guest.rings[0].offer(*[one.head for one in writes])
    counters = dict(zip([one.head for one in writes], [(0, 7), (0, 9), (0, 8)], strict=True))
    write_record(guest, counters)
    guest.reconnect()
    assert [guest.finish(one)[0] for one in writes] == [OK] * 3
    assert guest.read(0, 4096) == pattern(1, 4096)
    assert guest.rings[0].last_used == 4


def test_a_write_that_is_in_the_log_is_not_done_again(vhost: VhostRig) -> None:
    vhost.vol.base[3] = pattern(3, BLOCK)
    guest = vhost.front_end()
    guest.write(0, pattern(9, 4096))
    stop_all(guest)
    write = guest.prepare(OUT, 0, out=pattern(1, 4096))
    guest.rings[0].offer(write.head)
    write_record(guest, {write.head: (1, 5)})
    syncs = vhost.vol.core.stats().syncs
    guest.reconnect()
    assert guest.finish(write)[0] == OK
    assert vhost.vol.core.stats().syncs == syncs + 1
    assert guest.read(0, 4096) == pattern(9, 4096)

    free = guest.rings[0].free  # the mark goes with its request: the next with the same head is another
    free.remove(write.head)
    free.insert(0, write.head)
    with vhost.rig.hold():
        later = guest.prepare(IN, 3 * BLOCK // 512, room=4096)
        assert later.head == write.head
        guest.submit(later)
        wait_for(lambda: under_way(guest), "the request")
        guest.reconnect()
    assert guest.finish(later) == (OK, pattern(3, BLOCK)[:4096])


@pytest.mark.parametrize("step", ["used", "cleared"])
def test_a_process_that_died_within_an_answer(vhost: VhostRig, step: str) -> None:
    """The driver sees the answer, so it was answered, whatever the record says."""
    guest = vhost.front_end()
    done = guest.prepare(OUT, 0, out=pattern(1, 4096))
    guest.submit(done)
    guest.finish(done)
    stop_all(guest)
    if step == "used":
        write_record(guest, {done.head: (0, 0)}, used=0, last=done.head)
    else:
        write_record(guest, {}, used=0, last=done.head)
    guest.reconnect()
    assert guest.read(0, 4096) == pattern(1, 4096)
    assert guest.rings[0].last_used == 2


@pytest.mark.parametrize(("field", "value"), [("version", 2), ("depth", 32)])
def test_a_record_of_something_else(vhost: VhostRig, field: str, value: int) -> None:
    guest = vhost.front_end()
    stop_all(guest)
    write_record(guest, {5: (0, 1)}, **{field: value})
    guest.sock.close()
    guest.sock = guest.connect()
    guest.negotiate()
    guest.track()
    guest.share_memory()
    guest.send(Request.SET_VRING_NUM, struct.pack("<II", 0, 64))
    guest.send(Request.SET_VRING_ADDR, guest.address(0, guest.rings[0]))
    assert guest.tell(Request.SET_VRING_KICK, struct.pack("<Q", 0), [guest.rings[0].kick_fd]) == 1
    write_record(guest, {}, version=0)
    guest.start(0, guest.rings[0])
    assert guest.read(0, 512) == bytes(512)


@pytest.mark.parametrize("protocol", [0, ALL_PROTOCOL])
def test_a_driver_with_another_size_of_queue(vhost: VhostRig, protocol: int) -> None:
    """As a firmware before an operating system, in one session."""
    guest = vhost.front_end(num=64, protocol=protocol)
    for num in (16, 64, 16):
        guest.base(0)
        guest.rings[0] = Ring(guest.memory, num)
        guest.start(0, guest.rings[0], base=0)
        for at in range(3):
            guest.write(at * 4096, pattern(num + at, 4096))
        assert guest.read(4096, 4096) == pattern(num + 1, 4096)


def test_an_absurd_record(vhost: VhostRig) -> None:
    """All in flight, with heads and counters that cannot be."""
    guest = vhost.front_end(num=16)
    stop_all(guest)
    write_record(guest, dict.fromkeys(range(16), (255, (1 << 64) - 1)), used=40000, last=65535)
    guest.sock.close()
    guest.sock = guest.connect()
    with contextlib.suppress(Lost):  # before it has said all
        guest.up()
    assert guest.lost(), "their descriptors are no requests"
    fresh = vhost.front_end()
    assert fresh.read(0, 512) == bytes(512)


def test_requests_that_wait_for_space_are_given_up_with_their_front_end(make_vhost: MakeVhost) -> None:
    vhost = make_vhost(log_limit=4 * 16 * 4096 * 2)
    guest = vhost.front_end(num=256)
    writes: list[Pending] = []
    for i in range(40):
        one = guest.prepare(OUT, 128 * i, out=pattern(i, BLOCK // 2))
        guest.submit(one)
        writes.append(one)
    wait_for(lambda: vhost.vol.core.info().parked, "the log to be full")
    guest.sock.close()
    wait_for(lambda: vhost.transport.in_use("v") == "", "the end of the session")
    left = under_way(guest)
    assert left
    vhost.vol.commit()
    done = threading.Event()

    def upload() -> None:
        while not done.wait(0.01):
            vhost.vol.commit()

    uploads = threading.Thread(target=upload)
    uploads.start()
    try:
        guest.reconnect()
        assert all(guest.finish(one)[0] == OK for one in writes)
        for i in range(40):
            assert guest.read(i * BLOCK // 2, BLOCK // 2) == pattern(i, BLOCK // 2)
    finally:
        done.set()
        uploads.join()


def test_a_volume_that_fails_answers_with_errors(vhost: VhostRig) -> None:
    guest = vhost.front_end()
    vhost.vol.core.fail(5)
    assert guest.request(IN, 0, room=512)[0] == IOERR
    assert guest.request(FLUSH)[0] == IOERR
    guest.sock.close()
    refused = vhost.connect()
    assert refused.lost()


def test_a_volume_that_closes_takes_its_front_end_along(vhost: VhostRig) -> None:
    guest = vhost.front_end()
    guest.write(0, pattern(1, 4096))
    vhost.vol.close()
    guest.send(Request.SET_VRING_ENABLE, struct.pack("<II", 0, 1))
    assert guest.lost()


def test_stale_sockets_are_replaced_and_others_are_not(make_vhost: MakeVhost) -> None:
    from glidefs.errors import NotSupported

    vhost = make_vhost()
    with pytest.raises(NotSupported, match="another process listens there"):
        vhost.transport.start(vhost.attachment())
    vhost.transport.forget()  # it dies: the file stays
    vhost.transport.stop("v")
    assert os.path.exists(vhost.path)
    vhost.start()
    assert os.stat(vhost.path).st_mode & 0o777 == 0o660
    assert vhost.front_end().read(0, 512) == bytes(512)


def test_no_record_is_kept_of_a_front_end_without_one(vhost: VhostRig) -> None:
    """It gets one all the same, which is ours."""
    guest = vhost.front_end(protocol=0)
    guest.write(MIB, pattern(1, 4096))
    guest.rings[0] = Ring(guest.memory)
    guest.reconnect()
    assert guest.read(MIB, 4096) == pattern(1, 4096)
    assert not guest.protocol & INFLIGHT
