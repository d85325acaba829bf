"""Snapshots and tags: prefixes of what was acknowledged, kept until they are deleted."""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Callable

import pytest
from fork_rig import BLOCK, MIB, PREFIX, CountingStore, Node

from glidefs.errors import Fenced, GlideError, NotSupported, UnknownExport
from glidefs.exports.requests import AttachRequest, PromoteRequest, SnapshotRequest, TagRequest
from glidefs.names import snapshots_prefix
from glidefs.offline.export import export_image

MakeNode = Callable[..., Node]
WRITERS = 4


def snapshot(node: Node, name: str, tag: str | None = None) -> str:
    return str(node.router.forks.snapshot(name, SnapshotRequest(tag=tag))["source"])


def test_a_snapshot_stays_what_it_was(node: Node) -> None:
    data = os.urandom(MIB)
    node.create("v", 64 * MIB)
    node.core("v").pwrite(0, data)
    source = snapshot(node, "v", tag="golden")
    node.core("v").pwrite(0, bytes(MIB))
    node.router.drain("v")
    for number, kept in enumerate((source, "tag:golden")):
        node.fork(f"f{number}", kept)
        assert node.core(f"f{number}").pread(0, MIB) == data
    assert node.core("v").pread(0, MIB) == bytes(MIB)
    listed = node.router.forks.snapshots("v")
    assert [entry["source"] for entry in listed] == [source]
    assert listed[0]["size"] == 64 * MIB


def test_each_snapshot_under_load_is_a_prefix(node: Node) -> None:
    """Writers stamp increasing counters, each in its own slots; a snapshot has no gap in any of them."""
    slots, rounds = 64, 8
    node.create("v", 256 * MIB)
    core, stop = node.core("v"), threading.Event()
    acknowledged = [0] * WRITERS

    def write(writer: int) -> None:
        count = 0
        while not stop.is_set():
            count += 1
            at = (writer * slots + count % slots) * BLOCK
            core.pwrite(at, struct.pack("<Q", count) * 512)
            acknowledged[writer] = count

    threads = [threading.Thread(target=write, args=(i,)) for i in range(WRITERS)]
    for thread in threads:
        thread.start()
    kept: list[tuple[list[int], str]] = []
    for _ in range(rounds):
        before = list(acknowledged)
        kept.append((before, snapshot(node, "v")))
    stop.set()
    for thread in threads:
        thread.join()
    assert len({source for _, source in kept}) == rounds
    for number, (before, source) in enumerate(kept):
        node.fork(f"f{number}", source)
        for writer in range(WRITERS):
            found = []
            for slot in range(slots):
                block = node.core(f"f{number}").pread((writer * slots + slot) * BLOCK, 4096)
                assert block == block[:8] * 512
                found.append(struct.unpack("<Q", block[:8])[0])
            newest = max(found)
            assert newest >= before[writer]  # all that was acknowledged before the call
            want = {count % slots: count for count in range(max(1, newest - slots + 1), newest + 1)}
            assert {i: count for i, count in enumerate(found) if count} == want  # and nothing is missing


def test_sequences_go_up_even_if_the_volume_was_made_anew(node: Node) -> None:
    node.create("v", 64 * MIB)
    for _ in range(3):
        node.core("v").pwrite(0, os.urandom(4096))
        snapshot(node, "v")
    old = [entry["sequence"] for entry in node.router.forks.snapshots("v")]
    assert old == sorted(set(old))
    node.router.remove("v")
    node.create("v", 64 * MIB)
    snapshot(node, "v")
    new = [entry["sequence"] for entry in node.router.forks.snapshots("v")]
    assert new[:3] == old
    assert new[3] > old[2]


def test_a_lost_answer_makes_no_second_snapshot(node: Node, memory: CountingStore) -> None:
    node.create("v", 64 * MIB)
    node.router.drain("v")
    memory.lose_answers("put")
    source = snapshot(node, "v")
    assert [entry["source"] for entry in node.router.forks.snapshots("v")] == [source]


def test_delete_and_purge(node: Node, make_node: MakeNode, memory: CountingStore) -> None:
    node.create("v", 64 * MIB)
    first = snapshot(node, "v")
    node.core("v").pwrite(0, bytes(4096))
    snapshot(node, "v")
    sequence = int(first.rpartition("@")[2])
    node.router.forks.delete_snapshot("v", sequence)
    with pytest.raises(UnknownExport):
        node.router.forks.delete_snapshot("v", sequence)
    with pytest.raises(UnknownExport):
        node.fork("f", first)
    assert len(node.router.forks.snapshots("v")) == 1
    assert node.router.remove("v", purge=True)["removed"]
    assert not list(memory.list(snapshots_prefix(PREFIX, "v")))
    with pytest.raises(UnknownExport):
        node.router.remove("v", purge=True)


def test_a_snapshot_becomes_a_base_without_an_upload(node: Node, memory: CountingStore) -> None:
    data = os.urandom(MIB)
    node.create("v", 64 * MIB)
    node.core("v").pwrite(0, data)
    sequence = int(snapshot(node, "v").rpartition("@")[2])
    node.core("v").pwrite(0, bytes(MIB))
    packs = len(list(memory.list(f"{PREFIX}/packs/")))
    node.router.forks.make_base("v", PromoteRequest(base="golden", sequence=sequence))
    assert len(list(memory.list(f"{PREFIX}/packs/"))) == packs
    node.fork("f", "base:golden")
    assert node.core("f").pread(0, MIB) == data


def test_a_tag_can_be_moved(node: Node) -> None:
    node.create("v", 64 * MIB)
    node.core("v").pwrite(0, b"1" * 4096)
    node.router.forks.tag("v", TagRequest(tag="t"))
    node.core("v").pwrite(0, b"2" * 4096)
    node.router.forks.tag("v", TagRequest(tag="t"))
    node.fork("f", "tag:t")
    assert node.core("f").pread(0, 4096) == b"2" * 4096


def test_views_take_no_snapshots(node: Node) -> None:
    node.base("deb", b"x" * 4096)
    node.fork("view", "base:deb", read_only=True)
    with pytest.raises(NotSupported):
        snapshot(node, "view")
    with pytest.raises(GlideError):
        node.router.forks.snapshot("none", SnapshotRequest())


def test_a_snapshot_can_be_read_without_a_daemon(node: Node, memory: CountingStore) -> None:
    data = os.urandom(MIB)
    node.create("v", 2 * MIB)
    node.core("v").pwrite(4096, data)
    source = snapshot(node, "v")
    image = node.home / "image"
    export_image(memory, PREFIX, source, image)
    assert image.read_bytes() == bytes(4096) + data + bytes(MIB - 4096)


VERBS: dict[str, Callable[[Node], object]] = {
    "fork": lambda node: node.fork("f", "volume:v"),
    "snapshot": lambda node: node.router.forks.snapshot("v", SnapshotRequest()),
    "tag": lambda node: node.router.forks.tag("v", TagRequest(tag="t")),
    "base": lambda node: node.router.forks.make_base("v", PromoteRequest(base="b")),
}


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_who_lost_a_volume_makes_no_copies_of_its_old_root(
    make_node: MakeNode, memory: CountingStore, verb: str
) -> None:
    """With nothing to upload it did not know of the loss, and gc may have deleted what that root names."""
    node, other = make_node("a"), make_node("b")
    node.create("v", 64 * MIB, wait=True)
    node.core("v").pwrite(0, b"x" * BLOCK)
    node.router.drain("v")
    other.router.attach("v", AttachRequest(transport="nbd", take_over=True))
    with pytest.raises(Fenced):
        VERBS[verb](node)
    assert node.router.show("v").state == "fenced"
    assert [key for key in memory._objects if "/packs/" not in key] == [f"{PREFIX}/volumes/v/manifest"]
