"""Requests of virtio-blk, one kind after another, with whatever form their memory may have."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable

import pytest
from core_rig import BLOCK, MIB, SYNC, SYNC_END, inject, inject_nothing, pattern
from front_end import (
    DISCARD,
    F_EVENT,
    F_INDIRECT,
    F_PROTOCOL,
    F_WCE,
    FLUSH,
    GET_ID,
    IN,
    INFLIGHT,
    IOERR,
    OK,
    OUT,
    SLOTS,
    UNSUPP,
    WRITE_ZEROES,
    FrontEnd,
    Memory,
    Region,
    Ring,
    ranges,
)
from vhost_rig import VhostRig

from glidefs.transport.vhost_user.messages import Request

MakeVhost = Callable[..., VhostRig]
BIG = 64 << 10


def test_what_is_written_is_read(vhost: VhostRig) -> None:
    guest = vhost.front_end()
    data = pattern(1, BIG)
    guest.write(MIB, data)
    assert guest.read(MIB, BIG) == data
    assert guest.read(MIB + 4096 * 3, 512) == data[4096 * 3 : 4096 * 3 + 512]
    assert guest.read(0, 4096) == bytes(4096)
    guest.flush()
    assert vhost.vol.core.pread(MIB, BIG) == data
    assert vhost.vol.core.stats().syncs == 1


@pytest.mark.parametrize("without", [0, F_EVENT, F_INDIRECT, F_PROTOCOL, F_EVENT | F_INDIRECT | F_PROTOCOL])
def test_without_what_a_front_end_may_not_have(vhost: VhostRig, without: int) -> None:
    guest = vhost.front_end(without=without)
    for at in range(5):
        guest.write(at * 4096, pattern(at, 4096), indirect=not without & F_INDIRECT)
    assert guest.read(0, 5 * 4096) == b"".join(pattern(at, 4096) for at in range(5))


@pytest.mark.parametrize("protocol", [0, INFLIGHT, SLOTS])
def test_with_few_protocol_features(vhost: VhostRig, protocol: int) -> None:
    guest = vhost.front_end(protocol=protocol)
    guest.write(4096, pattern(1, 4096))
    assert guest.read(4096, 4096) == pattern(1, 4096)


def test_odd_pieces_and_split_headers(vhost: VhostRig) -> None:
    guest = vhost.front_end()
    data = random.Random(7).randbytes(8192)
    for cuts in ([1], [511, 512, 513], [4096], [5, 4099, 8191], list(range(100, 8192, 700))):
        for indirect in (False, True):
            guest.write(4096, bytes(8192))
            guest.write(4096, data, cuts=cuts, indirect=indirect, split_header=True)
            assert guest.read(4096, 8192) == data
            assert guest.read(4096, 8192, cuts=cuts, indirect=indirect, split_header=True) == data


def test_data_and_status_in_one_buffer(vhost: VhostRig) -> None:
    """The status is the last byte of what the device writes, whatever buffers there are."""
    guest = vhost.front_end()
    guest.write(0, pattern(2, 4096))
    ring, memory = guest.rings[0], guest.memory
    header, room = memory.alloc(16), memory.alloc(4097)
    memory.write(header, struct.pack("<IIQ", IN, 0, 0))
    memory.write(room, b"\xff" * 4097)
    head = ring.chain([(header, 16, 0), (room, 4097, 2)])
    ring.offer(head)
    ring.kick()
    ring.wait([head])
    assert ring.answered[head] == 4097
    assert memory.read(room, 4097) == pattern(2, 4096) + b"\0"


def test_buffers_across_regions(make_vhost: MakeVhost) -> None:
    """Regions that follow each other for the guest are different files here."""
    memory = Memory([Region(0, MIB), Region(MIB, MIB, offset=4096), Region(8 * MIB, MIB)])
    guest = make_vhost().front_end(memory)
    border, data = MIB - 8192, pattern(3, 16384)
    memory.write(border, data[:8192])
    memory.write(MIB, data[8192:])
    ring = guest.rings[0]
    header, status = memory.alloc(16), memory.alloc(16)
    for kind, flags in ((OUT, 0), (IN, 2)):
        memory.write(header, struct.pack("<IIQ", kind, 0, 8))
        head = ring.chain([(header, 16, 0), (border, 16384, flags), (status, 1, 2)])
        ring.offer(head)
        ring.kick()
        ring.wait([head])
        assert memory.read(status, 1)[0] == OK
        if kind == OUT:
            memory.write(border, bytes(8192))
            memory.write(MIB, bytes(8192))
    assert memory.read(border, 8192) + memory.read(MIB, 8192) == data


def test_an_indirect_table_across_regions(make_vhost: MakeVhost) -> None:
    memory = Memory([Region(0, MIB), Region(MIB, MIB)])
    guest = make_vhost().front_end(memory)
    header, status = memory.alloc(16), memory.alloc(16)
    memory.write(header, struct.pack("<IIQ", FLUSH, 0, 0))
    table = MIB - 24  # the first entry and a half
    bytes_of = struct.pack("<QIHH", header, 16, 1, 1) + struct.pack("<QIHH", status, 1, 2, 0)
    memory.write(table, bytes_of[:24])
    memory.write(MIB, bytes_of[24:])
    memory.write(status, b"\xff")
    ring = guest.rings[0]
    head = ring.free.pop()
    ring.chains[head] = [head]
    ring.put(head, table, 32, 4)
    ring.offer(head)
    ring.kick()
    ring.wait([head])
    assert memory.read(status, 1) == b"\0"


def test_several_queues(make_vhost: MakeVhost) -> None:
    guest = make_vhost(queues=4).front_end(queues=4)
    pending = []
    for index in range(4):
        one = guest.prepare(OUT, 8 * index, out=pattern(index, 4096), queue=index)
        guest.submit(one, queue=index)
        pending.append(one)
    assert [guest.finish(one, queue)[0] for queue, one in enumerate(pending)] == [OK] * 4
    assert guest.read(0, 16384, queue=3) == b"".join(pattern(i, 4096) for i in range(4))


def test_more_requests_than_the_ring_has_rounds_for(vhost: VhostRig) -> None:
    """Index numbers wrap at 65536."""
    guest = vhost.connect(num=1024)
    guest.negotiate()
    guest.track()
    guest.share_memory()
    ring = guest.rings
    ring.append(Ring(guest.memory, 1024))
    ring[0].next_available = ring[0].last_used = 65500
    guest.memory.put16(ring[0].available + 2, 65500)
    guest.memory.put16(ring[0].used + 2, 65500)
    guest.start(0, ring[0])
    for at in range(100):
        guest.write(at * 4096, pattern(at, 4096))
    assert guest.read(0, 100 * 4096) == b"".join(pattern(at, 4096) for at in range(100))


def test_many_at_once_each_answered_once(vhost: VhostRig) -> None:
    guest = vhost.front_end(num=256)
    requests = [guest.prepare(OUT, 8 * i, out=pattern(i, 4096), indirect=True) for i in range(200)]
    guest.submit(*requests)
    assert all(guest.finish(one)[0] == OK for one in requests)
    assert len(guest.rings[0].free) == 256
    requests = [guest.prepare(IN, 8 * i, room=4096, indirect=True) for i in range(200)]
    guest.submit(*requests)
    assert [guest.finish(one) for one in requests] == [(OK, pattern(i, 4096)) for i in range(200)]


def test_a_large_request_in_many_pieces(vhost: VhostRig) -> None:
    guest = vhost.front_end(Memory([Region(0, MIB), Region(16 * MIB, 64 * MIB)]), num=256)
    data = pattern(9, 4 * MIB)
    cuts = list(range(0, 4 * MIB, 4 * MIB // 100 // 512 * 512))
    guest.write(0, data, cuts=cuts, indirect=True)
    assert guest.read(0, 4 * MIB, cuts=cuts, indirect=True) == data
    assert guest.request(IN, 0, room=32 * MIB + 512)[0] == IOERR, "longer than any request may be"


def test_requests_beyond_the_memory_for_them_wait(make_vhost: MakeVhost) -> None:
    """Three times what a device may hold of writes, all offered at once."""
    guest = make_vhost(log_limit=1 << 30).front_end(
        Memory([Region(0, MIB), Region(16 * MIB, 256 * MIB)]), num=64
    )
    one = 16 * MIB
    pending = [guest.prepare(OUT, 0, out=bytes([i]) * one) for i in range(12)]
    guest.submit(*pending)
    assert all(guest.finish(request, deadline=60)[0] == OK for request in pending)
    assert guest.read(0, 4096) == bytes([11]) * 4096


def test_identity(make_vhost: MakeVhost) -> None:
    guest = make_vhost().front_end()
    assert guest.request(GET_ID, room=20) == (OK, b"v".ljust(20, b"\0"))
    status, data = guest.request(GET_ID, room=4)
    assert (status, data) == (OK, b"v\0\0\0")


def test_discard_and_write_zeroes(vhost: VhostRig) -> None:
    guest = vhost.front_end()
    data = pattern(1, BIG)
    for kind, flags in ((DISCARD, 0), (WRITE_ZEROES, 0), (WRITE_ZEROES, 1)):
        guest.write(0, data)
        assert guest.request(kind, out=ranges((8, 8, flags)))[0] == OK
        assert guest.read(0, BIG) == data[:4096] + bytes(4096) + data[8192:]
        assert guest.request(kind, out=ranges((17, 3, flags), (40, 1, flags)))[0] == OK
        expected = bytearray(data)
        expected[4096:8192] = bytes(4096)
        expected[17 * 512 : 20 * 512] = bytes(3 * 512)
        expected[40 * 512 : 41 * 512] = bytes(512)
        assert guest.read(0, BIG) == expected


def test_discard_of_two_terabytes(make_vhost: MakeVhost) -> None:
    """Over scattered writes, in the largest requests that the device takes; twice, and it costs no memory."""
    size, largest = 2 << 40, 0x200000
    vhost = make_vhost(size=size)
    guest = vhost.front_end()
    assert struct.unpack("<II", guest.config(36, 8)) == (largest, 16)
    rng = random.Random(3)
    places = [rng.randrange(size // 4096) * 4096 for _ in range(2000)]
    for offset in places:
        guest.write(offset, pattern(1, 4096))
    for _ in range(2):
        for sector in range(0, size // 512, largest * 16):
            whole = [(sector + i * largest, largest, 0) for i in range(16)]
            assert guest.request(DISCARD, out=ranges(*whole))[0] == OK
        assert vhost.rig.engine.stats().map_bytes < 4 * MIB
    for offset in [0, size - BIG, *places[:200]]:
        assert guest.read(offset & ~(BIG - 1), BIG) == bytes(BIG)


def test_bad_ranges_change_nothing(vhost: VhostRig) -> None:
    guest = vhost.front_end()
    guest.write(0, pattern(1, BIG))
    end = 64 * MIB // 512
    refused = {
        IOERR: [
            ranges((end, 8, 0)),
            ranges((0, 8, 0), (end - 1, 2, 0)),
            ranges((1 << 63, 8, 0)),
            ranges((0, 0x200001, 0)),
            ranges((0, 8, 0))[:-1],
            ranges(*[(0, 1, 0)] * 17),
        ],
        UNSUPP: [ranges((0, 8, 2)), ranges((0, 8, 0), (8, 8, 1 << 31))],
    }
    for status, outs in refused.items():
        for out in outs:
            for kind in (DISCARD, WRITE_ZEROES):
                assert guest.request(kind, out=out)[0] == status
    assert guest.request(DISCARD, out=ranges((0, 8, 1)))[0] == UNSUPP
    assert guest.request(DISCARD)[0] == IOERR
    assert guest.read(0, BIG) == pattern(1, BIG)


def test_what_cannot_be_is_an_error_of_that_request(vhost: VhostRig) -> None:
    guest = vhost.front_end()
    end = 64 * MIB // 512
    for kind, how in ((IN, {"room": 4096}), (OUT, {"out": bytes(4096)})):
        for sector in (end, end - 7, 1 << 55, (1 << 64) - 1):
            assert guest.request(kind, sector, **how)[0] == IOERR
    assert guest.request(IN, 0, room=513)[0] == IOERR
    assert guest.request(OUT, 0, out=bytes(100))[0] == IOERR
    for kind in (2, 3, 14, 15, 99, 1 << 31):
        assert guest.request(kind, 0, out=bytes(16))[0] == UNSUPP
    assert guest.read(end * 512 - 4096, 4096) == bytes(4096)


def test_read_only(make_vhost: MakeVhost) -> None:
    vhost = make_vhost()
    vhost.transport.stop("v")
    vhost.read_only = True  # the export is, whatever its volume takes
    guest = vhost.start().front_end()
    assert guest.features & 1 << 5
    assert not guest.features & (F_WCE | 1 << 13 | 1 << 14)
    assert guest.request(OUT, 0, out=bytes(512))[0] == IOERR
    assert guest.request(DISCARD, out=ranges((0, 8, 0)))[0] == IOERR
    assert guest.request(WRITE_ZEROES, out=ranges((0, 8, 0)))[0] == IOERR
    assert guest.read(0, 512) == bytes(512)
    guest.flush()


def test_reads_of_what_is_not_here_wait_for_it(vhost: VhostRig) -> None:
    vhost.vol.base[3] = pattern(5, BLOCK)
    guest = vhost.front_end()
    with vhost.rig.hold():
        pending = guest.prepare(IN, 3 * BLOCK // 512, room=8192)
        guest.submit(pending)
        guest.write(0, pattern(1, 4096))  # others go on
        assert guest.memory.read(pending.status, 1) == b"\xff"
    assert guest.finish(pending) == (OK, pattern(5, BLOCK)[:8192])


def test_the_write_cache(vhost: VhostRig) -> None:
    """With the cache off a write is durable before it is answered."""
    guest = vhost.front_end()
    assert guest.features & F_WCE
    assert guest.config(32, 1) == b"\1"
    guest.write(0, pattern(1, 4096))
    assert vhost.vol.core.stats().syncs == 0
    assert guest.tell(Request.SET_CONFIG, struct.pack("<III", 32, 1, 0) + b"\0") == 0
    assert guest.config(32, 1) == b"\0"
    guest.write(4096, pattern(2, 4096))
    assert vhost.vol.core.stats().syncs == 1
    assert guest.request(WRITE_ZEROES, out=ranges((0, 8, 0)))[0] == OK
    assert vhost.vol.core.stats().syncs == 2


def test_a_driver_without_flush_has_no_cache(vhost: VhostRig) -> None:
    guest = vhost.front_end(without=1 << 9)
    guest.write(0, pattern(1, 4096))
    assert vhost.vol.core.stats().syncs == 1


def test_a_flush_that_fails(vhost: VhostRig) -> None:
    guest = vhost.front_end()
    guest.write(0, pattern(1, 4096))
    inject(SYNC, 5)
    inject(SYNC_END, 5)
    assert guest.request(FLUSH)[0] == IOERR
    inject_nothing()
    assert guest.read(0, 4096) == pattern(1, 4096)


def test_the_configuration_space(vhost: VhostRig) -> None:
    guest = vhost.front_end(queues=2)
    assert guest.capacity() == 64 * MIB
    config = guest.config()
    assert struct.unpack_from("<I", config, 12)[0] == 126  # segments
    assert struct.unpack_from("<I", config, 20)[0] == 512  # block size
    assert struct.unpack_from("<H", config, 34)[0] == 4  # queues
    assert struct.unpack_from("<IIIIIB", config, 36) == (0x200000, 16, 8, 0x200000, 16, 1)


def test_a_guest_hears_of_another_size(vhost: VhostRig) -> None:
    guest = vhost.front_end()
    assert vhost.resize(128 * MIB) == ""
    assert guest.channel is not None
    assert struct.unpack("<III", guest.channel.recv(12)) == (2, 1, 0)
    assert guest.capacity() == 128 * MIB
    guest.write(100 * MIB, pattern(1, 4096))
    assert guest.read(100 * MIB, 4096) == pattern(1, 4096)


def test_one_that_cannot_hear_of_it(vhost: VhostRig) -> None:
    guest: FrontEnd = vhost.front_end(protocol=0)
    assert "cannot be told" in vhost.resize(128 * MIB)
    guest.write(100 * MIB, pattern(1, 4096))
