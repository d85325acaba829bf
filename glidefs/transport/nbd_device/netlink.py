"""The kernel's NBD driver over generic netlink: Linux 4.12 or later.

Commands and attributes are those of `include/uapi/linux/nbd-netlink.h`, messages those of "Introduction to
Netlink" in the kernel's documentation. pyroute2 has all this and more, and takes a quarter of a second to
import: in a handoff guests would wait for it.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Self

from msgspec import Struct

from glidefs.errors import DeviceError

_NETLINK_GENERIC = 16
_CONTROL = 0x10
_GET_FAMILY, _FAMILY_ID, _FAMILY_NAME = 3, 1, 2
_ERROR = 2
_REQUEST, _ACK = 1, 4
_NESTED = 0x8000
_HEADER = struct.Struct("=IHHII")
_GENERIC = struct.Struct("=BBH")
_ATTRIBUTE = struct.Struct("=HH")
_RECEIVE = 1 << 16
_PATIENCE = 60.0
"""Seconds for an answer: the kernel waits for requests that are under way before it disconnects."""

_CONNECT, _DISCONNECT, _RECONFIGURE = 1, 2, 3
_INDEX, _SIZE, _BLOCK_SIZE, _TIMEOUT, _SERVER_FLAGS, _CLIENT_FLAGS = 1, 2, 3, 4, 5, 6
_SOCKETS, _DEAD_TIMEOUT, _IDENTIFIER = 7, 8, 10
_SOCKET_ITEM, _SOCKET_FD = 1, 1

HAS_FLAGS, READ_ONLY, SEND_FLUSH, SEND_FUA, SEND_TRIM, SEND_WRITE_ZEROES = 1, 2, 4, 8, 32, 64
"""Of the server (NBD_FLAG_*)."""
DESTROY_ON_DISCONNECT = 1
"""Of the client (NBD_CFLAG_*): the device goes when nobody has it open any more."""


class DeviceShape(Struct, frozen=True):
    """What the kernel is told of a new device. Sizes in bytes, times in whole seconds.

    ``request_timeout``: a request without an answer for so long is sent again, over another connection.
    ``dead_timeout``: requests wait so long for one, then they fail.
    """

    size: int
    block_size: int
    read_only: bool
    request_timeout: int
    dead_timeout: int
    identifier: str


class NbdControl:
    """A netlink socket to the driver. Of one thread at a time. Every call raises DeviceError."""

    def __init__(self) -> None:
        try:
            self._socket = socket.socket(
                socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_GENERIC
            )
        except OSError as error:
            raise DeviceError(f"no netlink socket: {error.strerror}", errno=error.errno or 0) from error
        self._socket.settimeout(_PATIENCE)
        self._sequence = 0
        try:
            self._family = self._find_family()
        except BaseException:
            self._socket.close()
            raise

    def close(self) -> None:
        """Close the socket; devices stay as they are."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def connect(self, index: int, shape: DeviceShape, fd: int) -> None:
        """Make `/dev/nbdINDEX`, served by the peer of ``fd``, of which the kernel keeps a copy.

        EBUSY: the number is taken.
        """
        flags = HAS_FLAGS | SEND_FLUSH | SEND_FUA | SEND_TRIM | SEND_WRITE_ZEROES
        if shape.read_only:
            flags |= READ_ONLY
        self._call(
            _CONNECT,
            f"connect /dev/nbd{index}",
            [
                _u32(_INDEX, index),
                _u64(_SIZE, shape.size),
                _u64(_BLOCK_SIZE, shape.block_size),
                _u64(_TIMEOUT, shape.request_timeout),
                _u64(_DEAD_TIMEOUT, shape.dead_timeout),
                _u64(_SERVER_FLAGS, flags),
                _u64(_CLIENT_FLAGS, DESTROY_ON_DISCONNECT),
                _text(_IDENTIFIER, shape.identifier),
                _sockets(fd),
            ],
        )

    def reconnect(self, index: int, identifier: str, fd: int) -> None:
        """Give the device a connection in place of one that ended. If none did, the kernel closes it."""
        attributes = [_u32(_INDEX, index), _text(_IDENTIFIER, identifier), _sockets(fd)]
        self._call(_RECONFIGURE, f"reconnect /dev/nbd{index}", attributes)

    def probe(self, index: int, identifier: str) -> None:
        """Change nothing. EINVAL: it was disconnected, and is there only because somebody has it open."""
        self._call(
            _RECONFIGURE, f"probe /dev/nbd{index}", [_u32(_INDEX, index), _text(_IDENTIFIER, identifier)]
        )

    def resize(self, index: int, identifier: str, size: int) -> None:
        """Tell the device its new size in bytes."""
        attributes = [_u32(_INDEX, index), _text(_IDENTIFIER, identifier), _u64(_SIZE, size)]
        self._call(_RECONFIGURE, f"resize /dev/nbd{index}", attributes)

    def disconnect(self, index: int) -> None:
        """End the device: requests without an answer fail, and it goes when nobody has it open."""
        self._call(_DISCONNECT, f"disconnect /dev/nbd{index}", [_u32(_INDEX, index)])

    # -- messages --------------------------------------------------------------------------------

    def _find_family(self) -> int:
        answer = self._exchange(_CONTROL, _GET_FAMILY, [_text(_FAMILY_NAME, "nbd")], "find the nbd driver")
        for kind, value in _attributes(answer):
            if kind == _FAMILY_ID and len(value) == 2:
                return int.from_bytes(value, sys.byteorder)
        raise DeviceError("the kernel does not say what its nbd driver is called", errno=errno.EPROTO)

    def _call(self, command: int, what: str, attributes: Sequence[bytes]) -> None:
        self._exchange(self._family, command, attributes, what)

    def _exchange(self, family: int, command: int, attributes: Sequence[bytes], what: str) -> bytes:
        """The attributes of the answer, empty if there was only an acknowledgement."""
        self._sequence += 1
        body = _GENERIC.pack(command, 1, 0) + b"".join(attributes)
        head = _HEADER.pack(_HEADER.size + len(body), family, _REQUEST | _ACK, self._sequence, 0)
        answer = b""
        try:
            self._socket.send(head + body)
            while True:
                for kind, sequence, payload in _messages(self._socket.recv(_RECEIVE)):
                    if sequence != self._sequence:
                        continue
                    if kind == _ERROR and len(payload) >= 4:
                        number = -int.from_bytes(payload[:4], sys.byteorder, signed=True)
                        if not number:
                            return answer
                        raise DeviceError(f"{what}: {os.strerror(number)}", errno=number)
                    answer = payload[_GENERIC.size :]
        except TimeoutError as error:
            raise DeviceError(f"{what}: the kernel does not answer", errno=errno.ETIMEDOUT) from error
        except OSError as error:
            raise DeviceError(f"{what}: {error.strerror}", errno=error.errno or 0) from error


def _pad(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def _attribute(kind: int, value: bytes) -> bytes:
    return _pad(_ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value)


def _u32(kind: int, value: int) -> bytes:
    return _attribute(kind, struct.pack("=I", value))


def _u64(kind: int, value: int) -> bytes:
    return _attribute(kind, struct.pack("=Q", value))


def _text(kind: int, value: str) -> bytes:
    return _attribute(kind, value.encode() + b"\0")


def _sockets(fd: int) -> bytes:
    item = _attribute(_SOCKET_ITEM | _NESTED, _u32(_SOCKET_FD, fd))
    return _attribute(_SOCKETS | _NESTED, item)


def _messages(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """(type, sequence, payload) of each whole message of a datagram."""
    while len(data) >= _HEADER.size:
        length, kind, _, sequence, _ = _HEADER.unpack_from(data)
        if not _HEADER.size <= length <= len(data):
            return
        yield kind, sequence, data[_HEADER.size : length]
        data = data[length + -length % 4 :]


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(data)
        if not _ATTRIBUTE.size <= length <= len(data):
            return
        yield kind & ~_NESTED, data[_ATTRIBUTE.size : length]
        data = data[length + -length % 4 :]
