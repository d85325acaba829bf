"""Stores to bless into."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from images_rig import DyingStore

from glidefs.store import open_store
from glidefs.store.base import ObjectStore


@pytest.fixture
def memory() -> DyingStore:
    return DyingStore()


@pytest.fixture(params=["memory", "file"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ObjectStore]:
    if request.param == "memory":
        yield DyingStore()
        return
    with open_store(f"file://{tmp_path}/store", create=True) as opened:
        yield opened
