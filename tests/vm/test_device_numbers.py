"""A device number is another device's only when the last one's end is complete; and every end comes."""

from __future__ import annotations

import contextlib
import mmap
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from waiting import wait_for

pytest.importorskip("glidefs.core._core")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "core"))

import device_rig as rig
from core_rig import MIB, SECTOR, CoreRig
from node import Node

from glidefs.core import ublk
from glidefs.core.ublk import UblkConfig, UblkDevice
from glidefs.errors import DeviceError

pytestmark = [
    pytest.mark.skipif(rig.REASON is not None, reason=str(rig.REASON)),
    pytest.mark.root,
    pytest.mark.timeout(1200 if rig.EMULATED else 300),
]


@pytest.fixture
def place() -> Iterator[Path]:
    with rig.scratch() as made, rig.no_leftovers():
        yield made


def gone(dev_id: int) -> bool:
    try:
        ublk.query(dev_id)
    except DeviceError:
        return True
    return False


def test_a_number_is_free_when_nobody_has_the_device_open(place: Path) -> None:
    with rig.ended(Node(place / "n")) as node:
        node.start()
        first = rig.create(node, "a", "64MiB")
        holder = os.open(first, os.O_RDWR)
        node.json("detach", "a", "--force")
        assert not gone(rig.dev_id(first))
        devices = {first, rig.create(node, "b", "64MiB")}
        devices.add(node.json("attach", "a")["device"])
        assert len(devices) == 3
        data = b""
        with contextlib.suppress(OSError):  # or a device of no size
            data = os.pread(holder, SECTOR, 0)
        os.close(holder)
        assert data == b""  # never another's
        wait_for(lambda: gone(rig.dev_id(first)), "the number is free")
        assert rig.create(node, "c", "64MiB") == first
        for name in "abc":
            node.json("remove", name)
        node.stop()


def test_a_device_ends_whose_requests_wait_for_the_store(place: Path) -> None:
    engine = CoreRig(place)
    vol = engine.vol(16 * MIB)
    device = UblkDevice(vol.core, UblkConfig(queue_depth=16))
    number = device.dev_id
    failed = threading.Event()

    def read() -> None:
        fd = os.open(device.path, os.O_RDONLY | os.O_DIRECT)
        try:
            os.preadv(fd, [mmap.mmap(-1, SECTOR)], 8 * MIB)
        except OSError:
            failed.set()
        finally:
            os.close(fd)

    with engine.hold():
        reader = threading.Thread(target=read)
        reader.start()
        wait_for(lambda: vol.core.info().parked, "the read waits for its base")
        device.close()
        reader.join(60)
        assert failed.is_set()
        wait_for(lambda: gone(number), "the number is free")
    vol.close()
    engine.close()
