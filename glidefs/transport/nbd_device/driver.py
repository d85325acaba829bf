"""The NBD driver of this kernel, and what it says of its devices under `/sys/block`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from msgspec import Struct

from glidefs.transport.device.module import load_module

MODULE = Path("/sys/module/nbd")
BLOCK = Path("/sys/block")
_OPTIONS = ("nbds_max=0", "max_part=0")
"""Devices are made when they are asked for, and nobody looks for partitions on the disks of guests."""


def nbd_device_missing() -> str | None:
    """Why this process cannot have NBD devices, in one line with the remedy; None if it can try."""
    if os.geteuid() != 0:
        return "only root can make /dev/nbdN, run the daemon as root"
    if MODULE.exists():
        return None
    tried = load_module("nbd", *_OPTIONS)
    return None if MODULE.exists() else f"the kernel's nbd driver is not loaded{tried}"


class NbdState(Struct, frozen=True):
    """A device as sysfs shows it.

    ``server``: the process that connected it, 0 once it was disconnected: it is there only because somebody
    has it open. ``identifier``: what that process called itself; empty before Linux 5.14. ``size`` in bytes.
    """

    index: int
    server: int
    identifier: str
    size: int


def read_state(index: int, block: Path = BLOCK) -> NbdState | None:
    """A device that is connected, or was and is still open; None for any other number."""
    directory = block / f"nbd{index}"
    server = _read(directory / "pid")
    if server is None:
        return None
    size = _read(directory / "size") or "0"
    return NbdState(index, _number(server), _read(directory / "backend") or "", _number(size) * 512)


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
    """What udev's rule does as well: there may be no udev. Not allowed, it stays as it is."""
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
