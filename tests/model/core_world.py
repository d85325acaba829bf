"""What the machines of the core and of volumes run on: hot sectors, and one engine for all examples."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

from core_rig import CoreRig
from history import SECTOR, UNIT
from hypothesis import strategies as st

BLOCK = 131072
SECTORS = 32
AREAS = [
    (0, 3 * SECTORS),
    (1023 * SECTORS, 2 * SECTORS),
    (2047 * SECTORS + 16, 48),
    (3070 * SECTORS, 2 * SECTORS),
]
"""Hot sectors: in three chunks, over a border of chunks, off a border of blocks, at the end."""
SIZE = 3072 * BLOCK
SEGMENT_SECTORS = 12
LOG_LIMIT = 28 * SEGMENT_SECTORS * (SECTOR + 32)

_rig: CoreRig | None = None


def shared_rig() -> CoreRig:
    global _rig
    if _rig is None:
        where = "/dev/shm" if os.path.isdir("/dev/shm") else None
        home = Path(tempfile.mkdtemp(prefix="glidefs-model-", dir=where))
        _rig = CoreRig(
            home,
            segment_bytes=SEGMENT_SECTORS * SECTOR,
            log_limit=LOG_LIMIT,
            map_budget=96 << 10,
            cache_bytes=8 * BLOCK,
        )
        atexit.register(shutil.rmtree, home, ignore_errors=True)
        atexit.register(_rig.close)
    return _rig


def areas(unit: int, longest: int) -> st.SearchStrategy[tuple[int, int]]:
    """(offset, length) in bytes, multiples of ``unit``, inside one hot area."""

    def inside(area: tuple[int, int]) -> st.SearchStrategy[tuple[int, int]]:
        first, count = area
        units = count * SECTOR // unit
        lengths = st.integers(1, min(longest // unit, units))
        return st.tuples(st.integers(0, units - 1), lengths).map(
            lambda pair: (first * SECTOR + pair[0] * unit, min(pair[1], units - pair[0]) * unit)
        )

    return st.sampled_from(AREAS).flatmap(inside)


def show(content: bytes) -> str:
    """The tags of a sector's parts, and what place in their write they had."""
    parts = [content[i : i + 8] for i in range(0, len(content), UNIT)]
    return " ".join(
        f"{int.from_bytes(part[:4], 'little')}.{int.from_bytes(part[4:], 'little')}" for part in parts
    )
