"""A start with many exports asks for their roots by one listing, and believes it as it would believe each."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from fork_rig import MIB, CountingStore, Node, attach

from glidefs.errors import AccessDenied
from glidefs.manifest.lease import WORTH_A_PAGE
from glidefs.store.base import ListPage

MakeNode = Callable[..., Node]
NAMES = [f"v{i}" for i in range(WORTH_A_PAGE + 4)]


def closed(make_node: MakeNode) -> None:
    """A node that had all of them, each with a root in the store, and stopped."""
    node = make_node("a")
    for name in NAMES:
        node.create(name, 16 * MIB, wait=True)
        node.core(name).pwrite(0, name.encode().ljust(4096, b"."))
        node.router.drain(name, 20.0)
    node.close()


def started(make_node: MakeNode) -> Node:
    node = make_node("a")
    node.router.start()
    assert node.router.wait_tried(20)
    return node


def states(node: Node) -> dict[str, str]:
    return {name: node.router.show(name).state for name in NAMES}


def test_one_listing_compares_all(make_node: MakeNode, memory: CountingStore) -> None:
    closed(make_node)
    heads, lists = memory.requests["head"], memory.requests["list"]
    node = started(make_node)
    assert states(node) == dict.fromkeys(NAMES, "serving")
    assert memory.requests["head"] == heads
    assert 1 <= memory.requests["list"] - lists <= 2
    assert node.core("v3").pread(0, 512).rstrip(b".") == b"v3"


def test_what_another_took_meanwhile_is_not_served(make_node: MakeNode, memory: CountingStore) -> None:
    closed(make_node)
    other = make_node("b")
    attach(other, "v5", take_over=True)
    node = started(make_node)
    assert states(node) == dict.fromkeys(NAMES, "serving") | {"v5": "fenced"}


def test_where_listing_is_not_allowed_each_root_is_asked_for(
    make_node: MakeNode, memory: CountingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed(make_node)
    attach(make_node("b"), "v5", take_over=True)

    def fails(prefix: str, token: str = "") -> ListPage:
        raise AccessDenied("may not list", key=prefix, op="list")

    monkeypatch.setattr(memory, "list_page", fails)
    node = started(make_node)
    found = states(node)
    assert found.pop("v5") == "fenced"
    assert set(found.values()) == {"serving"}


def test_an_old_listing_is_not_used_again(make_node: MakeNode, memory: CountingStore) -> None:
    """An export that is opened later is compared with what the store has then."""
    closed(make_node)
    node = started(make_node)
    node.router.detach("v7")
    heads = memory.requests["head"]
    attach(node, "v7")
    assert node.router.show("v7").state == "serving"
    assert not node.router._opener.roots._seen
    assert memory.requests["head"] >= heads
