"""The udev rule on a real kernel with a real udevd: names, queue settings, and devices that go."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from daemon_harness import Daemon, no_devices_left
from udev_rig import LINKS, led_to, settle, udev_missing, udevadm, udevd
from waiting import wait_for

pytest.importorskip("glidefs.core._core")

from glidefs.core import ublk as core
from glidefs.errors import DeviceError
from glidefs.transport.device.names import DIRECTORY
from glidefs.transport.nbd_device.driver import LOADED_WITH, nbd_device_missing
from glidefs.transport.ublk import device as ublk
from glidefs.transport.ublk.driver import ublk_missing

UBLK_NAMES = DIRECTORY / "ublk"
MIB = 1 << 20
NO_UBLK = ublk_missing()
KINDS = [
    pytest.param(kind, marks=pytest.mark.skipif(why is not None, reason=f"no {kind}: {why}"))
    for kind, why in (("ublk", NO_UBLK), ("nbd-device", nbd_device_missing()))
]

pytestmark = [
    pytest.mark.skipif(udev_missing() is not None, reason=f"no udev: {udev_missing()}"),
    pytest.mark.root,
]


@pytest.fixture(scope="module", autouse=True)
def _udevd() -> Iterator[None]:
    with udevd():
        yield


@pytest.fixture(autouse=True)
def _devices_are_removed() -> Iterator[None]:
    if NO_UBLK is not None:
        yield
        return
    with no_devices_left():
        yield


def queue(device: str, name: str) -> str:
    return Path(f"/sys/block/{Path(device).name}/queue/{name}").read_text().strip()


def dev_id(device: str) -> int:
    return int(device.removeprefix("/dev/ublkb"))


def partition(device: str) -> None:
    """One partition, in a table of the old kind; nobody looks for it unasked, udev neither."""
    sector = bytearray(512)
    sector[446:462] = struct.pack("<B3sB3sII", 0, b"\0\2\0", 0x83, b"\0\2\0", 2048, 4096)
    sector[510:] = b"\x55\xaa"
    with open(device, "r+b", buffering=0) as disk:
        disk.write(sector)
        os.fsync(disk.fileno())
    settle()
    assert not Path(f"{device}p1").exists()
    subprocess.run(["partx", "--add", device], check=True)


@pytest.mark.parametrize("kind", KINDS)
def test_udev_names_devices_and_sets_their_queues(daemon: Daemon, kind: str) -> None:
    if kind == "nbd-device":  # the driver as the daemon loads it; the VM did so without options
        subprocess.run(["modprobe", "-r", "nbd"], check=True)
        subprocess.run(["modprobe", "nbd", *LOADED_WITH], check=True)
    device = daemon.json("create", "web-1.x_Y", "--size", "64MiB", "--transport", kind)["device"]
    other = daemon.json("create", "db", "--size", "64MiB", "--transport", kind)["device"]
    settle()
    assert (led_to("web-1.x_Y"), led_to("db")) == (device, other)
    assert "[none]" in queue(device, "scheduler")
    assert queue(device, "read_ahead_kb") == "512"
    properties = udevadm("info", "--query=property", device)
    assert "UDEV_DISABLE_PERSISTENT_STORAGE_RULES_FLAG=1" in properties
    assert "ID_FS_" not in properties
    partition(device)
    settle()
    assert led_to("web-1.x_Y+part1") == f"{device}p1"
    # A planned stop and a crash: the names stay, and lead to the same disks.
    for end in (daemon.stop, daemon.kill):
        end()
        assert led_to("web-1.x_Y") == device
        daemon.start()
        settle()
        assert (led_to("web-1.x_Y"), led_to("db")) == (device, other)
    # What was said is lost, and something makes udev look again.
    shutil.rmtree(DIRECTORY / kind.removesuffix("-device"))
    udevadm("trigger", "--action=change", f"/sys/block/{Path(device).name}")
    settle()
    assert led_to("web-1.x_Y") == device
    daemon.json("detach", "web-1.x_Y")
    settle()
    assert led_to("web-1.x_Y") == led_to("web-1.x_Y+part1") == ""
    assert led_to("db") == other
    daemon.json("remove", "db")
    settle()
    assert led_to("db") == ""


@pytest.mark.skipif(NO_UBLK is not None, reason=f"no ublk: {NO_UBLK}")
def test_udev_and_a_number_that_is_used_again(daemon: Daemon, make_daemon: Callable[..., Daemon]) -> None:
    """Deleted by another program while the daemon is away: nobody inherits the name."""
    device = daemon.json("create", "old", "--size", "64MiB")["device"]
    settle()
    assert led_to("old") == device
    assert list(UBLK_NAMES.glob(f"{dev_id(device)}.*"))
    daemon.kill()

    def delete() -> bool:
        found = ublk.query(dev_id(device))
        try:
            if found is not None and found.state == ublk.QUIESCED:
                core.delete(dev_id(device), found.tag)
        except DeviceError:
            return False
        return found is None

    wait_for(delete, "the device is gone")
    settle()
    assert led_to("old") == ""
    assert list(UBLK_NAMES.glob(f"{dev_id(device)}.*")) == []
    other = make_daemon("b", node="node-2").start()
    assert other.json("create", "new", "--size", "64MiB")["device"] == device
    settle()
    assert (led_to("old"), led_to("new")) == ("", device)
    # Removed and made again at once, over and over: udev is late, and must not mix them up.
    for number in range(5):
        other.json("remove", "new" if number == 0 else f"n{number - 1}")
        assert other.json("create", f"n{number}", "--size", "64MiB")["device"] == device
    settle()
    assert sorted(os.listdir(LINKS)) == ["n4"]
    assert led_to("n4") == device
