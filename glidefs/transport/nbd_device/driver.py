"""The NBD driver of this kernel, and what it says of its devices under `/sys/block`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from msgspec import Struct

from glidefs.transport.device.module import load_module

MODULE = Path("/sys/module/nbd")
BLOCK = Path("/sys/block")
_CAP_SYS_ADMIN = 21
LOADED_WITH = ("nbds_max=0", "max_part=0")
"""Devices are made when they are asked for, and nobody looks for partitions on the disks of guests."""


def nbd_device_missing() -> str | None:
    """Why this process cannot have NBD devices, in one line with the remedy; None if it can try."""
    if not _may_administer():
        return "it takes CAP_SYS_ADMIN to make /dev/nbdN, run the daemon as root"
    if MODULE.exists():
        return None
    tried = load_module("nbd", *LOADED_WITH)
    return None if MODULE.exists() else f"the kernel's nbd driver is not loaded{tried}"


def _may_administer(status: Path = Path("/proc/self/status")) -> bool:
    """Root of a container may lack the capability."""
    for line in (_read(status) or "").splitlines():
        name, _, value = line.partition(":")
        if name == "CapEff":
            return bool(int(value, 16) >> _CAP_SYS_ADMIN & 1)
    return os.geteuid() == 0


class NbdState(Struct, frozen=True):
    """A device as sysfs shows it.

    ``identifier``: what who connected it called itself; empty before Linux 5.14. ``size`` in bytes. One that
    was disconnected looks the same as long as somebody has it open: see :meth:`NbdControl.probe`. The process
    id that is there, too, is that of a thread, and may be another's by now.
    """

    index: int
    identifier: str
    size: int


def read_state(index: int, block: Path = BLOCK) -> NbdState | None:
    """A device that is connected, or was and is still open; None for any other number."""
    directory = block / f"nbd{index}"
    if _read(directory / "pid") is None:
        return None
    size = _read(directory / "size") or "0"
    return NbdState(index, _read(directory / "backend") or "", _number(size) * 512)


def has_node(index: int) -> bool:
    """Whether guests find it in this `/dev`."""
    return Path(f"/dev/nbd{index}").exists()


def announce_again(index: int, block: Path = BLOCK) -> None:
    """Let udev look at its name once more."""
    with contextlib.suppress(OSError):
        (block / f"nbd{index}" / "uevent").write_text("change")


def exists(index: int, block: Path = BLOCK) -> bool:
    """Whether the kernel has a device of that number, whatever its state."""
    return (block / f"nbd{index}").exists()


def states(block: Path = BLOCK) -> Iterator[NbdState]:
    """All of this host that are not free."""
    for directory in sorted(block.glob("nbd*")):
        number = directory.name.removeprefix("nbd")
        found = read_state(int(number), block) if number.isdigit() else None
        if found is not None:
            yield found


def tune(index: int, block: Path = BLOCK) -> None:
    """What udev's rule does as well: there may be no udev. Not allowed, it stays as it is.

    Only of a new device: the kernel lets requests end first, and those of one that waits for its connection
    cannot.
    """
    for name, value in (("scheduler", "none"), ("read_ahead_kb", "512")):
        try:
            (block / f"nbd{index}" / "queue" / name).write_text(value)
        except OSError:
            continue


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def _number(text: str) -> int:
    return int(text) if text.isdigit() else 0
