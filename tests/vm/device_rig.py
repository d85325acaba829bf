"""What the tests of whole devices share: a daemon whose exports are ``/dev/ublkbN``, file systems on
them, and a clean kernel afterwards. In the VM everything lives on its scratch disk.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from node import EMULATED, Node
from null_server import blockers

from glidefs.core import ublk
from glidefs.errors import DeviceError

STEP = 1200.0 if EMULATED else 300.0
"""Seconds for one command, such as mkfs or a copy of some hundred MiB."""
DEAD, LIVE, QUIESCED = 0, 1, 2
REASON = blockers()


def run(*command: str | Path, cwd: Path | None = None, timeout: float = STEP) -> str:
    """A command that must succeed; its output."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, f"{command}: status {done.returncode}\n{done.stdout}"
    return done.stdout


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A directory on a disk; /tmp is memory in the VM."""
    with tempfile.TemporaryDirectory(prefix="g-", dir=os.environ.get("GLIDEFS_VM_SCRATCH")) as made:
        yield Path(made)


def dev_id(device: str | Path) -> int:
    return int(str(device).removeprefix("/dev/ublkb"))


def queue_limit(device: str, name: str) -> int:
    return int(Path(f"/sys/block/{Path(device).name}/queue/{name}").read_text())


def counters(device: str) -> list[int]:
    """/sys/block/X/stat: reads at 0, sectors read at 2, writes at 4, sectors written at 6, discards at 11."""
    return [int(x) for x in Path(f"/sys/block/{Path(device).name}/stat").read_text().split()]


def device_size(path: str) -> int:
    with open(path, "rb") as file:
        return file.seek(0, os.SEEK_END)


def state(device: str) -> int | None:
    """State of a device in the driver, None where there is none."""
    try:
        return ublk.query(dev_id(device)).state
    except DeviceError:
        return None


def create(node: Node, name: str, size: str) -> str:
    """An export whose transport was left to the daemon; its device."""
    made: dict[str, Any] = node.json("create", name, "--size", size)
    assert made["transport"] == "ublk", made
    assert made["device"].startswith("/dev/ublkb"), made
    assert node.json("show", name)["device"] == made["device"]
    return str(made["device"])


def io_errors(since: int) -> list[str]:
    """Lines of the kernel's log after the first ``since`` that tell of failed I/O."""
    signs = ("I/O error", "Buffer I/O", "EXT4-fs error", "XFS (ublk", "aborted journal", "blk_update_request")
    bad = ("error", "corrupt", "shut", "abort")
    lines = kernel_log()[since:]
    return [line for line in lines if any(s in line for s in signs) and any(b in line.lower() for b in bad)]


def kernel_log() -> list[str]:
    return run("dmesg").splitlines()


@contextlib.contextmanager
def mounted(device: str, at: Path, *options: str) -> Iterator[Path]:
    at.mkdir(exist_ok=True)
    run("mount", *options, device, at)
    try:
        yield at
    finally:
        run("umount", at)


def unmount(at: str, *options: str) -> None:
    """If it can be: over a device that nobody serves umount would wait, and nothing ends it."""
    ended = subprocess.Popen(["umount", *options, at], stderr=subprocess.DEVNULL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        ended.wait(60)


def drop_caches() -> None:
    """Let the kernel forget all pages and names that are clean, so that they are read again."""
    run("sync")
    Path("/proc/sys/vm/drop_caches").write_text("3\n")


@contextlib.contextmanager
def no_leftovers() -> Iterator[None]:
    """End daemons' mounts and devices that a test left, so that a failed one takes no other along."""
    before = set(Path("/dev").glob("ublkc*"))
    yield
    left = sorted(set(Path("/dev").glob("ublkc*")) - before)
    for node in left:
        number = int(node.name.removeprefix("ublkc"))
        device = f"/dev/ublkb{number}"
        for line in Path("/proc/self/mounts").read_text().splitlines():
            if line.startswith(f"{device} "):
                unmount(line.split(" ")[1], "-l")
        with contextlib.suppress(DeviceError):
            found = ublk.query(number)
            if found.state != LIVE:
                ublk.delete(number, found.tag)


@contextlib.contextmanager
def ended(node: Node) -> Iterator[Node]:
    """The daemon does not outlive the block."""
    try:
        yield node
    finally:
        if node.process is not None and node.process.poll() is None:
            node.process.kill()
            node.process.wait()
        if os.environ.get("GLIDEFS_DAEMON_LOG"):
            shutil.copy(node.base / "daemon.log", os.environ["GLIDEFS_DAEMON_LOG"])


def real_files(least: int, roots: tuple[str, ...] = ("/usr/share/perl", "/usr/lib")) -> list[str]:
    """Paths of at least so many bytes of this host's files, small and large; symbolic links too.

    The first root gives many small files; of the last as much as is missing.
    """
    chosen: list[str] = []
    total = 0
    for root in roots:
        for directory, subdirs, names in os.walk(root):
            subdirs.sort()
            if total >= least:
                return chosen
            if Path(directory).name in ("__pycache__", "debug", "modules"):
                subdirs.clear()
                continue
            for name in sorted(names):
                path = os.path.join(directory, name)
                found = os.lstat(path)
                if "\n" in path or found.st_size > 24 << 20:
                    continue
                if os.path.islink(path):
                    chosen.append(path)
                elif os.path.isfile(path):
                    chosen.append(path)
                    total += found.st_size
    assert total >= least, f"{roots} have {total} bytes"
    return chosen
