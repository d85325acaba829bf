"""Fixtures of the fork tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fork_rig import CountingStore, Node

MakeNode = Callable[..., Node]


@pytest.fixture
def memory() -> CountingStore:
    return CountingStore()


@pytest.fixture
def make_node(tmp_path: Path, memory: CountingStore) -> Iterator[MakeNode]:
    live: list[Node] = []

    def make(name: str = "a", **settings: object) -> Node:
        live.append(Node(tmp_path / name, memory, **settings))  # type: ignore[arg-type]
        return live[-1]

    yield make
    for node in live:
        if not node.stopping.is_set():
            node.close()


@pytest.fixture
def node(make_node: MakeNode) -> Node:
    return make_node()
