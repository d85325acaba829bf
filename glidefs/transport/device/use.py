"""Who has a block device open: processes, by their descriptors, and the kernel, by an exclusive claim.

The kernel counts the openings of a block device but does not show the count. It shows this much: /proc shows
the descriptors of processes, and whoever mounts the device, swaps on it or puts another device on it claims
it: then an exclusive open of it fails (O_EXCL, see open(2)). A partition of it counts as the device.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path

PATIENCE = 5.0
"""Seconds for those who only look: udev opens a device for a moment when something about it changes."""
_POLL = 0.05
_SHOWN = 3


def device_use(path: str, patience: float = PATIENCE) -> str:
    """Who has the block device ``path`` open, for people; empty if nobody has, or it is not there."""
    until = time.monotonic() + patience
    while True:
        use = _use(path)
        if not use or time.monotonic() >= until:
            return use
        time.sleep(_POLL)


def _use(path: str) -> str:
    try:
        number = os.stat(path).st_rdev
    except OSError:
        return ""
    holders = _holders({number, *_partitions(number)})
    if holders:
        more = ", ..." if len(holders) > _SHOWN else ""
        return f"{path} is open ({', '.join(holders[:_SHOWN])}{more})"
    return f"{path} is mounted, or in use by another device" if _is_claimed(path) else ""


def _partitions(number: int) -> Iterator[int]:
    """Numbers of the partitions of the device of that number."""
    for part in Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").glob("*/partition"):
        with contextlib.suppress(OSError, ValueError):  # it has just been deleted
            major, minor = (part.parent / "dev").read_text().split(":")
            yield os.makedev(int(major), int(minor))


def _holders(numbers: set[int]) -> list[str]:
    """Processes other than this one with a descriptor of a device of these numbers."""
    found = []
    root = os.stat("/")
    for process in Path("/proc").iterdir():
        if not process.name.isdigit() or int(process.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):  # it ended, or is not ours to look at
            # A jail or container may have it at any path; here, files of a server that hangs are left alone.
            below = "/dev/" if os.path.samestat(os.stat(process / "root"), root) else "/"
            if any(_is_device(descriptor, numbers, below) for descriptor in os.scandir(process / "fd")):
                found.append(f"pid {process.name} {(process / 'comm').read_text().strip()}".strip())
    return found


def _is_device(descriptor: os.DirEntry[str], numbers: set[int], below: str) -> bool:
    try:
        # The link first: a stat of every socket and pipe of a host takes far longer.
        return os.readlink(descriptor.path).startswith(below) and descriptor.stat().st_rdev in numbers
    except OSError:
        return False


def _is_claimed(path: str) -> bool:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        return error.errno == errno.EBUSY
    return False
