"""Devices over the life of their daemon: planned stop, crash, detach, remove, resize, strangers."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from waiting import wait_for

pytest.importorskip("glidefs.core._core")
import device_rig as rig
from figures import Figures
from node import GIB, MIB, Node, stopwatch
from null_server import NullServer, build, control, info

from glidefs.core import ublk
from glidefs.transport.ublk.device import F_UPDATE_SIZE, F_USER_RECOVERY

pytestmark = [
    pytest.mark.skipif(rig.REASON is not None, reason=str(rig.REASON)),
    pytest.mark.root,
    pytest.mark.timeout(2400 if rig.EMULATED else 600),
]

F_USER_RECOVERY_REISSUE = 1 << 4
SETTINGS = {
    "cache": {"log_size": '"1GiB"', "block_cache_size": '"256MiB"'},
    "daemon": {"drain_deadline": '"120s"'},
}


@pytest.fixture
def node(place: Path) -> Iterator[Node]:
    with rig.no_leftovers(), rig.ended(Node(place / "n", settings=SETTINGS)) as made:
        yield made.start()


class Scribe:
    """Appends synced records to a file of a mounted file system until it is told to stop."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rounds = 0
        self.error: OSError | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            with self.path.open("wb", buffering=0) as file:
                while not self._stop.wait(0.02):
                    file.write(self._record(self.rounds))
                    os.fsync(file.fileno())
                    self.rounds += 1
        except OSError as error:
            self.error = error

    @staticmethod
    def _record(number: int) -> bytes:
        return number.to_bytes(8, "little") * 512

    def goes_on(self) -> None:
        mark = self.rounds
        wait_for(lambda: self.error or self.rounds > mark + 3, "the writer goes on")
        assert self.error is None

    def finish(self) -> None:
        self._stop.set()
        self._thread.join(rig.STEP)
        assert not self._thread.is_alive()
        assert self.error is None
        data = self.path.read_bytes()
        assert data == b"".join(self._record(i) for i in range(self.rounds))


def test_a_mounted_file_system_survives_stop_and_start(node: Node, place: Path, figure: Figures) -> None:
    device = rig.create(node, "disk", "1GiB")
    found = ublk.query(rig.dev_id(device))
    assert found.flags & F_USER_RECOVERY
    assert found.flags & F_USER_RECOVERY_REISSUE
    before = len(rig.kernel_log())
    rig.run("mkfs.ext4", "-q", device)
    rig.run("mount", device, _made(place / "mnt"))
    scribe = Scribe(place / "mnt" / "journal")
    for _ in range(2):
        scribe.goes_on()
        with stopwatch() as took:
            node.stop()
        figure("SIGTERM to exit", took[0], "s")
        assert rig.state(device) == rig.QUIESCED
        mark = scribe.rounds
        with stopwatch() as took:
            node.start()
        figure("start to ready", took[0], "s")
        assert scribe.rounds - mark < 1000
        assert node.json("show", "disk")["device"] == device
        assert rig.state(device) == rig.LIVE
    scribe.goes_on()
    scribe.finish()
    rig.run("umount", place / "mnt")
    rig.run("e2fsck", "-f", "-n", device)
    assert rig.io_errors(before) == []
    node.json("remove", "disk")
    assert not Path(device).exists()


def _made(path: Path) -> Path:
    path.mkdir(exist_ok=True)
    return path


def test_detach_and_remove_delete_the_device(node: Node) -> None:
    device = rig.create(node, "disk", "64MiB")
    other = rig.create(node, "other", "64MiB")
    rig.run("dd", "if=/dev/urandom", f"of={device}", "bs=1M", "count=8", "oflag=direct")
    with Path(device).open("rb") as file:
        data = file.read(8 * MIB)
    node.json("detach", "disk")
    assert not Path(device).exists()
    assert not Path(device.replace("ublkb", "ublkc")).exists()
    assert rig.state(device) is None
    assert rig.state(other) == rig.LIVE
    again = node.json("attach", "disk")["device"]
    with Path(again).open("rb") as file:
        assert file.read(8 * MIB) == data
    node.json("remove", "disk")
    assert not Path(again).exists()
    assert rig.state(again) is None
    node.json("remove", "other")
    assert not Path(other).exists()


def test_a_device_of_another_program_is_left_alone(place: Path) -> None:
    """It even has the id that an export of ours had: the export takes another one."""
    program = build(place)
    settings = {**SETTINGS, "daemon": {"on_stop": '"remove"'}}
    with rig.no_leftovers(), rig.ended(Node(place / "n", settings=settings)) as node:
        device = rig.create(node.start(), "disk", "64MiB")
        node.stop()
        assert not Path(device).exists()
        stranger = NullServer(program, "add", str(rig.dev_id(device)), "--check")
        try:
            assert str(stranger.device) == device
            node.start()
            own = node.json("show", "disk")["device"]
            assert own != device
            node.kill()
            node.start()
            assert node.json("show", "disk")["device"] == own
            node.json("detach", "disk")
            assert not Path(own).exists()
            node.json("attach", "disk")
            node.json("remove", "disk")
            assert info(program, stranger.id)["pid"] == str(stranger.process.pid)
            rig.run("dd", f"if={device}", "of=/dev/null", "bs=64K", "count=4", "iflag=direct")
            stranger.kill()
            wait_for(lambda: rig.state(device) == rig.QUIESCED, "the stranger is quiesced")
            node.stop()
            node.start()
            assert rig.state(device) == rig.QUIESCED
        finally:
            stranger.process.kill()
            stranger.process.wait()
            control(program, "del", str(stranger.id))


def test_resize_under_a_mounted_file_system(node: Node, place: Path) -> None:
    device = rig.create(node, "disk", "256MiB")
    rig.run("mkfs.ext4", "-q", device)
    with rig.mounted(device, place / "mnt") as at:
        (at / "file").write_bytes(b"x" * MIB)
        grown = node.json("resize", "disk", "1GiB")
        if ublk.features() & F_UPDATE_SIZE:
            assert grown["note"] == ""
            assert rig.device_size(device) == GIB
            rig.run("resize2fs", device)
        else:
            assert "Linux 6.16" in grown["note"]
            assert "detach and attach" in grown["note"]
            assert rig.device_size(device) == 256 * MIB
            refused = node.fails("resize", "disk", "128MiB", "--shrink")
            assert "cannot shrink" in refused
    if not ublk.features() & F_UPDATE_SIZE:
        node.json("detach", "disk")
        device = node.json("attach", "disk")["device"]
        rig.run("e2fsck", "-f", "-p", device)
        rig.run("resize2fs", device)
    assert rig.device_size(device) == GIB
    with rig.mounted(device, place / "mnt") as at:
        assert (at / "file").read_bytes() == b"x" * MIB
        rig.run("dd", "if=/dev/zero", f"of={at}/large", "bs=1M", "count=400")
    rig.run("e2fsck", "-f", "-n", device)
    node.json("remove", "disk")
