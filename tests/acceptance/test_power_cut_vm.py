"""Power cuts of a whole machine: QEMU is killed in mid-write, and with it the volatile cache of the disk that
holds the daemon's log. After each the next boot must find every file that a guest had synced before.

``GLIDEFS_POWER_CUTS`` sets how many rounds (2), ``GLIDEFS_SEED`` their moments, ``GLIDEFS_VM_KERNEL`` the
kernel (6.12; 6.1 has nbd-device only). power_cut_guest.py is what runs in the VM.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import guest
import pytest
import volatile_disk
from figures import Figures
from guest import ROOT
from node import EMULATED, GIB, KIB, RawClient
from volatile_disk import VolatileDisk
from waiting import wait_for

pytest.importorskip("glidefs.core._core")
pytestmark = [
    pytest.mark.skipif(bool(guest.missing()), reason=guest.missing() or "-"),
    pytest.mark.skipif(bool(volatile_disk.missing()), reason=volatile_disk.missing() or "-"),
    pytest.mark.skipif(EMULATED, reason="no QEMU inside an emulated VM"),
    pytest.mark.root,
]

ROUNDS = int(os.environ.get("GLIDEFS_POWER_CUTS", "2"))
SEED = int(os.environ.get("GLIDEFS_SEED", str(time.time_ns() % 100_000)))
KERNEL = os.environ.get("GLIDEFS_VM_KERNEL", "6.12")
LONG = os.environ.get("GLIDEFS_TEST_LENGTH") == "long"
TRANSPORTS = ["nbd-device"] if KERNEL == "6.1" else ["ublk", "nbd-device"] if LONG else ["ublk"]
"""6.1, that of Debian 12, has no ublk whose devices outlive a daemon."""
PATIENCE = 900.0
"""Seconds for a boot, the start of the daemon, and the check."""
WRITING = (1.0, 20.0)
"""Seconds of writing before a cut."""
STARTING = (0.0, 12.0)
"""Seconds of the daemon's start before a cut of a machine that recovers from one."""


class Machine:
    """A VM with a volatile and a steady disk, boot after boot."""

    def __init__(self, where: Path, transport: str) -> None:
        self._where = where
        self._transport = transport
        self.share = where / "share"
        self.share.mkdir()
        self.boots = 0
        self.volatile = VolatileDisk(self._made("volatile.img"), where)
        self._steady = self._made("steady.img")
        self._process: subprocess.Popen[bytes] | None = None

    def _made(self, name: str) -> Path:
        image = self._where / name
        with image.open("wb") as file:
            file.truncate(2 * GIB)
        options = "lazy_itable_init=0,lazy_journal_init=0"
        subprocess.run(["/sbin/mkfs.ext4", "-q", "-F", "-E", options, str(image)], check=True)
        return image

    @property
    def _log(self) -> Path:
        return self._where / f"boot-{self.boots}.log"

    def boot(self, *, write: bool) -> None:
        """Power on."""
        assert self._process is None
        self.boots += 1
        self.volatile.start()
        command = [str(ROOT / "vm-test/run"), "--kernel", KERNEL, "--memory", "2G", "--timeout", "3000"]
        command += ["--disk", self.volatile.uri, "--disk", str(self._steady), "--", sys.executable]
        command += [str(ROOT / "tests/acceptance/power_cut_guest.py"), str(self.boots)]
        command += ["write" if write else "check", self._transport]
        environment = {**os.environ, "GLIDEFS_VM_SHARE": str(self.share), "PYTHONPATH": str(ROOT)}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT, env=environment
            )

    def progress(self) -> list[str]:
        """What the guest said, of all boots."""
        path = self.share / "progress"
        return path.read_text().splitlines() if path.exists() else []

    def wait_for(self, step: str, after: int) -> str:
        """Wait until the guest says that it has come to a step, looking past so many lines."""

        def said() -> str:
            assert self._process is not None
            for line in self.progress()[after:]:
                if line.split(" ")[0] == step:
                    return line
            assert self._process.poll() is None, self._log.read_text(errors="replace")[-6000:]
            return ""

        return str(wait_for(said, f"boot {self.boots} comes to {step!r}", PATIENCE))

    def finish(self) -> None:
        """Until the guest has powered itself off, without an error."""
        assert self._process is not None
        status = self._process.wait(PATIENCE)
        self._process = None
        assert status == 0, self._log.read_text(errors="replace")[-6000:]
        self.volatile.cut()

    def cut(self) -> None:
        """Power off in an instant: first the disk does nothing any more, then the machine is gone, and with
        the disk's own end all that it had not written.
        """
        if self._process is not None:
            self.volatile.freeze()
            self._process.terminate()  # vm-test/run kills QEMU and returns when it is gone
            self._process.wait(60)
            self._process = None
        self.volatile.cut()


@pytest.fixture(params=TRANSPORTS)
def machine(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Machine]:
    made = Machine(tmp_path, request.param)
    yield made
    made.cut()
    for image in tmp_path.glob("*.img"):
        image.unlink()


def test_a_volatile_disk_loses_what_was_not_flushed(tmp_path: Path) -> None:
    """Otherwise the test below could not fail."""
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(1 << 20)
    disk = VolatileDisk(image, tmp_path)
    old, flushed, not_flushed = (bytes([value]) * 8 * KIB for value in (0, 1, 2))
    disk.start()
    with RawClient(str(disk.socket)) as client:
        client.greet().go("")
        client.pwrite(0, flushed)
        client.flush()
        client.pwrite(4 * KIB, not_flushed)
        client.pwrite(64 * KIB, not_flushed)
        assert client.pread(64 * KIB, 8 * KIB) == not_flushed
        disk.freeze()
    disk.cut()
    disk.start()
    with RawClient(str(disk.socket)) as client:
        client.greet().go("")
        assert client.pread(0, 8 * KIB) == flushed
        assert client.pread(64 * KIB, 8 * KIB) == old
    disk.cut()


@pytest.mark.slow
@pytest.mark.timeout(1200 + 900 * ROUNDS)
def test_synced_files_survive_power_cuts(machine: Machine, figure: Figures) -> None:
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    results: list[dict[str, Any]] = []
    early = 0
    for number in range(ROUNDS):
        if number % 3 == 2:
            # The machine that comes back from a cut is cut again, before or while the daemon recovers.
            mark = len(machine.progress())
            machine.boot(write=True)
            machine.wait_for("starting", mark)
            time.sleep(rng.uniform(*STARTING))
            machine.cut()
            early += 1
        mark = len(machine.progress())
        machine.boot(write=True)
        results.append(checked(machine, mark))
        machine.wait_for("writing", mark)
        time.sleep(rng.uniform(*WRITING))
        machine.cut()
    mark = len(machine.progress())
    machine.boot(write=False)
    results.append(checked(machine, mark))
    machine.finish()
    report(results, machine, early, figure)


def checked(machine: Machine, mark: int) -> dict[str, Any]:
    """What a boot found; it says so before it fails."""
    result: dict[str, Any] = json.loads(machine.wait_for("checked", mark).split(" ", 1)[1])
    assert result["wrong"] == [], (result, machine.boots)
    assert result["errors"] == [], (result, machine.boots)
    return result


def report(results: list[dict[str, Any]], machine: Machine, early: int, figure: Figures) -> None:
    found = 0
    for number, result in enumerate(results[1:], 1):
        name = f"cut {number}, boot {result['boot']}"
        figure(f"{name}: synced files since the cut before, all whole", result["files"] - found, at_least=1)
        figure(f"{name}: only in the log", result["dirty"] / KIB, "KiB")
        figure(f"{name}: start of the daemon", result["start"], "s")
        found = result["files"]
    figure("power cuts in mid-write", len(results) - 1, at_least=ROUNDS)
    figure("power cuts while the daemon starts", early)
    lines = sum(len(path.read_text().splitlines()) for path in (machine.share / "reports").iterdir())
    figure("events of files reported", lines)
    figure("files compared at the end", results[-1]["files"], at_least=10 * ROUNDS)
    most = max(result["dirty"] for result in results[1:])
    figure("most that only the log had", most / KIB, "KiB", at_least=1)
