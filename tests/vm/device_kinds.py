"""What tests share that are the same for both kinds of block device: ``/dev/ublkbN`` and ``/dev/nbdN``."""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from fcntl import ioctl
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "handoff"))

import device_rig as rig
from handoff_rig import Generations
from node import MIB

from glidefs.errors import DeviceError
from glidefs.transport.nbd_device.driver import nbd_device_missing, states
from glidefs.transport.nbd_device.netlink import NbdControl

BLKDISCARD, BLKZEROOUT = 0x1277, 0x127F
SETTINGS = {
    "cache": {"log_size": '"256MiB"', "block_cache_size": '"64MiB"', "segment_size": '"8MiB"'},
    "upload": {"sync_interval": '"5s"'},
    "daemon": {"drain_deadline": '"300s"'},
}
REASONS = {"ublk": rig.REASON, "nbd-device": nbd_device_missing()}
KINDS = [
    pytest.param(kind, marks=pytest.mark.skipif(reason is not None, reason=str(reason)))
    for kind, reason in REASONS.items()
]


def need(*programs: str) -> None:
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"no {program}")


def need_module(name: str) -> None:
    if subprocess.run(["modprobe", "-q", name], check=False).returncode:
        pytest.skip(f"this kernel has no {name}")


@contextlib.contextmanager
def no_nbd_leftovers() -> Iterator[None]:
    """Devices of the NBD driver that a test left are ended, so that a failed one takes no other along."""
    before = {state.index for state in states()}
    yield
    for state in states():
        if state.index not in before:
            with contextlib.suppress(DeviceError), NbdControl() as control:
                control.disconnect(state.index)


@contextlib.contextmanager
def serving(base: Path) -> Iterator[Generations]:
    """A daemon that can hand over; neither it nor a device outlives the block."""
    node = Generations(base, settings=SETTINGS)
    with rig.no_leftovers() if REASONS["ublk"] is None else contextlib.nullcontext(), no_nbd_leftovers():
        try:
            yield node.start()
        finally:
            if os.environ.get("GLIDEFS_DAEMON_LOG"):
                Path(os.environ["GLIDEFS_DAEMON_LOG"]).write_text(node.log_text)
            node.kill_all()


def create(node: Generations, kind: str, name: str, size: str, *options: str) -> str:
    """An export; its device."""
    made = node.json("create", name, "--size", size, "--transport", kind, *options)
    assert made["transport"] == kind, made
    return str(made["device"])


class Direct:
    """A device without the page cache: reads and writes of whole sectors, at byte offsets."""

    def __init__(self, device: str, *, synced: bool = False, length: int = MIB) -> None:
        self._fd = os.open(device, os.O_RDWR | os.O_DIRECT | (os.O_DSYNC if synced else 0))
        self._buffer = mmap.mmap(-1, length)  # aligned

    def close(self) -> None:
        os.close(self._fd)

    def write(self, offset: int, data: bytes) -> None:
        self._buffer[: len(data)] = data
        with memoryview(self._buffer)[: len(data)] as view:
            assert os.pwritev(self._fd, [view], offset) == len(data)

    def read(self, offset: int, length: int) -> bytes:
        with memoryview(self._buffer)[:length] as view:
            assert os.preadv(self._fd, [view], offset) == length
            return bytes(view)

    def discard(self, offset: int, length: int) -> None:
        ioctl(self._fd, BLKDISCARD, offset.to_bytes(8, sys.byteorder) + length.to_bytes(8, sys.byteorder))

    def zero(self, offset: int, length: int) -> None:
        ioctl(self._fd, BLKZEROOUT, offset.to_bytes(8, sys.byteorder) + length.to_bytes(8, sys.byteorder))

    def flush(self) -> None:
        os.fsync(self._fd)
