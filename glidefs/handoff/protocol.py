"""What predecessor and successor tell each other, over a Unix SEQPACKET socket.

    successor                    predecessor
        hello            ──►                     versions, capabilities, which cache directory
                         ◄──     hello-ack       nothing is committed or retired from here on;
                                                 locks and listeners (descriptors)
        (opens all exports in standby)
        ready            ──►
                         ◄──     cut-over        everything is frozen; where each log ends;
                                                 connections (descriptors)
        (brings logs up to date, recovers ublk devices, adopts connections)
        alive            ──►                     the predecessor only exits
        served           ──►                     how long guests waited, for the answer
    abort                either side, any time before alive: why

A packet is one message in MessagePack with up to 250 descriptors. One that is too long for a packet
travels in a memfd; descriptors that are too many come in packets of their own before it.

Either side acts on the other's death only when a pidfd shows it gone and the socket is drained
(:class:`PeerGone`): a process that was merely slow must not find another one at its logs.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import time
from collections.abc import Sequence
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from glidefs.core.handoff import Connection, Position
from glidefs.errors import GlideError
from glidefs.handoff.history import Totals

VERSION = 1
"""Of the messages; a successor says which is the oldest that it speaks, too."""
CAPABILITIES = frozenset({"nbd-connections", "ublk"})
"""What this program can hand over or take over; what the other side cannot, is not handed over."""

_PACKET = 60 << 10
_DESCRIPTORS = 250
_MAX_BODY = 16 << 30
_POLL = 0.2


class Hello(Struct, frozen=True, tag="hello", tag_field="type"):
    """From the successor, which is `pid`: it can speak `oldest` to `version`."""

    version: int
    oldest: int
    capabilities: tuple[str, ...]
    pid: int
    cache_dir: str
    program: str


class ListenerInfo(Struct, frozen=True):
    """A listening socket, "nbd" or "api"; `path` is its file, if that is ours to remove."""

    role: str
    path: str = ""


class HelloAck(Struct, frozen=True, tag="hello-ack", tag_field="type"):
    """From the predecessor. Descriptors: `locks` of them, then the listeners. `exports`: those it serves."""

    version: int
    capabilities: tuple[str, ...]
    exports: tuple[str, ...]
    locks: int
    listeners: tuple[ListenerInfo, ...]
    totals: Totals


class Ready(Struct, frozen=True, tag="ready", tag_field="type"):
    """From the successor: all exports are open in standby; `seconds` since it began with that."""

    seconds: float


class ConnectionCut(Struct, frozen=True):
    """An NBD connection; its descriptor comes in the order of the message."""

    state: Connection
    peer: str
    since: float


class ExportCut(Struct, frozen=True):
    """Where an export stood when it was frozen; `etag` and `sequence` are of its root in the store."""

    name: str
    position: Position
    etag: str | None
    sequence: int
    transport: str
    connections: tuple[ConnectionCut, ...]


class CutOver(Struct, frozen=True, tag="cut-over", tag_field="type"):
    """From the predecessor, which has stopped; `frozen_at` in ns of CLOCK_MONOTONIC."""

    exports: tuple[ExportCut, ...]
    frozen_at: int


class Alive(Struct, frozen=True, tag="alive", tag_field="type"):
    """From the successor: it serves; `stall` in seconds, for NBD clients a little longer."""

    stall: float


class Served(Struct, frozen=True, tag="served", tag_field="type"):
    """From the successor: no guest waits any more, the last one waited `stall` seconds."""

    stall: float


class Abort(Struct, frozen=True, tag="abort", tag_field="type"):
    """From either: nothing comes of it, and why."""

    reason: str


Message = Hello | HelloAck | Ready | CutOver | Alive | Served | Abort


class _Part(Struct, frozen=True, tag="part", tag_field="type"):
    """Descriptors of the message that follows."""


class _Body(Struct, frozen=True, tag="body", tag_field="type"):
    """The message is in the memfd that is the last descriptor."""

    length: Annotated[int, Meta(ge=0, le=_MAX_BODY)]


_decoder: msgspec.msgpack.Decoder[Message | _Part | _Body] = msgspec.msgpack.Decoder(Message | _Part | _Body)
_message_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)
_encode = msgspec.msgpack.Encoder().encode


class PeerGone(Exception):
    """The other process is dead, and what it sent was received."""


class PeerSilent(GlideError):
    """The other process lives but does not answer."""

    temporary = True


class ProtocolError(GlideError):
    """The other process said what this one does not understand."""


class Channel:
    """One end. ``side`` is "predecessor" or "successor"; ``peer`` a pidfd of the other process.

    For one thread. ``close()`` closes both descriptors.
    """

    def __init__(self, sock: socket.socket, peer: int, side: str) -> None:
        self._socket = sock
        self._peer = peer
        self._side = side
        self._descriptors: list[int] = []

    def close(self) -> None:
        """End the conversation."""
        self._drop()
        self._socket.close()
        if self._peer >= 0:
            os.close(self._peer)
            self._peer = -1

    def _drop(self) -> None:
        for fd in self._descriptors:
            os.close(fd)
        self._descriptors = []

    # -- sending ---------------------------------------------------------------------------------

    def send(self, message: Message, descriptors: Sequence[int] = ()) -> None:
        """Send a message; ``descriptors`` stay the caller's. Raises PeerGone, OSError."""
        kind = message.__struct_config__.tag
        die(self._side, "before", kind)
        data, rest = _encode(message), list(descriptors)
        body = -1
        try:
            if len(data) > _PACKET:
                body = _memfd(data)
                data = _encode(_Body(len(data)))
                rest.append(body)
            while len(rest) > _DESCRIPTORS:
                self._packet(_encode(_Part()), rest[:_DESCRIPTORS])
                rest = rest[_DESCRIPTORS:]
            self._packet(data, rest)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise PeerGone from error
        finally:
            if body >= 0:
                os.close(body)
        die(self._side, "after", kind)

    def _packet(self, data: bytes, descriptors: list[int]) -> None:
        socket.send_fds(self._socket, [data], descriptors)

    # -- receiving -------------------------------------------------------------------------------

    def receive(self, patience: float) -> tuple[Message, list[int]]:
        """The next message and its descriptors, which are the caller's.

        Raises PeerGone, PeerSilent after ``patience`` seconds, ProtocolError.
        """
        until = time.monotonic() + patience
        while True:
            packet = self._next(until)
            if isinstance(packet, _Part):
                continue
            descriptors, self._descriptors = self._descriptors, []
            if isinstance(packet, _Body):
                packet = _from_memfd(descriptors.pop(), packet.length)
            die(self._side, "got", packet.__struct_config__.tag)
            return packet, descriptors

    def _next(self, until: float) -> Message | _Part | _Body:
        ended = False
        while True:
            gone = self._is_gone(0)
            data, more, _, _ = self._try(ended)
            self._descriptors += more
            if data:
                try:
                    return _decoder.decode(data)
                except msgspec.MsgspecError as error:
                    raise ProtocolError(f"a message that this program does not know: {error}") from error
            ended = ended or data == b""
            if gone:
                self._drop()
                raise PeerGone
            left = until - time.monotonic()
            if left <= 0:
                raise PeerSilent("the other process does not answer")
            self._wait(ended, min(left, _POLL))

    def _try(self, ended: bool) -> tuple[bytes | None, list[int], int, object]:
        """A packet; b"" at the end of the stream, None if there is none yet."""
        if ended:
            return None, [], 0, None
        try:
            return socket.recv_fds(
                self._socket,
                2 * _PACKET,
                _DESCRIPTORS + 1,
                socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC,
            )
        except BlockingIOError:
            return None, [], 0, None
        except ConnectionResetError:
            return b"", [], 0, None

    def _wait(self, ended: bool, seconds: float) -> None:
        poll = select.poll()
        if not ended:
            poll.register(self._socket, select.POLLIN)
        poll.register(self._peer, select.POLLIN)
        poll.poll(seconds * 1000)

    def _is_gone(self, seconds: float) -> bool:
        poll = select.poll()
        poll.register(self._peer, select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    def wait_closed(self, seconds: float) -> None:
        """Wait until the other process has closed its end, or is gone."""
        poll = select.poll()
        poll.register(self._socket, select.POLLRDHUP)
        poll.register(self._peer, select.POLLIN)
        poll.poll(seconds * 1000)

    def kill_peer(self) -> None:
        """End the other process, which must not do anything after this. Returns when it is gone."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._peer, signal.SIGKILL)
        while not self._is_gone(1.0):
            pass


def common_version(hello: Hello) -> int:
    """The version to speak with a successor. Raises ProtocolError if there is none."""
    if hello.oldest > VERSION or hello.version < VERSION:
        raise ProtocolError(
            f"{hello.program} speaks handoff versions {hello.oldest} to {hello.version}, this one {VERSION}; "
            "stop this daemon and start the other one"
        )
    return VERSION


def die(side: str, when: str, kind: object) -> None:
    """For tests: end this process by SIGKILL where the environment says so, as "successor:after:ready"."""
    if os.environ.get("GLIDEFS_TEST_HANDOFF_DIE") == f"{side}:{when}:{kind}":
        os.kill(os.getpid(), signal.SIGKILL)


def _memfd(data: bytes) -> int:
    fd = os.memfd_create("glidefs-handoff", os.MFD_CLOEXEC)
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    return fd


def _from_memfd(fd: int, length: int) -> Message:
    try:
        data = bytearray()
        while len(data) < length and (part := os.pread(fd, min(length - len(data), 1 << 30), len(data))):
            data += part
        return _message_decoder.decode(data)
    except msgspec.MsgspecError as error:
        raise ProtocolError(f"a message that this program does not know: {error}") from error
    finally:
        os.close(fd)
