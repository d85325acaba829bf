"""The kernel's NBD driver, as far as a daemon sees it: netlink calls, `/sys/block`, and what is sent again.

A device has one connection. A request whose connection ended is sent again when it is `request_timeout` old
and there is another (drivers/block/nbd.c).
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import socket
import struct
import threading
import time
from pathlib import Path
from typing import Self

from nbd_client import DISC, READ, REPLY_MAGIC, SIMPLE_REPLY, WRITE, request

from glidefs.errors import DeviceError
from glidefs.transport.nbd_device.netlink import DeviceShape

DEADLINE = 20.0


class Pending:
    """A request that has no answer yet."""

    def __init__(self, kind: int, offset: int, data: bytes | int) -> None:
        self.kind = kind
        self.offset = offset
        self.data = data
        self.since = time.monotonic()
        self.sent_on = -1
        self.done = threading.Event()
        self.error = 0
        self.answer = b""


class Device:
    """One `/dev/nbdN`. ``lock`` guards everything."""

    def __init__(self, directory: Path, shape: DeviceShape, request_timeout: float) -> None:
        self.directory = directory
        self.shape = shape
        self.request_timeout = request_timeout
        self.lock = threading.RLock()
        self.socket: socket.socket | None = None
        self.generation = 0
        self.pending: dict[int, Pending] = {}
        self.cookie = 0
        self.connected = True
        self.sent_again = 0
        self._timer = threading.Thread(target=self._send_again, daemon=True)
        self._timer.start()

    def take(self, fd: int) -> None:
        """A connection in place of one that ended; else it is dropped."""
        with self.lock:
            if self.socket is not None:
                return
            self.socket = socket.socket(fileno=os.dup(fd))
            self.generation += 1
            threading.Thread(target=self._receive, args=(self.socket, self.generation), daemon=True).start()
            for cookie, one in self.pending.items():
                if one.sent_on < 0:
                    self._send(cookie, one)

    def lose(self) -> None:
        """The connection ends."""
        with self.lock:
            if self.socket is not None:
                self.socket.shutdown(socket.SHUT_RDWR)

    def io(self, kind: int, offset: int = 0, data: bytes | int = 0, *, wait: bool = True) -> Pending:
        """One request; with ``wait`` until it has an answer."""
        one = Pending(kind, offset, data)
        with self.lock:
            if self.connected:
                self.cookie += 1
                self.pending[self.cookie] = one
                self._send(self.cookie, one)
            else:
                one.error = errno.EIO
                one.done.set()
        if wait:
            assert one.done.wait(DEADLINE), "no answer"
        return one

    def pread(self, offset: int, length: int) -> bytes:
        one = self.io(READ, offset, length)
        assert one.error == 0, os.strerror(one.error)
        return one.answer

    def pwrite(self, offset: int, data: bytes) -> None:
        assert self.io(WRITE, offset, data).error == 0

    def _send(self, cookie: int, one: Pending) -> None:
        length = one.data if isinstance(one.data, int) else len(one.data)
        payload = b"" if isinstance(one.data, int) else one.data
        if self.socket is None:
            return
        with contextlib.suppress(OSError):
            self.socket.sendall(request(one.kind, cookie, one.offset, length) + payload)
            one.sent_on = self.generation

    def _receive(self, connection: socket.socket, generation: int) -> None:
        with contextlib.suppress(OSError, EOFError):
            while True:
                magic, error, cookie = SIMPLE_REPLY.unpack(_read(connection, SIMPLE_REPLY.size))
                assert magic == REPLY_MAGIC
                with self.lock:
                    one = self.pending.pop(cookie)
                if one.kind == READ and not error:
                    assert isinstance(one.data, int)
                    one.answer = _read(connection, one.data)
                one.error = error
                one.done.set()
        with self.lock:
            if self.generation == generation:
                self.socket = None
        connection.close()

    def _send_again(self) -> None:
        while self.connected:
            time.sleep(0.01)
            now = time.monotonic()
            with self.lock:
                for cookie, one in self.pending.items():
                    if now - one.since < self.request_timeout:
                        continue
                    if one.sent_on == self.generation:  # it takes too long: this connection is bad
                        with contextlib.suppress(OSError):
                            self.lose()
                    one.since = now
                    one.sent_on = -1
                    self.sent_again += 1
                    self._send(cookie, one)

    def end(self) -> None:
        """All that has no answer fails."""
        with self.lock:
            self.connected = False
            if self.socket is not None:
                with contextlib.suppress(OSError):
                    self.socket.sendall(request(DISC, 0))
                    self.socket.shutdown(socket.SHUT_RDWR)
            for one in self.pending.values():
                one.error = errno.EIO
                one.done.set()
            self.pending.clear()


class FakeKernel:
    """All devices of a host. ``open``: numbers that somebody has open. Its own control, for every caller."""

    def __init__(self, block: Path, request_timeout: float = 0.3) -> None:
        self.block = block
        self.request_timeout = request_timeout
        self.devices: dict[int, Device] = {}
        self.open: set[int] = set()
        self.calls: list[str] = []
        self.refuse = 0
        self.going: set[int] = set()
        """Numbers that sysfs shows no more, and that are not free yet."""
        self.lock = threading.Lock()
        block.mkdir(parents=True)

    def __call__(self) -> Self:
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def show(self, index: int, server: int, backend: str, size: int) -> None:
        """What sysfs has of a device."""
        directory = self.block / f"nbd{index}"
        (directory / "queue").mkdir(parents=True, exist_ok=True)
        for name, text in (("pid", str(server)), ("backend", backend), ("size", str(size // 512))):
            (directory / name).write_text(f"{text}\n")

    def _find(self, index: int, identifier: str) -> Device:
        device = self.devices.get(index)
        if device is None or device.shape.identifier != identifier or not device.connected:
            raise DeviceError("reconfigure: Invalid argument", errno=errno.EINVAL)
        return device

    def connect(self, index: int, shape: DeviceShape, fd: int) -> None:
        self.calls.append(f"connect {index}")
        if self.refuse:
            raise DeviceError("connect: refused", errno=self.refuse)
        if index in self.going:
            raise DeviceError("connect: Invalid argument", errno=errno.EINVAL)
        with self.lock:
            if index in self.devices:
                raise DeviceError("connect: Device or resource busy", errno=errno.EBUSY)
            self.show(index, 4_000_000, shape.identifier, shape.size)
            self.devices[index] = Device(self.block / f"nbd{index}", shape, self.request_timeout)
        self.devices[index].take(fd)

    def reconnect(self, index: int, identifier: str, fd: int) -> None:
        self.calls.append(f"reconnect {index}")
        self._find(index, identifier).take(fd)

    def probe(self, index: int, identifier: str) -> None:
        self._find(index, identifier)

    def resize(self, index: int, identifier: str, size: int) -> None:
        self.calls.append(f"resize {index} {size}")
        self._find(index, identifier)
        self.show(index, 4_000_000, identifier, size)

    def disconnect(self, index: int) -> None:
        self.calls.append(f"disconnect {index}")
        device = self.devices.get(index)
        if device is None or not device.connected:
            raise DeviceError("disconnect: Invalid argument", errno=errno.EINVAL)
        device.end()
        if index not in self.open:  # else sysfs goes on showing what it was
            del self.devices[index]
            shutil.rmtree(device.directory)

    def let_go(self, index: int) -> None:
        """Nobody has it open any more."""
        self.open.discard(index)
        del self.devices[index]
        shutil.rmtree(self.block / f"nbd{index}")


def _read(connection: socket.socket, length: int) -> bytes:
    data = bytearray()
    while len(data) < length:
        part = connection.recv(length - len(data))
        if not part:
            raise EOFError
        data += part
    return bytes(data)


def attribute(data: bytes, *path: int) -> bytes:
    """The value of an attribute inside others, as the kernel would parse it."""
    for kind in path:
        found = None
        while data:
            length, this = struct.unpack_from("=HH", data)
            if this & 0x3FFF == kind:
                found = data[4:length]
            data = data[length + -length % 4 :]
        assert found is not None, f"no attribute {kind}"
        data = found
    return data
