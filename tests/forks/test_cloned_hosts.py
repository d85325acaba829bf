"""A copy of a host has its ids and its logs: what it may take from the other, and what not."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest
from fork_rig import MIB, PREFIX, CountingStore, Node, attach
from waiting import wait_for

from glidefs.errors import Fenced, GlideError, InUse, OwnedElsewhere
from glidefs.manifest import lease

MakeNode = Callable[..., Node]
SIZE = 16 * MIB
OLD, NEW = b"A" * 4096, b"B" * 4096


def twins(make_node: MakeNode) -> tuple[Node, Node]:
    """Two hosts that were one; the first has committed since, the second does not know."""
    node = make_node("a")
    node.create("v", SIZE, wait=True)
    node.core("v").pwrite(0, OLD)
    node.router.drain("v", 20.0)
    node.close()
    shutil.copytree(node.home, node.home.parent / "copy" / "a")
    one, two = make_node("a"), make_node("copy/a")
    for each in (two, one):
        each.router.start()
        assert each.router.wait_tried(20)
        wait_for(lambda each=each: all(v.committer.confirmed for v in each.host.volumes()), "it is compared")
    one.core("v").pwrite(0, NEW)
    one.router.drain("v", 20.0)
    return one, two


def lives(node: Node) -> bool:
    node.core("v").pwrite(4096, OLD)
    node.router.drain("v", 20.0)
    return node.core("v").pread(0, 8192) == NEW + OLD


@pytest.mark.parametrize("note", ["whole", "damaged"])
def test_a_fence_outlives_the_loss_of_its_record(make_node: MakeNode, note: str) -> None:
    """! An export whose record is lost is made again from its log, where the root names that."""
    one, two = twins(make_node)
    two.core("v").pwrite(0, OLD)
    with pytest.raises(Fenced):
        two.router.drain("v", 20.0)
    two.close()
    (two.home / "exports" / "v.json").write_bytes(b"damaged")
    if note == "damaged":
        (path,) = (two.home / "logs").rglob("aside.json")
        path.write_bytes(b"damaged")
    again = make_node("copy/a")
    again.router.start()
    assert again.router.wait_tried(20)
    with pytest.raises(GlideError):
        attach(again)
    assert not again.router.table.get("v").serves()
    assert lives(one)


def test_a_copy_of_a_host_takes_nothing_from_the_other_but_by_take_over(make_node: MakeNode) -> None:
    """! The root in the store names the host and the log of both."""
    one, two = twins(make_node)
    two.core("v").pwrite(8192, OLD)
    with pytest.raises(Fenced, match="cloned"):
        two.router.drain("v", 20.0)
    with pytest.raises(OwnedElsewhere, match="its log is not here"):
        attach(two)
    assert two.router.show("v").state == "fenced"
    two.router.detach("v")
    with pytest.raises(OwnedElsewhere, match="its log is not here"):
        attach(two)
    with pytest.raises(OwnedElsewhere, match="its log is not here"):
        two.router.remove("v")
    assert lives(one)
    attach(two, take_over=True)
    assert two.core("v").pread(0, 8192) == NEW + OLD


@pytest.mark.parametrize("known", [False, True], ids=["not known", "known"])
@pytest.mark.parametrize("verb", ["remove", "detach", "detach --force"])
def test_a_copy_of_a_host_leaves_and_the_volume_stays(make_node: MakeNode, verb: str, known: bool) -> None:
    one, two = twins(make_node)
    if known:
        volume = two.router.table.get("v").volume
        assert volume is not None
        with pytest.raises(Fenced):
            two.router._lineage.confirm(volume)
    answer = two.router.remove("v") if verb == "remove" else two.router.detach("v", force="force" in verb)
    assert "set aside" in answer["note"]
    assert two.router.table.find("v") is None
    assert lives(one)


def test_a_copy_of_a_host_that_could_not_open_the_volume_does_not_free_it(
    make_node: MakeNode, memory: CountingStore
) -> None:
    """! A forced detach gives up what this host had, by the log that both name."""
    one, two = twins(make_node)
    entry = two.router.table.get("v")
    with entry.lock:
        two.router._opener.close_entry(entry, remove_device=False)
        entry.failed(GlideError("no such luck"))
    two.router.detach("v", force=True)
    assert lease.read_root(memory, PREFIX, "v")[0].owner_node == "a"
    assert lives(one)


def not_open(node: Node) -> None:
    """``v`` is listed, and could not be opened."""
    entry = node.router.table.get("v")
    with entry.lock:
        node.router._opener.close_entry(entry, remove_device=False)
        entry.failed(GlideError("no such luck"))


def test_a_copy_of_a_host_that_could_not_open_the_volume_does_not_remove_it(
    make_node: MakeNode, memory: CountingStore
) -> None:
    """! Its record and the root in the store name one log."""
    one, two = twins(make_node)
    not_open(two)
    answer = two.router.remove("v")
    assert "left alone" in answer["note"]
    assert not lease.read_root(memory, PREFIX, "v")[0].removed_at
    assert lives(one)


@pytest.mark.parametrize(("verb", "root"), [("remove", "here"), ("remove", "lost"), ("attach", "here")])
def test_a_copy_of_a_host_without_a_record_has_no_part_in_the_volume(
    make_node: MakeNode, memory: CountingStore, verb: str, root: str
) -> None:
    """! It has the id that the root names as its owner, and the log.

    Without a local root nothing tells it from the host itself: then an attach goes on, for the unsent writes.
    """
    one, two = twins(make_node)
    for _ in range(4):  # segments beyond the one that the root in the store names
        two.core("v").pwrite(8192, OLD)
        two.core("v").seal()
    two.close()
    (two.home / "exports" / "v.json").unlink()
    if root == "lost":
        for path in (two.home / "state" / "volumes").glob("*/*"):
            if path.is_file():
                path.unlink()
    again = make_node("copy/a")
    again.router.start()
    assert again.router.wait_tried(20)
    with pytest.raises((OwnedElsewhere, InUse), match=r"not by a root from here|its log is not here|is lost"):
        again.router.remove("v") if verb == "remove" else attach(again)
    assert not lease.read_root(memory, PREFIX, "v")[0].removed_at
    assert lives(one)


def test_a_volume_that_is_not_open_is_removed_by_its_host(make_node: MakeNode, memory: CountingStore) -> None:
    """Also where the answer to its last commit was lost: the nonce is one that was tried."""
    node = make_node("a")
    node.create("v", SIZE, wait=True)
    node.core("v").pwrite(0, OLD)
    node.router.drain("v", 20.0)
    not_open(node)
    assert not node.router.remove("v")["note"].startswith("the store's volume")
    assert lease.read_root(memory, PREFIX, "v")[0].removed_at
