"""A Linux guest with a disk over vhost-user-blk: its own driver, real files, and daemons that come and go.

``vhost_guest.sh`` is what runs in the VM. ``GLIDEFS_VM_KERNEL`` is the guest's kernel (6.12).
"""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import guest
import pytest
from figures import Figures
from guest import ROOT, VHOST_USER
from handoff_rig import Generations, is_running
from node import EMULATED, MIB
from waiting import wait_for

pytest.importorskip("glidefs.core._core")
pytestmark = [
    pytest.mark.skipif(bool(guest.missing()), reason=guest.missing() or "-"),
    pytest.mark.skipif(EMULATED, reason="no QEMU inside an emulated VM"),
    pytest.mark.root,
    pytest.mark.slow,
    pytest.mark.timeout(3600),
]

KERNEL = os.environ.get("GLIDEFS_VM_KERNEL", "6.12")
SETTINGS = {
    "cache": {"log_size": '"512MiB"', "segment_size": '"1MiB"'},
    "upload": {"sync_interval": '"2s"'},
    "vhost_user": {"dir": '"vhost"'},
}
SIZE, LARGER = 192 * MIB, 256 * MIB
HANDOFFS = int(os.environ.get("GLIDEFS_HANDOFFS", "3"))
KILLS = int(os.environ.get("GLIDEFS_KILLS", "2"))
SECONDS_OF_EACH = 12
"""Of verification, for each daemon that comes and goes: a start takes seconds beside an emulated guest."""
PATIENCE = 900.0
GUESTS = int(os.environ.get("GLIDEFS_GUESTS", "20"))
"""That boot at once."""
BOOT_SECONDS = 120.0
"""For each of them: CPUs are emulated, and few."""


class Machine:
    """The VM, and what it said."""

    def __init__(self, where: Path, socket: str) -> None:
        self.share = where / "share"
        self.share.mkdir()
        self._log = where / "guest.log"
        seconds = 30 + SECONDS_OF_EACH * (HANDOFFS + KILLS)
        command = [str(ROOT / "vm-test/run"), "--kernel", KERNEL, "--memory", "1G", "--timeout", "3000"]
        command += ["--disk", f"{VHOST_USER}{socket}", "--", str(ROOT / "tests/acceptance/vhost_guest.sh")]
        environment = {**os.environ, "GLIDEFS_VM_SHARE": str(self.share), "FIO_SECONDS": str(seconds)}
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT, env=environment
            )

    def said(self, what: str) -> str:
        """Wait until the guest comes to a point; what it says there."""

        def seen() -> bool:
            there = (self.share / what).exists()
            assert there or self.process.poll() is None, self.log
            return there

        wait_for(seen, f"the guest comes to {what!r}", PATIENCE)
        return (self.share / what).read_text().strip()

    def tell(self, what: str, text: str = "") -> None:
        """Let the guest go on."""
        (self.share / ".told").write_text(text)
        (self.share / ".told").rename(self.share / what)

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")[-6000:]

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait(60)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Generations]:
    made = Generations(tmp_path / "n", settings=SETTINGS)
    made.start()
    yield made
    made.kill_all()


def kill(node: Generations) -> None:
    pid = node.pid
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not is_running(pid), "it has ended")
    if node.process is not None:
        node.process.wait()
    node.process = None
    node.start()


def hash_of(node: Generations, name: str) -> str:
    """SHA-256 of all bytes, over NBD."""
    made = hashlib.sha256()
    with node.nbd(name) as client:
        for at in range(0, LARGER, MIB):
            made.update(client.pread(at, MIB))
    return made.hexdigest()


def after_a_lost_disk(node: Generations, base: Path) -> Generations:
    """Another daemon on the same store, which has nothing else."""
    node.run("drain", "vm")
    node.run("detach", "vm")
    node.stop()
    fresh = Generations(base, settings={**SETTINGS, "store": {"url": f'"file://{node.store}"'}})
    fresh.start()
    fresh.run("attach", "vm", "--transport", "nbd")
    return fresh


def test_an_ordinary_guest(node: Generations, tmp_path: Path, figure: Figures) -> None:
    node.run("create", "vm", "--size", str(SIZE), "--transport", "vhost-user")
    vm = Machine(tmp_path, str(node.json("show", "vm")["device"]))
    try:
        queues, cache, discard, zeroes, size = vm.said("facts").split()
        assert (int(queues), cache, int(size)) == (2, "write-back", SIZE)
        assert int(discard) >= MIB
        assert int(zeroes) >= MIB
        assert int(vm.said("written")) > 100
        node.run("resize", "vm", str(LARGER))
        vm.tell("resized-on-host", str(LARGER))
        assert vm.said("resized") == str(LARGER)
        vm.said("moving")
        began = time.monotonic()
        for _ in range(HANDOFFS):
            assert node.handoff()["outcome"] == "succeeded"
        for _ in range(KILLS):
            wait_for(lambda: len(node.processes()) == 1, "those before have ended")
            kill(node)
        figure(f"{HANDOFFS} handoffs and {KILLS} kills", time.monotonic() - began, "s")
        vm.tell("moved")
        vm.said("verified")
        assert not (vm.share / "too-fast").exists(), "the daemons came and went after the verification"
        whole = vm.said("whole")
        assert vm.process.wait(PATIENCE) == 0, vm.log
    finally:
        vm.end()
    assert (vm.share / "errors").read_text() == ""
    wait_for(lambda: node.run("transport", "vm", "nbd", check=False).returncode == 0, "nobody uses it")
    assert hash_of(node, "vm") == whole
    fresh = after_a_lost_disk(node, tmp_path / "fresh")
    try:
        assert hash_of(fresh, "vm") == whole
    finally:
        fresh.kill_all()


def test_many_guests_boot_through_a_handoff(node: Generations, tmp_path: Path, figure: Figures) -> None:
    """Forks of one base; the daemon is another one when they are half-way."""
    files, image = guest.boot_files(tmp_path), guest.make_image(tmp_path)
    node.run("bless", str(image), "--name", "linux")
    node.run(
        "create",
        "--count",
        str(GUESTS),
        "--name",
        "vm-{}",
        "--from",
        "base:linux",
        "--transport",
        "vhost-user",
    )
    exports = node.json("list")
    assert len(exports) == GUESTS
    running = [
        guest.Guest(export["name"], VHOST_USER + str(export["device"]), files, tmp_path) for export in exports
    ]
    try:

        def half_way() -> bool:
            """The first has its root file system, and reads files all over it."""
            assert all(one.process.poll() is None for one in running), "they were too fast"
            consoles = [one.console for one in running if one.console.exists()]
            return any("PYTHON IS UP" in console.read_text(errors="replace") for console in consoles)

        wait_for(half_way, "they boot", BOOT_SECONDS * GUESTS)
        assert node.handoff()["outcome"] == "succeeded"
        for one in running:
            one.wait(BOOT_SECONDS * GUESTS)
        figure(f"{GUESTS} guests have booted", time.monotonic() - running[0].began, "s")
    finally:
        for one in running:
            one.kill()
