"""A udevd with the rule of the package, in the VM of the tests.

Nowhere else: a udevd and a rule of the test's have no business on a host that is in use.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from daemon_harness import ROOT
from waiting import wait_for

UDEVD = Path("/lib/systemd/systemd-udevd")
RULE = Path("/run/udev/rules.d/60-glidefs.rules")
LINKS = Path("/dev/glidefs")


def udev_missing() -> str | None:
    """Why there cannot be one here, or None."""
    if not os.environ.get("GLIDEFS_VM"):
        return "runs in vm-test/run only"
    return None if UDEVD.exists() else f"no {UDEVD}: apt install udev"


def udevadm(*args: str) -> str:
    environment = {**os.environ, "SYSTEMD_IGNORE_CHROOT": "1"}
    done = subprocess.run(["udevadm", *args], env=environment, capture_output=True, text=True, check=True)
    return done.stdout


def settle() -> None:
    """Until udev has done all that the kernel told it."""
    udevadm("settle", "--timeout=120")


@contextlib.contextmanager
def udevd() -> Iterator[None]:
    """One that runs as long as the block does."""
    RULE.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "packaging/60-glidefs.rules", RULE)
    environment = {**os.environ, "SYSTEMD_IGNORE_CHROOT": "1"}
    process = subprocess.Popen([UDEVD, "--resolve-names=never"], env=environment)
    try:
        wait_for(lambda: Path("/run/udev/control").exists(), "udevd listens")
        settle()
        yield
    finally:
        process.terminate()
        process.wait()
        RULE.unlink()


def led_to(name: str) -> str:
    """The device that a link in /dev/glidefs leads to, or nothing."""
    path = LINKS / name
    return str(path.resolve()) if path.is_symlink() else ""
