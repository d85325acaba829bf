"""The bytes of vhost-user messages (QEMU, docs/interop/vhost-user), and nothing else.

A message is a header of 12 bytes (request, flags, size of the payload), a payload of a form that the request
decides, and descriptors beside it. All numbers are little-endian. What a message may have is in one table;
whatever is beyond it is refused before anything looks at the rest.
"""

from __future__ import annotations

import array
import contextlib
import enum
import os
import socket
import struct
from collections.abc import Callable, Iterable

from msgspec import Struct

from glidefs.core.vhost import Region
from glidefs.errors import GlideError

HEADER = struct.Struct("<III")
VERSION = 1
_VERSION_MASK = 3
_REPLY = 1 << 2
_NEED_REPLY = 1 << 3
_U64 = struct.Struct("<Q")
_STATE = struct.Struct("<II")
_ADDRESS = struct.Struct("<IIQQQQ")
_TABLE = struct.Struct("<II")
_REGION = struct.Struct("<QQQQ")
_CONFIG = struct.Struct("<III")
_INFLIGHT = struct.Struct("<QQHH")
_NO_DESCRIPTOR = 1 << 8
MAX_TABLE = 8
"""Regions of one SET_MEM_TABLE; more come by ADD_MEM_REG."""
CONFIG_BYTES = 256
_MAX_DESCRIPTORS = 16
"""That are received with one message; those beyond what it may have are closed."""


class BadMessage(GlideError):
    """The front-end said what this protocol does not have."""


class Request(enum.IntEnum):
    """What front-ends ask for."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SET_BACKEND_REQ_FD = 21
    GET_CONFIG = 24
    SET_CONFIG = 25
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38


class ProtocolFeature(enum.IntFlag):
    """Bits of SET_PROTOCOL_FEATURES."""

    MQ = 1 << 0
    REPLY_ACK = 1 << 3
    BACKEND_REQ = 1 << 5
    CONFIG = 1 << 9
    INFLIGHT_SHMFD = 1 << 12
    CONFIGURE_MEM_SLOTS = 1 << 15


class _Shape(Struct, frozen=True):
    least: int
    most: int
    descriptors: tuple[int, int] = (0, 0)


_NOTHING, _NUMBER, _OF_RING = _Shape(0, 0), _Shape(8, 8), _Shape(8, 8)
_ONE_REGION = _Shape(8 + _REGION.size, 8 + _REGION.size, (0, 1))
_INFLIGHT_SHAPE = (_INFLIGHT.size, 24)  # with the padding that C gives it, or without
_SHAPES = {
    Request.GET_FEATURES: _NOTHING,
    Request.SET_FEATURES: _NUMBER,
    Request.SET_OWNER: _NOTHING,
    Request.RESET_OWNER: _NOTHING,
    Request.SET_MEM_TABLE: _Shape(_TABLE.size, _TABLE.size + MAX_TABLE * _REGION.size, (0, MAX_TABLE)),
    Request.SET_VRING_NUM: _OF_RING,
    Request.SET_VRING_ADDR: _Shape(_ADDRESS.size, _ADDRESS.size),
    Request.SET_VRING_BASE: _OF_RING,
    Request.GET_VRING_BASE: _OF_RING,
    Request.SET_VRING_KICK: _Shape(8, 8, (0, 1)),
    Request.SET_VRING_CALL: _Shape(8, 8, (0, 1)),
    Request.SET_VRING_ERR: _Shape(8, 8, (0, 1)),
    Request.GET_PROTOCOL_FEATURES: _NOTHING,
    Request.SET_PROTOCOL_FEATURES: _NUMBER,
    Request.GET_QUEUE_NUM: _NOTHING,
    Request.SET_VRING_ENABLE: _OF_RING,
    Request.SET_BACKEND_REQ_FD: _Shape(0, 8, (1, 1)),
    Request.GET_CONFIG: _Shape(_CONFIG.size, _CONFIG.size + CONFIG_BYTES),
    Request.SET_CONFIG: _Shape(_CONFIG.size + 1, _CONFIG.size + CONFIG_BYTES),
    Request.GET_INFLIGHT_FD: _Shape(*_INFLIGHT_SHAPE),
    Request.SET_INFLIGHT_FD: _Shape(*_INFLIGHT_SHAPE, (1, 1)),
    Request.GET_MAX_MEM_SLOTS: _NOTHING,
    Request.ADD_MEM_REG: _Shape(_ONE_REGION.least, _ONE_REGION.most, (1, 1)),
    Request.REM_MEM_REG: _ONE_REGION,
}


class Message(Struct, frozen=True):
    """A request. ``needs_reply``: an answer is asked for, whether the request has one of its own or not.

    ``descriptors`` are the receiver's, to be kept or closed.
    """

    request: Request
    needs_reply: bool
    payload: bytes
    descriptors: tuple[int, ...] = ()

    def pack(self) -> bytes:
        """Its bytes."""
        flags = VERSION | (_NEED_REPLY if self.needs_reply else 0)
        return HEADER.pack(self.request, flags, len(self.payload)) + self.payload


def check_header(header: bytes) -> tuple[Request, bool, int]:
    """Request, whether it needs a reply, and bytes of its payload. Raises BadMessage."""
    number, flags, size = HEADER.unpack(header)
    try:
        request = Request(number)
    except ValueError:
        raise BadMessage(f"request {number} is not known or was not agreed on") from None
    if flags & _VERSION_MASK != VERSION or flags & ~(_VERSION_MASK | _NEED_REPLY):
        raise BadMessage(f"{request.name} has flags {flags:#x}")
    shape = _SHAPES[request]
    if not shape.least <= size <= shape.most:
        raise BadMessage(f"{request.name} has a payload of {size} bytes")
    return request, bool(flags & _NEED_REPLY), size


def check_descriptors(request: Request, count: int) -> None:
    """Raises BadMessage."""
    least, most = _SHAPES[request].descriptors
    if not least <= count <= most:
        raise BadMessage(f"{request.name} came with {count} descriptors")


# -- payloads ------------------------------------------------------------------------------------------


def number_of(payload: bytes) -> int:
    """A u64."""
    return int(_U64.unpack(payload)[0])


def state_of(payload: bytes) -> tuple[int, int]:
    """Index of a queue, and a number."""
    index, number = _STATE.unpack(payload)
    return int(index), int(number)


class RingAddress(Struct, frozen=True):
    """SET_VRING_ADDR; addresses are the front-end's. ``flags`` bit 0: log what is written."""

    index: int
    flags: int
    descriptors: int
    used: int
    available: int
    log: int


def address_of(payload: bytes) -> RingAddress:
    """Where a ring is."""
    return RingAddress(*_ADDRESS.unpack(payload))


def table_of(payload: bytes, descriptors: int) -> list[Region]:
    """The regions of a SET_MEM_TABLE with so many descriptors. Raises BadMessage."""
    count, _ = _TABLE.unpack_from(payload)
    if count > MAX_TABLE or len(payload) != _TABLE.size + count * _REGION.size:
        raise BadMessage(f"SET_MEM_TABLE of {count} regions has {len(payload)} bytes")
    if descriptors != count:
        raise BadMessage(f"SET_MEM_TABLE of {count} regions came with {descriptors} descriptors")
    return [Region(*_REGION.unpack_from(payload, _TABLE.size + i * _REGION.size)) for i in range(count)]


def region_of(payload: bytes) -> Region:
    """That of ADD_MEM_REG and REM_MEM_REG."""
    return Region(*_REGION.unpack_from(payload, 8))


def event_of(message: Message) -> tuple[int, int | None]:
    """Queue and descriptor of SET_VRING_KICK, _CALL and _ERR. Raises BadMessage."""
    number = number_of(message.payload)
    if number & ~(_NO_DESCRIPTOR | 0xFF):
        raise BadMessage(f"{message.request.name} of {number:#x}")
    if bool(number & _NO_DESCRIPTOR) == bool(message.descriptors):
        raise BadMessage(f"{message.request.name} came with {len(message.descriptors)} descriptors")
    return number & 0xFF, message.descriptors[0] if message.descriptors else None


def config_of(payload: bytes) -> tuple[int, int, int, bytes]:
    """Offset, length, flags and bytes of GET_CONFIG and SET_CONFIG. Raises BadMessage."""
    offset, size, flags = _CONFIG.unpack_from(payload)
    if offset > CONFIG_BYTES or size > CONFIG_BYTES - offset:
        raise BadMessage(f"the configuration space has no {size} bytes at {offset}")
    return int(offset), int(size), int(flags), payload[_CONFIG.size :]


class Inflight(Struct, frozen=True):
    """The record of what is in flight: its place in its file, and of how many queues of how many entries."""

    size: int
    offset: int
    queues: int
    depth: int


def inflight_of(payload: bytes) -> Inflight:
    """That of GET_INFLIGHT_FD and SET_INFLIGHT_FD."""
    return Inflight(*_INFLIGHT.unpack_from(payload))


# -- answers -------------------------------------------------------------------------------------------


def reply(request: Request, payload: bytes) -> bytes:
    """The bytes of an answer."""
    return HEADER.pack(request, VERSION | _REPLY, len(payload)) + payload


def number(value: int) -> bytes:
    """The payload of an answer that is one."""
    return _U64.pack(value)


def state(index: int, value: int) -> bytes:
    """Of GET_VRING_BASE."""
    return _STATE.pack(index, value)


def config(offset: int, flags: int, data: bytes) -> bytes:
    """Of GET_CONFIG; no data: it was refused."""
    return _CONFIG.pack(offset, len(data), flags) + data


def inflight(record: Inflight, size: int) -> bytes:
    """Of GET_INFLIGHT_FD, as long as what was asked with."""
    return _INFLIGHT.pack(record.size, record.offset, record.queues, record.depth).ljust(size, b"\0")


CONFIG_CHANGED = HEADER.pack(2, VERSION, 0)
"""From the back-end: the front-end should read the configuration space again."""


# -- receiving -----------------------------------------------------------------------------------------


def close_all(descriptors: Iterable[int]) -> None:
    """Close what came with messages."""
    for fd in descriptors:
        with contextlib.suppress(OSError):
            os.close(fd)


class Receiver:
    """Puts messages together from a socket that does not block. What is not complete stays here."""

    def __init__(self, received: bytes = b"", descriptors: list[int] | None = None) -> None:
        self.received = bytearray(received)
        self.descriptors = descriptors or []

    def close(self) -> None:
        """Give up what is not complete."""
        close_all(self.descriptors)
        self.descriptors = []

    def next(self, sock: socket.socket) -> Message | None:
        """The next message; None: there is none yet. Raises BadMessage, EOFError, OSError."""
        return self._next(lambda size: self._receive(sock, size))

    def _next(self, more: Callable[[int], bool]) -> Message | None:
        while len(self.received) < HEADER.size:
            if not more(HEADER.size - len(self.received)):
                return None
        request, needs_reply, size = check_header(bytes(self.received[: HEADER.size]))
        while len(self.received) < HEADER.size + size:
            if not more(HEADER.size + size - len(self.received)):
                return None
        check_descriptors(request, len(self.descriptors))
        payload = bytes(self.received[HEADER.size : HEADER.size + size])
        del self.received[: HEADER.size + size]
        descriptors, self.descriptors = tuple(self.descriptors), []
        return Message(request, needs_reply, payload, descriptors)

    def _receive(self, sock: socket.socket, size: int) -> bool:
        """Descriptors lie with the first bytes of their message, and no receive reaches beyond one."""
        room = socket.CMSG_SPACE(_MAX_DESCRIPTORS * array.array("i").itemsize)
        try:
            data, extra, flags, _ = sock.recvmsg(size, room, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC)
        except (BlockingIOError, InterruptedError):
            return False
        for level, kind, rights in extra:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds = array.array("i")
                fds.frombytes(rights[: len(rights) - len(rights) % fds.itemsize])
                self.descriptors += fds
        if flags & socket.MSG_CTRUNC or len(self.descriptors) > _MAX_DESCRIPTORS:
            raise BadMessage(f"a message with more than {_MAX_DESCRIPTORS} descriptors")
        if not data:
            raise EOFError
        self.received += data
        return True
