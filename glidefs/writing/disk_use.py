"""Describes what fills the file system of a log."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from glidefs.core.engine import Engine

if TYPE_CHECKING:
    from glidefs.volume.volume import Volume

MIB = 1 << 20


def disk_use(engine: Engine, volume: Volume) -> str:
    """What takes the file system that holds the log of ``volume``, and what to do."""
    where = volume.log_dir if volume.log_dir.exists() else volume.log_dir.parent
    try:
        room = os.statvfs(where)
        device = os.stat(where).st_dev
        blocks = os.stat(engine.config.cache_dir / "blocks.data")
    except OSError as error:
        return f"the disk of {where} is full, and cannot be asked for more ({error.strerror})"
    total, left = room.f_blocks * room.f_frsize, room.f_bavail * room.f_frsize
    logs = engine.stats().log_bytes
    cache = blocks.st_blocks * 512 if blocks.st_dev == device else 0
    others = max(0, total - room.f_bfree * room.f_frsize - logs - cache)
    what = (
        f"the file system of {where} has no room for more log ({left // MIB} MiB of {total // MIB} and "
        f"{room.f_favail} files free; logs {logs // MIB}, block cache {cache // MIB}, others {others // MIB})"
    )
    if others > max(logs + cache, total // 8):
        return f"{what}: other files fill it, remove or move them"
    return f"{what}: lower log_size and block_cache_size to what fits, or give it a larger disk"
