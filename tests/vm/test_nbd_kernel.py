"""`/dev/nbdN` with the kernel's own driver: files, kill -9, handoffs under fio that verifies, resize.

``GLIDEFS_KILLS`` and ``GLIDEFS_HANDOFFS`` say how many.
"""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from waiting import wait_for

pytest.importorskip("glidefs.core._core")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "handoff"))

import device_rig as rig
from device_kinds import no_nbd_leftovers
from figures import Figures
from handoff_rig import Generations
from node import MIB, Node
from test_device_handoff import Load
from test_kill_verify import SETTINGS, Verify, kill_and_start, report_kills, serve_again

from glidefs.transport.nbd_device.driver import nbd_device_missing, read_state

REASON = nbd_device_missing()
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
    pytest.mark.root,
    pytest.mark.timeout(3600 if rig.EMULATED else 900),
]
LONG = os.environ.get("GLIDEFS_TEST_LENGTH") == "long"
KILLS = int(os.environ.get("GLIDEFS_KILLS", "20" if LONG else "3"))
HANDOFFS = int(os.environ.get("GLIDEFS_HANDOFFS", "50" if LONG else "5"))


def number(device: str) -> int:
    return int(device.removeprefix("/dev/nbd"))


@pytest.fixture
def node(place: Path) -> Iterator[Node]:
    with no_nbd_leftovers(), rig.ended(Node(place / "n", settings=SETTINGS)) as made:
        yield made.start()


def create(node: Node | Generations, name: str, size: str) -> str:
    made = node.json("create", name, "--size", size, "--transport", "nbd-device")
    assert made["transport"] == "nbd-device", made
    device = str(made["device"])
    assert device.startswith("/dev/nbd"), made
    return device


def test_files_come_back_from_the_store(node: Node, place: Path) -> None:
    """mkfs, files, drain; then another attachment reads them from what the store has."""
    before = len(rig.kernel_log())
    device = create(node, "files", "2GiB")
    assert (rig.device_size(device), rig.queue_limit(device, "rotational")) == (2048 * MIB, 0)
    rig.run("mkfs.ext4", "-q", device)
    paths = rig.real_files(16 * MIB, ("/usr/share/perl", "/usr/lib"))
    (place / "list").write_text("\n".join(paths))
    with rig.mounted(device, place / "m") as at:
        rig.run("tar", "cf", at / "all.tar", "-T", place / "list")
        want = rig.run("sha256sum", at / "all.tar").split()[0]
    node.json("drain", "files")
    node.json("detach", "files")
    assert not Path(device).exists()
    again = node.json("attach", "files", "--transport", "nbd-device")["device"]
    rig.drop_caches()
    with rig.mounted(again, place / "m") as at:
        assert rig.run("sha256sum", at / "all.tar").split()[0] == want
        assert "InUse" in refused(node, "detach", "files") or "mounted" in refused(node, "detach", "files")
    rig.run("e2fsck", "-fn", again)
    node.json("remove", "files")
    assert rig.io_errors(before) == []


def refused(node: Node, *command: str) -> str:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        node.json(*command)
    return f"{type(caught.value).__name__} {caught.value}"


def test_discard_and_resize(node: Node) -> None:
    device = create(node, "wide", "2TiB")
    Path(device).write_bytes(b"x" * 4096)
    rig.run("blkdiscard", device)
    with open(device, "rb") as file:
        assert file.read(4096) == bytes(4096)
    for size in ("3TiB", "1GiB"):
        node.json("resize", "wide", size, "--shrink") if size == "1GiB" else node.json("resize", "wide", size)
        wanted = (3 << 40) if size == "3TiB" else 1 << 30
        wait_for(lambda wanted=wanted: rig.device_size(device) == wanted, f"{size} on the device")


def test_kill_under_fio_verify(node: Node, place: Path, figure: Figures) -> None:
    rng = random.Random(7)
    wanted = {name: create(node, name, "512MiB") for name in ("small", "large")}
    devices = list(wanted.values())
    before = len(rig.kernel_log())
    load = Verify(devices, place)
    kills = []
    try:
        serve_again(devices, load)
        while len(kills) < KILLS and load.runs():
            time.sleep(rng.uniform(0.0, 4.0))
            kills.append(kill_and_start(node, rng, len(kills) % 4 == 1, 1.0))
            assert {e["name"]: e["device"] for e in node.client.call("GET", "/api/exports")} == wanted
            serve_again(devices, load)
        ended = time.time()
        reports = load.end()
    finally:
        with contextlib.suppress(ProcessLookupError):
            load.process.kill()
    report_kills(kills, load, ended, figure)
    assert all(report["write"]["io_bytes"] and report["read"]["io_bytes"] for report in reports)
    assert rig.io_errors(before) == []
    for name, device in wanted.items():
        node.json("remove", name)
        assert not Path(device).exists()


def test_handoffs_under_fio_verify(place: Path, figure: Figures) -> None:
    with no_nbd_leftovers():
        node = Generations(place / "n", settings={"upload": {"sync_interval": '"5s"'}})
        try:
            node.start()
            device = create(node, "moves", "512MiB")
            before = len(rig.kernel_log())
            load = Load(device, place, 3)
            stalls = []
            for _ in range(HANDOFFS):
                time.sleep(1.0)
                assert load.running
                answer = node.handoff()
                assert answer["outcome"] == "succeeded", answer
                stalls.append(answer["stall"])
            load.finish()
            assert node.json("show", "moves")["device"] == device
            assert rig.io_errors(before) == []
            figure(f"{HANDOFFS} handoffs: longest stall", max(stalls) * 1000, "ms")
            node.json("remove", "moves")
            assert not Path(device).exists()
        finally:
            node.kill_all()


def test_a_device_that_is_open_keeps_its_number(node: Node) -> None:
    device = create(node, "held", "64MiB")
    with open(device, "rb"):
        node.json("detach", "held", "--force")
        with pytest.raises(OSError, match=r".*"), open(device, "rb") as file:
            file.read(4096)
        other = create(node, "next", "64MiB")
        assert other != device
    wait_for(lambda: read_state(number(device)) is None, "the device goes when nobody has it open")


def test_a_daemon_that_is_away(node: Node, place: Path) -> None:
    """A reader waits while the daemon is stopped, and gets its data from the next one."""
    device = create(node, "away", "64MiB")
    with open(device, "r+b", buffering=0) as file:
        file.write(b"a" * 4096)
        os.fsync(file.fileno())
    node.stop()
    rig.drop_caches()
    reader = subprocess.Popen(
        ["dd", f"if={device}", "bs=4096", "count=1", "iflag=direct", "status=none"], stdout=subprocess.PIPE
    )
    time.sleep(1.0)
    assert reader.poll() is None
    node.start()
    assert reader.communicate(timeout=rig.STEP)[0] == b"a" * 4096
