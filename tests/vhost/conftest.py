"""Fixtures of the vhost-user tests."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "core"))  # core_rig.py
sys.path.insert(0, str(Path(__file__).parents[1] / "handoff"))  # handoff_rig.py

from core_rig import CoreRig, rigs
from vhost_rig import VhostRig


@pytest.fixture
def make_rig(tmp_path: Path) -> Iterator[Callable[..., CoreRig]]:
    with rigs(tmp_path) as make:
        yield make


@pytest.fixture
def make_vhost(make_rig: Callable[..., CoreRig], tmp_path: Path) -> Iterator[Callable[..., VhostRig]]:
    """Volumes behind the transport, which is closed before them. Options: those of Vol and of VhostRig."""
    made: list[VhostRig] = []

    def make(
        *, read_only: bool = False, queues: int = 4, log_limit: int = 64 << 20, **config: Any
    ) -> VhostRig:
        rig = make_rig(log_limit=log_limit)
        vol = rig.vol(read_only=read_only, **config)
        made.append(
            VhostRig(rig, vol, tmp_path / f"s{len(made)}", read_only=read_only, queues=queues).start()
        )
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def vhost(make_vhost: Callable[..., VhostRig]) -> VhostRig:
    return make_vhost()
