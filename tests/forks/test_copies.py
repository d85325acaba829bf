"""Copies of what is not a base: in the store when the verb returns, and whole whatever the source does."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from fork_rig import MIB, PREFIX, CountingStore, Node

import glidefs.exports.router
from glidefs.errors import ExportExists, Fenced, StoreError, UnknownExport
from glidefs.exports.requests import AttachRequest, PromoteRequest, SnapshotRequest, TagRequest
from glidefs.manifest import lease
from glidefs.names import manifest_key, pins_prefix, snapshot_key
from glidefs.store.base import Body

MakeNode = Callable[..., Node]
DATA = os.urandom(MIB)


def pins(memory: CountingStore) -> list[str]:
    return [info.key for info in memory.list(pins_prefix(PREFIX))]


def at_put(memory: CountingStore, start: str, act: Callable[[], None]) -> None:
    """Do that before the first put of a key that begins so."""
    put, left = memory.put, [act]

    def hooked(key: str, data: Body, **options: object) -> str:
        if key.startswith(start) and left:
            left.pop()()
        return put(key, data, **options)  # type: ignore[arg-type]

    memory.put = hooked  # type: ignore[method-assign]


@pytest.fixture
def source(node: Node) -> str:
    node.create("v", 64 * MIB, wait=True)
    node.core("v").pwrite(0, DATA)
    return "volume:v"


@pytest.mark.parametrize("kind", ["volume", "snapshot", "tag"])
def test_a_fork_is_in_the_store_when_create_returns(
    node: Node, memory: CountingStore, source: str, kind: str
) -> None:
    made = node.router.forks.snapshot("v", SnapshotRequest(tag="t"))["sequence"]
    status = node.fork("f", {"volume": source, "snapshot": f"v@{made}", "tag": "tag:t"}[kind])
    assert lease.read_root(memory, PREFIX, "f")[0].owner_node == "a"
    assert status.published
    assert node.core("f").pread(0, MIB) == DATA
    assert pins(memory) == []


def test_no_copy_leaves_a_pin(node: Node, memory: CountingStore, source: str) -> None:
    made = node.router.forks.snapshot("v", SnapshotRequest(tag="t"))["sequence"]
    node.router.forks.tag("v", TagRequest(tag="u", sequence=made))
    node.router.forks.make_base("v", PromoteRequest(base="b"))
    node.fork("view", "tag:u", read_only=True)
    node.router.forks.promote("view")
    assert lease.read_root(memory, PREFIX, "view")[0].owner_node == "a"
    assert pins(memory) == []


def test_nothing_is_left_of_a_fork_that_the_store_did_not_take(
    node: Node, memory: CountingStore, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(glidefs.exports.router, "VERB_PATIENCE", 0.4)
    node.router.drain("v")
    at_put(memory, manifest_key(PREFIX, "f"), lambda: memory.set_down(True))
    with pytest.raises(StoreError):
        node.fork("f", source)
    memory.set_down(False)
    assert [status.name for status in node.router.listing()] == ["v"]
    assert not (node.home / "exports" / "f.json").exists()
    assert node.fork("f", source).created


def test_a_crash_before_the_root_leaves_no_fork_that_is_put_later(
    node: Node, memory: CountingStore, source: str
) -> None:
    """! Its source is pinned no more."""
    node.router.drain("v")
    records: list[bool] = []
    record = node.home / "exports" / "f.json"
    at_put(memory, manifest_key(PREFIX, "f"), lambda: records.append(record.exists()))
    node.fork("f", source)
    assert records == [False]
    assert record.exists()


def test_a_commit_waits_for_the_pin(node: Node, memory: CountingStore, source: str) -> None:
    """! What is pinned is what the store has, and nothing comes between."""
    node.router.drain("v")
    volume = node.router.table.get("v").volume
    assert volume is not None
    locked: list[bool] = []
    at_put(memory, pins_prefix(PREFIX), lambda: locked.append(volume.committer._lock.locked()))
    node.fork("f", source)
    assert locked == [True]


def test_a_source_that_another_host_took_is_fenced(
    node: Node, make_node: MakeNode, memory: CountingStore, source: str
) -> None:
    node.router.drain("v")
    other = make_node("b")
    wanted = AttachRequest(transport="nbd", take_over=True)
    at_put(memory, pins_prefix(PREFIX), lambda: void(other.router.attach("v", wanted)))
    with pytest.raises(Fenced):
        node.fork("f", source)
    assert node.router.table.get("v").is_fenced()
    assert pins(memory) == []
    with pytest.raises(UnknownExport):
        lease.read_root(memory, PREFIX, "f")


def test_a_snapshot_that_goes_while_it_is_tagged_is_no_source(
    node: Node, memory: CountingStore, source: str
) -> None:
    made = node.router.forks.snapshot("v", SnapshotRequest())["sequence"]
    at_put(memory, pins_prefix(PREFIX), lambda: memory.delete(snapshot_key(PREFIX, "v", made)))
    with pytest.raises(UnknownExport):
        node.router.forks.tag("v", TagRequest(tag="t", sequence=made))
    assert [info.key for info in memory.list(f"{PREFIX}/tags/")] == []


def test_a_name_that_another_host_has_is_refused(
    node: Node, make_node: MakeNode, memory: CountingStore, source: str
) -> None:
    make_node("b").create("f", MIB, wait=True)
    with pytest.raises(ExportExists, match="owned by node b"):
        node.fork("f", source)
    assert pins(memory) == []


def void(_: object) -> None:
    pass
