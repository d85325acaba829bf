"""A volume that moves between two engines, as it does between two processes, and NBD clients of it."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable
from typing import Any

from core_rig import CoreRig, Vol

from glidefs.core import handoff

READ, WRITE, DISC, FLUSH, TRIM, _, ZEROES = range(7)
FUA = 1
REQUEST = struct.Struct(">IHHQQI")
REPLY = struct.Struct(">IIQ")

MakeRig = Callable[..., CoreRig]


def request(kind: int, cookie: int, offset: int = 0, length: int = 0, flags: int = 0) -> bytes:
    return REQUEST.pack(0x25609513, flags, kind, cookie, offset, length)


class Client:
    """One end of a connection in transmission; the other end is a descriptor for the core."""

    def __init__(self) -> None:
        self.socket, server = socket.socketpair()
        self.socket.settimeout(20)
        self.server = server.detach()

    def send(self, *parts: bytes) -> None:
        self.socket.sendall(b"".join(parts))

    def receive(self, length: int) -> bytes:
        data = bytearray()
        while len(data) < length:
            part = self.socket.recv(length - len(data))
            assert part, "the connection was closed"
            data += part
        return bytes(data)

    def reply(self, length: int = 0) -> tuple[int, int, bytes]:
        """(cookie, error, data) of the next one; `length` of a READ that went well."""
        magic, error, cookie = REPLY.unpack(self.receive(REPLY.size))
        assert magic == 0x67446698
        return cookie, error, b"" if error else self.receive(length)

    def quiet(self, seconds: float = 0.1) -> bool:
        """Whether nothing comes."""
        self.socket.settimeout(seconds)
        try:
            return not self.socket.recv(1, socket.MSG_PEEK)
        except TimeoutError:
            return True
        finally:
            self.socket.settimeout(20)


class Pair:
    """The same volume in the process that has it and in the one that takes it."""

    def __init__(self, make_rig: MakeRig, *, flush_store: bool = False, **config: Any) -> None:
        self._make = make_rig
        self._config = config
        self.old = make_rig(**config)
        self.vol = self.old.vol(flush_store=flush_store)
        self.new: CoreRig
        self.next: Vol

    def warm(self) -> None:
        self.new = self._make(standby=True, **self._config)
        self.next = Vol(self.new, self.vol.dir, self.vol.config["size"], **self.vol.config_without_size())
        self.next.base, self.next.committed_seq = self.vol.base, self.vol.committed_seq
        self.next.open(standby=True)

    def move(self) -> Vol:
        """Cut over: freeze, activate, adopt, go on; the old one drops what it had."""
        position = handoff.freeze(self.vol.core)
        handoff.give_cache(self.old.engine)
        moving = [(os.dup(fd), connection) for fd, connection in handoff.connections(self.vol.core)]
        handoff.activate(self.next.core, position)
        for fd, connection in moving:
            handoff.adopt(self.next.core, fd, connection)
        self.vol.close()
        handoff.unfreeze(self.next.core)
        handoff.take_cache(self.new.engine)
        self.next.config.pop("standby")
        self.old, self.vol = self.new, self.next
        return self.vol
