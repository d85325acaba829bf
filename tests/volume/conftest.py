"""Fixtures of the volume tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from volume_rig import SHADOW, Rig

from glidefs.store.memory import MemoryStore

sys.path.insert(0, str(Path(__file__).parents[1] / "nbd"))  # nbd_client.py


@pytest.fixture
def memory() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def rig(tmp_path: Path, memory: MemoryStore, request: pytest.FixtureRequest) -> Iterator[Rig]:
    rig = Rig(tmp_path, memory)
    yield rig
    for host, engine in list(rig.live):
        host.close()
        engine.close()
    rig.differences.close()
    if SHADOW and request.module.__name__ != "test_volume_shadow":
        assert rig.differences.lines == []
