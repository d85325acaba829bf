"""Fixtures of the tests of the C core."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from core_handoff_rig import Pair
from core_rig import CoreRig, rigs

sys.path.insert(0, str(Path(__file__).parents[1]))  # mutate.py
sys.path.insert(0, str(Path(__file__).parents[1] / "nbd"))  # nbd_client.py
sys.path.insert(0, str(Path(__file__).parents[1] / "model"))  # what reads a trace of the disk


@pytest.fixture
def make_rig(tmp_path: Path) -> Iterator[Callable[..., CoreRig]]:
    with rigs(tmp_path) as make:
        yield make


@pytest.fixture
def rig(make_rig: Callable[..., CoreRig]) -> CoreRig:
    return make_rig()


@pytest.fixture
def pair(make_rig: Callable[..., CoreRig]) -> Pair:
    return Pair(make_rig)
