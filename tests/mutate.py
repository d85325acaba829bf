"""Damage to files, for tests that ask what is made of it.

Each function changes files in place, as a disk, a copy or a restore would: nothing of it is synced.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

SECTOR = 4096


def bit_flip(path: Path, offset: int, bit: int = 0) -> None:
    """Turn over one bit of the byte at ``offset``."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ (1 << bit)]))


def truncate(path: Path, length: int) -> None:
    """Cut the file off."""
    with path.open("r+b") as file:
        file.truncate(length)


def zero_fill(path: Path, offset: int = 0, length: int | None = None) -> None:
    """Replace ``length`` bytes (default: all that follow) by zeros; the size stays."""
    size = path.stat().st_size
    end = size if length is None else min(size, offset + length)
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(bytes(max(0, end - offset)))


def zero_sector(path: Path, sector: int) -> None:
    """Lose one sector of 4 KiB: it reads as zeros."""
    zero_fill(path, sector * SECTOR, SECTOR)


def swap(one: Path, other: Path) -> None:
    """Put two files in each other's place."""
    aside = one.with_name(f"{one.name}.swapping")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def copy_over(source: Path, target: Path) -> None:
    """Put a copy of ``source`` where ``target`` is, or to a new name."""
    shutil.copyfile(source, target)


def remove(path: Path) -> None:
    """Lose a file, or a whole directory."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def sectors(path: Path) -> range:
    """The numbers of a file's sectors."""
    return range(-(-path.stat().st_size // SECTOR))


def fifo(path: Path) -> None:
    """Put a FIFO there: whoever opens it to read waits for a writer."""
    path.unlink()
    os.mkfifo(path)
