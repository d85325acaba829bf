"""What is said to the kernel's NBD driver over netlink, and what is believed of its answers."""

from __future__ import annotations

import errno
import socket

import pytest
from fake_nbd_kernel import attribute

from glidefs.errors import DeviceError
from glidefs.transport.nbd_device import netlink
from glidefs.transport.nbd_device.driver import MODULE
from glidefs.transport.nbd_device.netlink import DeviceShape, NbdControl


class Wire:
    """A netlink socket that keeps what is sent and says what it is told."""

    def __init__(self, answers: list[bytes]) -> None:
        self.sent: list[bytes] = []
        self.answers = answers

    def settimeout(self, seconds: float) -> None:
        pass

    def close(self) -> None:
        pass

    def send(self, data: bytes) -> int:
        self.sent.append(data)
        return len(data)

    def recv(self, length: int) -> bytes:
        if not self.answers:
            raise TimeoutError
        return self.answers.pop(0)


def message(kind: int, sequence: int, payload: bytes) -> bytes:
    return netlink._HEADER.pack(16 + len(payload), kind, 0, sequence, 0) + payload


def ack(sequence: int, number: int = 0) -> bytes:
    return message(2, sequence, (-number).to_bytes(4, "little", signed=True) + bytes(16))


FAMILY = message(16, 1, b"\x01\x02\0\0" + b"\x06\0\x01\0\x1f\0\0\0")


def control(monkeypatch: pytest.MonkeyPatch, *answers: bytes) -> tuple[NbdControl, Wire]:
    wire = Wire([FAMILY, ack(1), *answers])
    monkeypatch.setattr(socket, "socket", lambda *args: wire)
    return NbdControl(), wire


def test_connect_says_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made, wire = control(monkeypatch, ack(2))
    made.connect(5, DeviceShape(1 << 40, 512, True, 10, 99, "glidefs:x"), 33)
    length, family, flags, sequence, _ = netlink._HEADER.unpack_from(wire.sent[1])
    assert (length, family, flags, sequence) == (len(wire.sent[1]), 0x1F, 5, 2)
    assert wire.sent[1][16] == 1
    body = wire.sent[1][20:]

    def number(*path: int) -> int:
        return int.from_bytes(attribute(body, *path), "little")

    assert [number(kind) for kind in (1, 2, 3, 4, 8)] == [5, 1 << 40, 512, 10, 99]
    assert number(5) == 1 | 2 | 4 | 8 | 32 | 64
    assert number(6) == 1
    assert attribute(body, 10) == b"glidefs:x\0"
    assert number(7, 1, 1) == 33


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EPERM, errno.EINVAL])
def test_what_the_kernel_refuses(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    made, _ = control(monkeypatch, ack(2, number))
    with pytest.raises(DeviceError, match="disconnect /dev/nbd3") as caught:
        made.disconnect(3)
    assert caught.value.errno == number


@pytest.mark.parametrize(
    "answer",
    [b"", b"\x01", bytes(16), message(2, 9, bytes(20)), message(2, 2, b"\0"), b"\xff" * 40],
    ids=["nothing", "a byte", "zeros", "another's", "short", "too long"],
)
def test_answers_that_are_none(monkeypatch: pytest.MonkeyPatch, answer: bytes) -> None:
    made, _ = control(monkeypatch, answer)
    with pytest.raises(DeviceError, match="does not answer"):
        made.disconnect(3)


def test_a_kernel_without_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    wire = Wire([ack(1, errno.ENOENT)])
    monkeypatch.setattr(socket, "socket", lambda *args: wire)
    with pytest.raises(DeviceError, match="find the nbd driver") as caught:
        NbdControl()
    assert caught.value.errno == errno.ENOENT


def test_this_kernel_answers() -> None:
    """A real netlink socket: the driver is there, or it is not, in either case the kernel says so."""
    if MODULE.exists():
        NbdControl().close()
        return
    with pytest.raises(DeviceError) as caught:
        NbdControl()
    assert caught.value.errno in (errno.ENOENT, errno.EPROTONOSUPPORT, errno.EAFNOSUPPORT)
