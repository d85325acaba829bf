"""What a shrink cuts off stays cut off, whichever commit the next owner starts from."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
from volume_rig import MIB, Rig

from glidefs.errors import GlideError
from glidefs.store.memory import MemoryStore

SECTOR = 4096


@pytest.mark.parametrize("backlog", [0, 200])
def test_a_smaller_size_is_not_committed_before_the_zeroes_that_cut(tmp_path: Path, backlog: int) -> None:
    """Of a long backlog the first commit must not carry the new size: its end is before the ZERO."""
    rig = Rig(tmp_path, MemoryStore())
    try:
        host = rig.host("a", engine={"segment_bytes": 8 * SECTOR})
        volume = rig.create(host, 64 * MIB)
        volume.core.pwrite(48 * MIB, b"x" * SECTOR)
        volume.drain(20)
        for i in range(backlog):
            volume.core.pwrite(i % 8 * SECTOR, bytes([i + 1]) * SECTOR)
        original, roots = rig.memory.put, []

        def put(key: str, data: Any, **conditions: Any) -> str:
            if key.endswith("/manifest"):
                roots.append(key)
                if len(roots) == 2:  # the host is cut off after its first commit
                    rig.memory.set_down(True)
            return original(key, data, **conditions)

        rig.memory.put = put  # type: ignore[method-assign]
        volume.resize(32 * MIB)
        with contextlib.suppress(GlideError):
            volume.drain(1)
        host.scheduler.stop()
        rig.memory.put = original  # type: ignore[method-assign]
        rig.memory.set_down(False)
        taken = rig.attach(rig.host("b"), volume.name, take_over=True)
        size = taken.core.info().size
        taken.resize(64 * MIB)
        want = b"x" * SECTOR if size == 64 * MIB else bytes(SECTOR)
        assert taken.core.pread(48 * MIB, SECTOR) == want
    finally:
        for live, engine in list(rig.live):
            live.close()
            engine.close()
