"""A vhost-user-blk front-end and its driver, in Python.

It shares memory, speaks the protocol, fills the rings. Everything can be wrong on purpose: rings are plain
bytes at addresses that tests may write themselves.
"""

from __future__ import annotations

import array
import itertools
import mmap
import os
import select
import socket
import struct
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from glidefs.transport.vhost_user.messages import Request

IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13
OK, IOERR, UNSUPP = 0, 1, 2
NEXT, WRITE, INDIRECT = 1, 2, 4
PAGE = 4096
USER = 0x7F0000000000
"""What the front-end adds to addresses of its guest."""
F_WCE, F_EVENT, F_INDIRECT, F_PROTOCOL = 1 << 11, 1 << 29, 1 << 28, 1 << 30
MQ, ACK, BACKEND_REQ, CONFIG, INFLIGHT, SLOTS = 1 << 0, 1 << 3, 1 << 5, 1 << 9, 1 << 12, 1 << 15
ALL_PROTOCOL = MQ | ACK | BACKEND_REQ | CONFIG | INFLIGHT | SLOTS
DEADLINE = 20.0


class Lost(Exception):
    """The back-end has hung up."""


class Region:
    """Memory of the guest in a file of its own, which begins `offset` bytes into it."""

    def __init__(self, guest: int, size: int, offset: int = 0) -> None:
        self.guest, self.size, self.offset = guest, size, offset
        self.fd = os.memfd_create("guest")
        os.ftruncate(self.fd, offset + size)
        self.map = mmap.mmap(self.fd, offset + size)

    def packed(self) -> bytes:
        return struct.pack("<QQQQ", self.guest, self.size, self.guest + USER, self.offset)

    def close(self) -> None:
        self.map.close()
        os.close(self.fd)


class Memory:
    """The guest's memory: by default two regions, with a hole between them."""

    def __init__(self, regions: Sequence[Region] | None = None) -> None:
        self.regions = list(regions or [Region(0, 2 << 20), Region(16 << 20, 8 << 20, offset=3 * PAGE)])
        self._next = {region.guest: region.guest for region in self.regions}

    def _at(self, address: int, length: int) -> tuple[Region, int]:
        for region in self.regions:
            if region.guest <= address and address + length <= region.guest + region.size:
                return region, address - region.guest + region.offset
        raise AssertionError(f"{length} bytes at {address:#x} are not the guest's")

    def write(self, address: int, data: bytes) -> None:
        region, at = self._at(address, len(data))
        region.map[at : at + len(data)] = data

    def read(self, address: int, length: int) -> bytes:
        region, at = self._at(address, length)
        return bytes(region.map[at : at + length])

    def u16(self, address: int) -> int:
        return int.from_bytes(self.read(address, 2), "little")

    def put16(self, address: int, value: int) -> None:
        self.write(address, (value & 0xFFFF).to_bytes(2, "little"))

    def alloc(self, length: int, *, region: int = -1, align: int = 16) -> int:
        """Memory that nobody has; it is never given back."""
        where = self.regions[region]
        at = -(-self._next[where.guest] // align) * align
        assert at + length <= where.guest + where.size, "the guest has no memory left"
        self._next[where.guest] = at + length
        return at

    def mark(self) -> dict[int, int]:
        """What is allocated; :meth:`release` gives up what came later."""
        return dict(self._next)

    def release(self, mark: dict[int, int]) -> None:
        self._next = dict(mark)

    def close(self) -> None:
        for region in self.regions:
            region.close()


@dataclass
class Pending:
    """A request under way: where its status comes, and where its data."""

    head: int
    status: int
    pieces: list[tuple[int, int]] = field(default_factory=list)


class Ring:
    """The driver's side of one queue."""

    def __init__(self, memory: Memory, num: int = 64, *, event_index: bool = True) -> None:
        self.memory = memory
        self.num = num
        self.event_index = event_index
        self.descriptors = memory.alloc(16 * num, region=0)
        self.available = memory.alloc(6 + 2 * num, region=0, align=2)
        self.used = memory.alloc(6 + 8 * num, region=0, align=4)
        for at, length in ((self.available, 6 + 2 * num), (self.used, 6 + 8 * num)):
            memory.write(at, bytes(length))
        self.free = list(range(num))
        self.chains: dict[int, list[int]] = {}
        self.next_available = self.last_used = 0
        self.kick_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self.call_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self.answered: dict[int, int] = {}

    def close(self) -> None:
        os.close(self.kick_fd)
        os.close(self.call_fd)

    def put(self, index: int, address: int, length: int, flags: int, following: int = 0) -> None:
        self.memory.write(
            self.descriptors + 16 * index, struct.pack("<QIHH", address, length, flags, following)
        )

    def chain(self, buffers: Sequence[tuple[int, int, int]], *, indirect: bool = False) -> int:
        """Make descriptors of (address, length, flags). Returns the head."""
        if indirect:
            table = self.memory.alloc(16 * len(buffers))
            for i, (address, length, flags) in enumerate(buffers):
                more = NEXT if i + 1 < len(buffers) else 0
                self.memory.write(table + 16 * i, struct.pack("<QIHH", address, length, flags | more, i + 1))
            buffers = [(table, 16 * len(buffers), INDIRECT)]
        heads = [self.free.pop(0) for _ in buffers]
        for i, (address, length, flags) in enumerate(buffers):
            more = i + 1 < len(buffers)
            self.put(heads[i], address, length, flags | (NEXT if more else 0), heads[i + 1] if more else 0)
        self.chains[heads[0]] = heads
        return heads[0]

    def offer(self, *heads: int) -> None:
        """Make them available. Nobody is told."""
        for head in heads:
            self.memory.put16(self.available + 4 + 2 * (self.next_available % self.num), head)
            self.next_available = (self.next_available + 1) & 0xFFFF
        self.memory.put16(self.available + 2, self.next_available)

    def wants_kick(self, old: int) -> bool:
        """Whether the device asked to be told of what was offered since `old`."""
        if not self.event_index:
            return not self.memory.u16(self.used) & 1
        event = self.memory.u16(self.used + 4 + 8 * self.num)
        return (self.next_available - event - 1) & 0xFFFF < (self.next_available - old) & 0xFFFF

    def kick(self) -> None:
        os.eventfd_write(self.kick_fd, 1)

    def collect(self) -> list[int]:
        """Heads that were answered since the last time."""
        found = []
        index = self.memory.u16(self.used + 2)
        while self.last_used != index:
            at = self.used + 4 + 8 * (self.last_used % self.num)
            head, length = struct.unpack("<II", self.memory.read(at, 8))
            assert head in self.chains, f"descriptor {head} was answered, which is not under way"
            self.free += self.chains.pop(head)
            self.answered[head] = length
            found.append(head)
            self.last_used = (self.last_used + 1) & 0xFFFF
        if self.event_index:
            self.memory.put16(self.available + 4 + 2 * self.num, self.last_used)  # tell me of the next
        return found

    def wait(self, heads: Iterable[int], deadline: float = DEADLINE) -> None:
        """Until all of them are answered, woken by the device's calls only."""
        left = set(heads) - {head for head in heads if head in self.answered and head not in self.chains}
        until = time.monotonic() + deadline
        while True:
            left -= set(self.collect())
            if not left:
                return
            if self.memory.u16(self.used + 2) != self.last_used:
                continue  # it came before the device knew that it is to call
            poll = select.poll()
            poll.register(self.call_fd, select.POLLIN)
            assert poll.poll(max(0, until - time.monotonic()) * 1000), f"{left} are not answered"
            os.eventfd_read(self.call_fd)


class FrontEnd:
    """One front-end: its connection and its queues."""

    def __init__(
        self,
        path: str,
        memory: Memory | None = None,
        *,
        queues: int = 1,
        num: int = 64,
        protocol: int = ALL_PROTOCOL,
        without: int = 0,
    ) -> None:
        self.path = path
        self.memory = memory or Memory()
        self.protocol = protocol
        self.without = without
        self.features = 0
        self.num = num
        self.wanted_queues = queues
        self.rings: list[Ring] = []
        self.inflight: tuple[int, int, int, int] | None = None
        self.inflight_fd = -1
        self.sock = self.connect()
        self.channel: socket.socket | None = None
        self._counter = itertools.count()

    # -- the protocol ----------------------------------------------------------------------------

    def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(DEADLINE)
        sock.connect(self.path)
        return sock

    def send(
        self,
        request: int,
        payload: bytes = b"",
        fds: Sequence[int] = (),
        *,
        flags: int = 1,
        size: int | None = None,
    ) -> None:
        data = struct.pack("<III", request, flags, len(payload) if size is None else size) + payload
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            self.sock.sendmsg([data], rights)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise Lost from error

    def receive(self, request: int) -> tuple[bytes, list[int]]:
        try:
            data, fds, _, _ = socket.recv_fds(self.sock, 12, 4)
            if len(data) < 12:
                raise Lost
            number, flags, size = struct.unpack("<III", data)
            assert (number, flags) == (request, 5)
            payload = b""
            while len(payload) < size:
                part = self.sock.recv(size - len(payload))
                if not part:
                    raise Lost
                payload += part
        except ConnectionResetError as error:
            raise Lost from error
        return payload, fds

    def ask(self, request: int, payload: bytes = b"") -> bytes:
        self.send(request, payload)
        answer, fds = self.receive(request)
        assert not fds
        return answer

    def tell(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> int:
        """Send, and wait until it is done. Returns what came of it, where REPLY_ACK was agreed on."""
        if not self.protocol & ACK or not self.features & F_PROTOCOL:
            self.send(request, payload, fds)
            return 0
        self.send(request, payload, fds, flags=1 | 8)
        return int(struct.unpack("<Q", self.receive(request)[0])[0])

    def number(self, request: int) -> int:
        return int(struct.unpack("<Q", self.ask(request))[0])

    def negotiate(self) -> FrontEnd:
        offered = self.number(Request.GET_FEATURES)
        assert offered & F_PROTOCOL
        assert offered & 1 << 32
        self.features = offered & ~self.without
        if self.features & F_PROTOCOL:
            self.protocol &= self.number(Request.GET_PROTOCOL_FEATURES)
            self.send(Request.SET_PROTOCOL_FEATURES, struct.pack("<Q", self.protocol))
            assert self.number(Request.GET_QUEUE_NUM) >= self.wanted_queues
        self.send(Request.SET_OWNER)
        if self.protocol & BACKEND_REQ and self.features & F_PROTOCOL:
            self.channel, theirs = socket.socketpair()
            self.channel.settimeout(DEADLINE)
            with theirs:
                assert self.tell(Request.SET_BACKEND_REQ_FD, struct.pack("<Q", 0), [theirs.fileno()]) == 0
        assert self.tell(Request.SET_FEATURES, struct.pack("<Q", self.features)) == 0
        return self

    def share_memory(self) -> None:
        if self.protocol & SLOTS and self.features & F_PROTOCOL:
            for region in self.memory.regions:
                self.add_region(region)
        else:
            self.set_table()

    def set_table(self) -> int:
        regions = self.memory.regions
        payload = struct.pack("<II", len(regions), 0) + b"".join(region.packed() for region in regions)
        return self.tell(Request.SET_MEM_TABLE, payload, [region.fd for region in regions])

    def add_region(self, region: Region) -> None:
        assert self.tell(Request.ADD_MEM_REG, bytes(8) + region.packed(), [region.fd]) == 0

    def remove_region(self, region: Region) -> None:
        assert self.tell(Request.REM_MEM_REG, bytes(8) + region.packed()) == 0

    def track(self) -> None:
        """Agree on the record of what is in flight: ask for one, or bring back the one there is."""
        if not self.protocol & INFLIGHT or not self.features & F_PROTOCOL:
            return
        if self.inflight is None:
            self.send(Request.GET_INFLIGHT_FD, struct.pack("<QQHHI", 0, 0, self.wanted_queues, self.num, 0))
            payload, (self.inflight_fd,) = self.receive(Request.GET_INFLIGHT_FD)
            assert len(payload) == 24
            self.inflight = struct.unpack("<QQHH", payload[:20])
        payload = struct.pack("<QQHHI", *self.inflight, 0)
        assert self.tell(Request.SET_INFLIGHT_FD, payload, [self.inflight_fd]) == 0

    def start(self, index: int, ring: Ring, base: int | None = None) -> None:
        """Have a queue served."""
        self.send(Request.SET_VRING_NUM, struct.pack("<II", index, ring.num))
        self.send(Request.SET_VRING_BASE, struct.pack("<II", index, ring.last_used if base is None else base))
        self.send(Request.SET_VRING_ADDR, self.address(index, ring))
        self.send(Request.SET_VRING_CALL, struct.pack("<Q", index), [ring.call_fd])
        self.send(Request.SET_VRING_KICK, struct.pack("<Q", index), [ring.kick_fd])
        if self.features & F_PROTOCOL:
            assert self.tell(Request.SET_VRING_ENABLE, struct.pack("<II", index, 1)) == 0

    @staticmethod
    def address(index: int, ring: Ring, flags: int = 0) -> bytes:
        where = (ring.descriptors + USER, ring.used + USER, ring.available + USER)
        return struct.pack("<IIQQQQ", index, flags, *where, 0)

    def up(self) -> FrontEnd:
        """Negotiate, share memory, start the queues."""
        self.negotiate()
        self.track()
        self.share_memory()
        if not self.rings:
            for _ in range(self.wanted_queues):
                self.rings.append(Ring(self.memory, self.num, event_index=bool(self.features & F_EVENT)))
        for index, ring in enumerate(self.rings):
            self.start(index, ring)
        return self

    def reconnect(self) -> FrontEnd:
        """As QEMU does when its back-end has gone: everything again, with the record of what is in flight."""
        self.sock.close()
        until = time.monotonic() + DEADLINE
        while True:
            try:
                self.sock = self.connect()
                return self.up()
            except (ConnectionRefusedError, FileNotFoundError, Lost):
                assert time.monotonic() < until, "nobody listens"
                time.sleep(0.01)

    def base(self, index: int) -> int:
        """Stop a queue. Returns the entry that comes next."""
        got, number = struct.unpack("<II", self.ask(Request.GET_VRING_BASE, struct.pack("<II", index, 0)))
        assert got == index
        return int(number)

    def config(self, offset: int = 0, size: int = 60) -> bytes:
        answer = self.ask(Request.GET_CONFIG, struct.pack("<III", offset, size, 0) + bytes(size))
        assert struct.unpack("<III", answer[:12]) == (offset, size, 0)
        return answer[12:]

    def capacity(self) -> int:
        return int(struct.unpack("<Q", self.config(0, 8))[0]) * 512

    def lost(self) -> bool:
        """Whether the back-end hangs up, in a while."""
        try:
            return not self.sock.recv(1)
        except ConnectionResetError:
            return True
        except TimeoutError:
            return False

    def close(self, *, memory: bool = True) -> None:
        self.sock.close()
        if self.channel is not None:
            self.channel.close()
        for ring in self.rings:
            ring.close()
        if self.inflight_fd >= 0:
            os.close(self.inflight_fd)
        if memory:
            self.memory.close()

    # -- requests ----------------------------------------------------------------------------------

    def prepare(
        self,
        kind: int,
        sector: int = 0,
        *,
        out: bytes = b"",
        room: int = 0,
        cuts: Sequence[int] = (),
        indirect: bool = False,
        queue: int = 0,
        region: int = -1,
        split_header: bool = False,
    ) -> Pending:
        """Make the descriptors of a request; its data lies in pieces that end at `cuts`."""
        memory, ring = self.memory, self.rings[queue]
        header = memory.alloc(16, region=region)
        memory.write(header, struct.pack("<IIQ", kind, 0, sector))
        status = memory.alloc(1, region=region, align=1)
        memory.write(status, b"\xff")
        buffers = [(header, 5, 0), (header + 5, 11, 0)] if split_header else [(header, 16, 0)]
        data = out or bytes(room)
        ends = [*[cut for cut in sorted(set(cuts)) if 0 < cut < len(data)], len(data)]
        pieces, at = [], 0
        for end in ends:
            if end > at:
                memory.alloc(64, region=region)  # so that they do not touch
                place = memory.alloc(end - at, region=region, align=4)
                memory.write(place, data[at:end] if out else b"\xee" * (end - at))
                pieces.append((place, end - at))
                buffers.append((place, end - at, 0 if out else WRITE))
                at = end
        buffers.append((status, 1, WRITE))
        return Pending(ring.chain(buffers, indirect=indirect), status, pieces)

    def submit(self, *pending: Pending, queue: int = 0, kick: bool = True) -> None:
        ring = self.rings[queue]
        old = ring.next_available
        ring.offer(*[one.head for one in pending])
        if kick and ring.wants_kick(old):
            ring.kick()

    def finish(self, pending: Pending, queue: int = 0, deadline: float = DEADLINE) -> tuple[int, bytes]:
        """Wait for it. Returns status and data."""
        self.rings[queue].wait([pending.head], deadline)
        self.rings[queue].answered.pop(pending.head)
        data = b"".join(self.memory.read(at, length) for at, length in pending.pieces)
        return self.memory.read(pending.status, 1)[0], data

    def request(self, kind: int, sector: int = 0, **how: object) -> tuple[int, bytes]:
        """One request, alone."""
        queue = int(how.get("queue", 0))  # type: ignore[call-overload]
        mark = self.memory.mark()
        pending = self.prepare(kind, sector, **how)  # type: ignore[arg-type]
        self.submit(pending, queue=queue)
        answer = self.finish(pending, queue)
        self.memory.release(mark)
        return answer

    def read(self, offset: int, length: int, **how: object) -> bytes:
        status, data = self.request(IN, offset // 512, room=length, **how)
        assert status == OK, status
        return data

    def write(self, offset: int, data: bytes, **how: object) -> None:
        assert self.request(OUT, offset // 512, out=data, **how)[0] == OK

    def flush(self, **how: object) -> None:
        assert self.request(FLUSH, **how)[0] == OK


def ranges(*which: tuple[int, int, int]) -> bytes:
    """The data of a DISCARD or WRITE_ZEROES: (sector, sectors, flags)."""
    return b"".join(struct.pack("<QII", *one) for one in which)
