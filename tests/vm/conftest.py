"""Makes the helpers of this directory importable, however pytest was started, and prints figures."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "acceptance"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import figures


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory on a disk."""
    import device_rig as rig  # needs the core, without which the tests here are skipped

    with rig.scratch() as made:
        yield made


@pytest.fixture
def node(place: Path) -> Iterator[Any]:
    """A daemon that can hand over (Generations), for tests of both kinds of device."""
    import device_kinds

    with device_kinds.serving(place / "n") as made:
        yield made


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> figures.Figures:
    return figures.Figures(request.node.name)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    figures.summary(terminalreporter)
