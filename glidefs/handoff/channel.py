"""The socket between predecessor and successor: packets, deadlines, and what is believed about the peer.

A packet is one message in MessagePack with up to 250 descriptors. One that is too long for a packet
travels in a memfd; descriptors that are too many come in packets of their own before it.

No call waits longer than it is told to: the socket never blocks, and each wait is a poll with a deadline.
What is believed about the other process, and why:

- it is *dead* (:class:`PeerGone`) when a pidfd shows it gone and what it had sent was read;
- it has *called the handoff off* (:class:`CalledOff`) when it said so, or has hung up and lives on. A broken
  pipe says neither: whoever meets one reads the last words first (:meth:`Channel.last_words`);
- it *can say no more* after :meth:`Channel.fence`: a message is either in the queue by then, or sending it
  fails over there. So a deadline that passes while the message is on its way leaves no doubt about who owns
  the exports.
"""

from __future__ import annotations

import array
import contextlib
import logging
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Sequence
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from glidefs.errors import GlideError
from glidefs.handoff.deadlines import Patience, deadlines
from glidefs.handoff.protocol import Abort, Message, ProtocolError

log = logging.getLogger(__name__)

DIE_VARIABLE, STOP_VARIABLE = "GLIDEFS_TEST_HANDOFF_DIE", "GLIDEFS_TEST_HANDOFF_STOP"
_PACKET = 60 << 10
_DESCRIPTORS = 250
_MAX_BODY = 16 << 30
_STILL_THERE = 10.0
"""Seconds between two lines about a process that does not die."""


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
    """The other process lives but does not answer, or does not read."""

    temporary = True


class CalledOff(GlideError):
    """The other process, which lives, wants no handoff any more; or this one was told to stop."""

    temporary = True


class Undelivered(Exception):
    """The other process cannot get the message: it is dead, has hung up, or has fenced this side."""


class Channel:
    """One end. ``side`` is "predecessor" or "successor"; ``peer`` a pidfd of the other process.

    ``cancel`` ends waits with CalledOff, until :attr:`committed` is set. For one thread, but for
    :meth:`kill_peer`. ``close()`` closes both descriptors.
    """

    def __init__(
        self, sock: socket.socket, peer: int, side: str, cancel: threading.Event | None = None
    ) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._peer = peer
        self._side = side
        self._cancel = cancel or threading.Event()
        self._descriptors: list[int] = []
        self._fenced = False
        self.committed = False

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
        """Send a message; ``descriptors`` stay the caller's.

        Raises PeerGone, CalledOff, PeerSilent when there is no room for it in time, OSError.
        """
        try:
            self.post(message, descriptors)
        except Undelivered as error:
            raise self.last_words() from error

    def post(self, message: Message, descriptors: Sequence[int] = (), patience: float | None = None) -> None:
        """The same, and it does not ask why it failed. Raises Undelivered, PeerSilent, OSError.

        ``patience``: seconds to wait for room, if not the usual ones.
        """
        kind = message.__struct_config__.tag
        at_boundary(self._side, "before", kind)
        data, rest = _encode(message), list(descriptors)
        left = Patience(deadlines().send if patience is None else patience)
        body = -1
        try:
            if len(data) > _PACKET:
                body = _memfd(data)
                data = _encode(_Body(len(data)))
                rest.append(body)
            while len(rest) > _DESCRIPTORS:
                self._packet(_encode(_Part()), rest[:_DESCRIPTORS], left)
                rest = rest[_DESCRIPTORS:]
            self._packet(data, rest, left)
        finally:
            if body >= 0:
                os.close(body)
        at_boundary(self._side, "after", kind)

    def _packet(self, data: bytes, descriptors: list[int], left: Patience) -> None:
        rights = (
            [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        )
        while True:
            try:
                self._socket.sendmsg([data], rights, socket.MSG_DONTWAIT)
                return
            except ConnectionResetError:
                continue  # what was sent before was not read; said once
            except BrokenPipeError as error:
                raise Undelivered from error
            except BlockingIOError:
                if left.over:
                    raise PeerSilent("the other process does not read what it is sent") from None
            poll = select.poll()
            poll.register(self._socket, select.POLLOUT)
            left.wait(poll)

    def last_words(self) -> PeerGone | CalledOff:
        """Why nothing can be sent any more: the other process is dead, or called it off."""
        try:
            while True:
                message, descriptors = self.receive(deadlines().dying)
                for fd in descriptors:
                    os.close(fd)
                if isinstance(message, Abort):
                    return CalledOff(message.reason)
        except (PeerGone, CalledOff) as error:
            return error
        except GlideError:
            return CalledOff("the other process has hung up")

    # -- receiving -------------------------------------------------------------------------------

    def receive(self, patience: float) -> tuple[Message, list[int]]:
        """The next message and its descriptors, which are the caller's.

        Raises PeerGone, CalledOff, PeerSilent after ``patience`` seconds, ProtocolError.
        """
        left = Patience(patience)
        while True:
            packet = self._next(left)
            if isinstance(packet, _Part):
                continue
            descriptors, self._descriptors = self._descriptors, []
            if isinstance(packet, _Body):
                packet = _from_memfd(descriptors.pop(), packet.length)
            at_boundary(self._side, "got", packet.__struct_config__.tag)
            return packet, descriptors

    def _next(self, left: Patience) -> Message | _Part | _Body:
        ended = False
        while True:
            gone = self._is_gone()
            data = None if ended else self._packet_here()
            if data:
                try:
                    return _decoder.decode(data)
                except msgspec.MsgspecError as error:
                    raise ProtocolError(f"a message that this program does not know: {error}") from error
            if gone:
                self._drop()
                raise PeerGone
            if data == b"":
                ended = True
                left.at_most(0.0 if self._fenced else deadlines().dying)
            if self._cancel.is_set() and not self.committed:
                raise CalledOff("this process was told to stop")
            if left.over:
                if ended and not self._fenced:
                    raise CalledOff("the other process has hung up")
                raise PeerSilent("the other process does not answer")
            self._wait(ended, left)

    def _packet_here(self) -> bytes | None:
        """A packet; b"" at the end of the stream, None if there is none yet. Keeps its descriptors.

        Not `socket.recv_fds`, which forgets its flags, and so waits for ever.
        """
        room = socket.CMSG_SPACE((_DESCRIPTORS + 1) * array.array("i").itemsize)
        while True:
            try:
                data, extra, _, _ = self._socket.recvmsg(
                    2 * _PACKET, room, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                return None
            except ConnectionResetError:
                continue  # it has hung up and did not read all; said once, what it sent comes next
            for level, kind, rights in extra:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    fds = array.array("i")
                    fds.frombytes(rights[: len(rights) - len(rights) % fds.itemsize])
                    self._descriptors += fds
            return data

    def _wait(self, ended: bool, left: Patience) -> None:
        poll = select.poll()
        if not ended:
            poll.register(self._socket, select.POLLIN)
        poll.register(self._peer, select.POLLIN)
        left.wait(poll)

    # -- the other process -----------------------------------------------------------------------

    def fence(self) -> None:
        """From the return on the other process can send nothing more: it gets a broken pipe.

        What it had sent before can be received; after that comes PeerSilent at once, or PeerGone.
        """
        self._fenced = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RD)

    def check(self) -> None:
        """Raises CalledOff or PeerGone if the other process has called it off or died."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        poll.register(self._peer, select.POLLIN)
        if poll.poll(0) or self._cancel.is_set():
            raise self.last_words()

    def call_off(self, reason: str) -> None:
        """Tell the other process, if it can be told without waiting, and take no more from it."""
        with contextlib.suppress(PeerSilent, Undelivered, OSError):
            self.post(Abort(reason), patience=0)
        self.fence()

    def _is_gone(self, seconds: float = 0) -> bool:
        poll = select.poll()
        poll.register(self._peer, select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    def wait_closed(self, seconds: float) -> None:
        """Wait until the other process has closed its end, or is gone."""
        poll = select.poll()
        poll.register(self._socket, select.POLLRDHUP)
        poll.register(self._peer, select.POLLIN)
        left = Patience(seconds)
        while not left.over and not left.wait(poll):
            pass

    def kill_peer(self) -> None:
        """End the other process, which must not do anything after this. Returns when it is gone.

        Only a kernel that does not let go of it makes this long; nobody may touch its logs before.
        """
        began = said = time.monotonic()
        with contextlib.suppress(OSError):  # gone already
            signal.pidfd_send_signal(self._peer, signal.SIGKILL)
        while not self._is_gone(1.0):
            now = time.monotonic()
            if now - said >= _STILL_THERE:
                said = now
                log.warning(
                    "the process of the other side was killed and is not gone after %.0f s", now - began
                )


def at_boundary(side: str, when: str, kind: object) -> None:
    """For tests: end or stop this process where the environment says so, as "successor:after:ready"."""
    here = f"{side}:{when}:{kind}"
    if os.environ.get(DIE_VARIABLE) == here:
        os.kill(os.getpid(), signal.SIGKILL)
    if os.environ.get(STOP_VARIABLE) == here:
        signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)  # this thread does nothing more before


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
