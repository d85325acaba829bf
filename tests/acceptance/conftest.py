"""Acceptance of the whole product over NBD, with figures; see figures and node."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "handoff"))  # handoff_rig.py
sys.path.insert(0, str(Path(__file__).resolve().parent))

import figures
from node import Node


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> figures.Figures:
    return figures.Figures(request.node.name)


@pytest.fixture
def make_node(tmp_path: Path) -> Iterator[Callable[..., Node]]:
    """Make daemons; those left running are ended."""
    made: list[Node] = []

    def make(name: str = "a", **settings: Any) -> Node:
        node = Node(tmp_path / name, **settings)
        made.append(node)
        return node

    yield make
    for node in made:
        if node.process is not None and node.process.poll() is None:
            node.process.kill()
            node.process.wait()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    figures.summary(terminalreporter)
