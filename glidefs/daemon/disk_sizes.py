"""Checks that the configured sizes fit the local disks."""

from __future__ import annotations

import os
from pathlib import Path

from glidefs.config import Config

MIB = 1 << 20
MARGIN = 64 * MIB
"""Left free by the core, or a 16th of a small file system: ``csrc/base/space.c``."""


def misfits(config: Config) -> list[str]:
    """One line for each file system that is too small for what is to be kept there, with what to do."""
    cache = config.cache
    wanted: dict[int, list[tuple[str, int, Path]]] = {}
    for key, size, path in (
        ("log_size", cache.log_size, cache.logs),
        ("block_cache_size", cache.block_cache_size, cache.blocks),
    ):
        while not path.exists() and path != path.parent:
            path = path.parent
        wanted.setdefault(os.stat(path).st_dev, []).append((key, size, path))
    lines: list[str] = []
    for parts in wanted.values():
        room = os.statvfs(parts[0][2])
        total = room.f_blocks * room.f_frsize
        need = sum(size for _, size, _ in parts) + min(MARGIN, total // 16)
        if total and need > total:
            keys = " + ".join(f"{key} ({size // MIB} MiB)" for key, size, _ in parts)
            lines.append(
                f"{parts[0][2]} is on a file system of {total // MIB} MiB, but {keys} and a margin are "
                f"{need // MIB} MiB: lower them, else writers wait for uploads before the log has its size"
            )
    return lines
