"""Fixtures of the tests of the C core."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from core_handoff_rig import Pair
from core_rig import CoreRig, inject_nothing, trace

sys.path.insert(0, str(Path(__file__).parents[1]))  # mutate.py
sys.path.insert(0, str(Path(__file__).parents[1] / "nbd"))  # nbd_client.py
sys.path.insert(0, str(Path(__file__).parents[1] / "model"))  # what reads a trace of the disk


@pytest.fixture
def make_rig(tmp_path: Path) -> Iterator[Callable[..., CoreRig]]:
    """Engines with options of the test's choice; closed at its end."""
    rigs: list[CoreRig] = []

    def make(**config: Any) -> CoreRig:
        rigs.append(CoreRig(tmp_path, **config))
        return rigs[-1]

    yield make
    inject_nothing()
    trace(None)
    for rig in rigs:
        rig.close()


@pytest.fixture
def rig(make_rig: Callable[..., CoreRig]) -> CoreRig:
    return make_rig()


@pytest.fixture
def pair(make_rig: Callable[..., CoreRig]) -> Pair:
    return Pair(make_rig)
