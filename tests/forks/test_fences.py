"""A fence is final: it survives restarts and verbs, and is found where nothing is written."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
from fork_rig import MIB, PREFIX, CountingStore, Node, NoGuests, attach
from waiting import wait_for

from glidefs.errors import ExportExists, Fenced, GlideError, OwnedElsewhere, StoreError, UnknownExport
from glidefs.exports.requests import PromoteRequest, SnapshotRequest
from glidefs.handoff.coordinator import HandoffCoordinator
from glidefs.manifest import lease
from glidefs.names import manifest_key
from glidefs.transport.base import Attachment, Endpoint
from glidefs.transport.nbd.server import NbdServer
from glidefs.transport.vhost_user.transport import VhostUserTransport
from glidefs.volume.volume import Volume

MakeNode = Callable[..., Node]
SIZE = 16 * MIB
OLD, NEW = b"A" * 4096, b"B" * 4096


def record_on_disk(node: Node, name: str = "v") -> dict[str, object]:
    document = json.loads((node.home / "exports" / f"{name}.json").read_text())
    record = document["record"]
    assert isinstance(record, dict)
    return record


def segments(node: Node) -> list[Path]:
    return sorted((node.home / "logs").rglob("*.seg"))


def lose(make_node: MakeNode) -> tuple[Node, Node]:
    """``v`` of node a is taken over by node b, and a, which has data that nobody else has, knows."""
    node, other = make_node("a"), make_node("b")
    node.create("v", SIZE, wait=True)
    node.core("v").pwrite(0, OLD)
    node.router.drain("v", 20.0)
    attach(other, take_over=True)
    other.core("v").pwrite(0, NEW)
    other.router.drain("v", 20.0)
    node.core("v").pwrite(4096, b"unsent" * 100 + bytes(3496))
    with pytest.raises(Fenced):
        node.router.drain("v", 20.0)
    return node, other


def restart(node: Node, make_node: MakeNode) -> Node:
    node.close()
    again = make_node(node.home.name)
    again.router.start()
    assert again.router.wait_tried(20)
    return again


def check_fenced(node: Node) -> None:
    shown = node.router.show("v")
    assert (shown.state, shown.device) == ("fenced", shown.device)
    assert "b has" in shown.reason
    assert shown.fenced_at > 0
    assert record_on_disk(node)["fenced"]
    entry = node.router.table.get("v")
    assert not entry.serves()
    if entry.volume is not None:
        with pytest.raises(GlideError):
            entry.volume.core.pread(0, 4096)


class Kernel(NoGuests):
    """A driver whose devices outlive the daemon: ``left`` are those that are there."""

    kind = "ublk"

    def __init__(self, left: set[int]) -> None:
        super().__init__()
        self.left = left

    def start(self, export: Attachment) -> Endpoint:
        self.left.add(7)
        return Endpoint("/dev/ublkb7", 7)

    def discard(self, name: str, volume_id: bytes, device_id: int) -> None:
        self.left.discard(device_id)


@pytest.mark.parametrize("how", ["taken", "removed", "known"])
def test_guests_of_a_host_that_died_get_errors_when_it_comes_back_fenced(
    make_node: MakeNode, how: str
) -> None:
    """However it learns of it: the device of before is ended, so that nobody waits for it."""
    left: set[int] = set()

    def host(name: str) -> Node:
        made = make_node(name)
        transports: Any = made.router._transports
        transports["ublk"] = Kernel(left)
        return made

    node, other = host("a"), make_node("b")
    node.create("v", SIZE, wait=True)
    node.router.change_transport("v", "ublk")
    node.router.drain("v", 20.0)
    if how != "known":
        node.close()
    attach(other, take_over=True)
    if how == "removed":
        other.router.remove("v")
    elif how == "known":
        other.core("v").pwrite(0, NEW)
        other.router.drain("v", 20.0)
        node.core("v").pwrite(0, OLD)
        with pytest.raises(Fenced):
            node.router.drain("v", 20.0)
        assert left == {7}
        node.close()
    assert left == {7}
    again = host("a")
    again.router.start()
    assert again.router.wait_tried(20)
    assert again.router.show("v").state == "fenced"
    assert left == set()


def test_nothing_opens_the_log_of_a_fenced_record(make_node: MakeNode) -> None:
    """Whoever tries: a verb, a start, the successor of a handoff."""
    node, _ = lose(make_node)
    node = restart(node, make_node)
    record = node.router.table.get("v").record
    assert record is not None
    saved = lease.read_root(node.store.view("read", 1.0), PREFIX, "v")[0]
    for standby in (False, True):
        with pytest.raises(Fenced):
            node.host.open(record, saved, None, standby=standby)
    node.close()
    successor = make_node("a")
    with pytest.raises(Fenced):
        successor.router.start_standby(["v"])


@pytest.mark.parametrize("down", [False, True], ids=["store up", "store away"])
def test_a_restart_does_not_serve_a_fenced_log(
    make_node: MakeNode, memory: CountingStore, down: bool
) -> None:
    node, _ = lose(make_node)
    check_fenced(node)
    kept = segments(node)
    memory.set_down(down)
    again = restart(node, make_node)
    check_fenced(again)
    assert again.router.table.get("v").volume is None
    assert again.router._opener._retry(), "there is nothing to try again"
    check_fenced(again)
    assert segments(again) == kept


def test_a_fence_found_at_a_start_is_kept_too(make_node: MakeNode, memory: CountingStore) -> None:
    """The host did not know when it stopped; it asks the store, which is then away at the next start."""
    node, other = make_node("a"), make_node("b")
    node.create("v", SIZE, wait=True)
    node.close()
    attach(other, take_over=True)
    found = make_node("a")
    found.router.start()
    wait_for(lambda: found.router.show("v").state == "fenced", "the fence")
    memory.set_down(True)
    check_fenced(restart(found, make_node))


@pytest.mark.parametrize("restarted", [False, True], ids=["at once", "after a restart"])
def test_attach_takes_the_volume_anew_or_leaves_the_fence(
    make_node: MakeNode, memory: CountingStore, monkeypatch: pytest.MonkeyPatch, restarted: bool
) -> None:
    node, other = lose(make_node)
    if restarted:
        node = restart(node, make_node)
    old_log = node.router.show("v").log_id
    for _ in range(2):
        with pytest.raises(OwnedElsewhere):
            attach(node)
        check_fenced(node)
    memory.set_down(True)
    monkeypatch.setattr("glidefs.exports.router.VERB_PATIENCE", 0.2)
    with pytest.raises(StoreError):
        attach(node, take_over=True)
    monkeypatch.undo()
    check_fenced(node)
    memory.set_down(False)
    other.router.detach("v", 20.0)
    attach(node)
    shown = node.router.show("v")
    assert shown.state == "serving"
    assert shown.log_id != old_log
    assert node.core("v").pread(0, 8192) == NEW + bytes(4096), "the old log is not replayed"
    assert not record_on_disk(node)["fenced"]
    (kept,) = [entry for entry in node.router.logs.list() if entry["log_id"] == old_log]
    assert (kept["state"], kept["was"]) == ("set aside", "v")
    node = restart(node, make_node)
    assert node.core("v").pread(0, 8192) == NEW + bytes(4096)


@pytest.mark.parametrize("down", [False, True], ids=["store up", "store away"])
@pytest.mark.parametrize("restarted", [False, True], ids=["at once", "after a restart"])
def test_detach_forgets_a_fenced_export_and_keeps_its_log(
    make_node: MakeNode, memory: CountingStore, restarted: bool, down: bool
) -> None:
    node, other = lose(make_node)
    if restarted:
        node = restart(node, make_node)
    kept, log_id = segments(node), node.router.show("v").log_id
    node.transport.guests["v"] = "somebody"  # whose I/O fails anyhow
    memory.set_down(down)
    assert log_id in node.router.detach("v", 20.0)["note"]
    assert node.router.table.find("v") is None
    assert not (node.home / "exports" / "v.json").exists()
    assert segments(node) == kept
    memory.set_down(False)
    assert restart(node, make_node).router.table.find("v") is None
    assert lease.read_root(memory, PREFIX, "v")[0].owner_node == other.home.name


VERBS: dict[str, Callable[[Node], object]] = {
    "drain": lambda node: node.router.drain("v", 1.0),
    "resize": lambda node: node.router.resize("v", 2 * SIZE),
    "snapshot": lambda node: node.router.forks.snapshot("v", SnapshotRequest(timeout=1.0)),
    "promote": lambda node: node.router.forks.promote("v"),
    "create": lambda node: node.create("v", SIZE),
}


@pytest.mark.parametrize("verb", sorted(VERBS))
@pytest.mark.parametrize("restarted", [False, True], ids=["at once", "after a restart"])
def test_other_verbs_say_that_it_is_fenced(make_node: MakeNode, verb: str, restarted: bool) -> None:
    node, _ = lose(make_node)
    if restarted:
        node = restart(node, make_node)
    with pytest.raises((Fenced, ExportExists), match="fenced"):
        VERBS[verb](node)
    check_fenced(node)


def test_what_is_made_of_the_name_of_a_fenced_export_is_the_other_s(make_node: MakeNode) -> None:
    node, _ = lose(make_node)
    node = restart(node, make_node)
    node.fork("f", "volume:v")
    assert node.core("f").pread(0, 8192) == NEW + bytes(4096)
    node.router.forks.make_base("v", PromoteRequest(base="b"))
    node.fork("g", "base:b")
    assert node.core("g").pread(0, 4096) == NEW


def test_remove_of_a_fenced_export_leaves_the_store_alone(
    make_node: MakeNode, memory: CountingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    node, other = lose(make_node)
    kept = segments(node)
    memory.set_down(True)
    monkeypatch.setattr("glidefs.exports.leaving.PATIENCE", 0.2)
    with pytest.raises(StoreError):
        node.router.remove("v")
    check_fenced(node)
    memory.set_down(False)
    assert "another host has the volume" in node.router.remove("v")["note"]
    assert segments(node) == kept
    assert other.core("v").pread(0, 4096) == NEW
    assert lease.read_root(memory, PREFIX, "v")[0].owner_node == "b"


def test_an_interrupted_detach_of_a_fenced_export_needs_no_store(
    make_node: MakeNode, memory: CountingStore
) -> None:
    node, _ = lose(make_node)
    kept = segments(node)
    node.router._records.set_intent("v", "detach")
    memory.set_down(True)
    again = restart(node, make_node)
    assert again.router.table.find("v") is None
    assert segments(again) == kept


def test_a_fence_that_the_disk_does_not_take_is_written_later(
    make_node: MakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    node, other = make_node("a"), make_node("b")
    node.create("v", SIZE, wait=True)
    attach(other, take_over=True)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    with monkeypatch.context() as patch:
        patch.setattr("glidefs.formats.export_record.write_file_atomic", full)
        node.core("v").pwrite(0, OLD)
        with pytest.raises(Fenced):
            node.router.drain("v", 20.0)
        assert node.router.show("v").state == "fenced"
        assert not record_on_disk(node)["fenced"]
        assert node.router._opener._retry()
        assert not record_on_disk(node)["fenced"]
    assert node.router._opener._retry()
    check_fenced(node)


def test_a_verb_that_changes_the_record_does_not_undo_the_fence(
    make_node: MakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """! The fence comes from a thread that holds no lock of the verb."""
    node, other = make_node("a"), make_node("b")
    node.create("v", SIZE, wait=True)
    attach(other, take_over=True)
    resize = Volume.resize

    def fenced_meanwhile(volume: Volume, size: int) -> None:
        resize(volume, size)
        with pytest.raises(Fenced):
            node.router._lineage.confirm(volume)

    monkeypatch.setattr(Volume, "resize", fenced_meanwhile)
    node.router.resize("v", 2 * SIZE)
    check_fenced(node)
    assert record_on_disk(node)["size"] == 2 * SIZE


# -- volumes with nothing to upload ----------------------------------------------------------------


@pytest.mark.parametrize("read_only", [False, True], ids=["read-write", "read-only"])
@pytest.mark.parametrize("how", ["taken", "removed", "deleted"])
@pytest.mark.parametrize("count", [1, 20], ids=["one", "many"])
def test_an_idle_owner_learns_of_its_fence(
    make_node: MakeNode, memory: CountingStore, how: str, read_only: bool, count: int
) -> None:
    node, other = make_node("a", sync_interval=1.0), make_node("b")
    names = [f"v{number}" for number in range(count)]
    for name in names:
        node.create(name, SIZE, wait=True, read_only=read_only)
    if how == "deleted":
        memory.delete(manifest_key(PREFIX, "v0"))
    else:
        attach(other, "v0", take_over=True)
        if how == "removed":
            other.router.remove("v0")
    wait_for(lambda: node.router.show("v0").state == "fenced", "the fence", 15.0)
    assert [node.router.show(name).state for name in names[1:]] == ["serving"] * (count - 1)
    wait_for(lambda: record_on_disk(node, "v0")["fenced"], "the fence in the record")


def test_an_idle_volume_s_own_commits_are_no_fence(make_node: MakeNode) -> None:
    node = make_node("a", sync_interval=0.2)
    node.create("v", SIZE, wait=True)
    for number in range(5):
        node.core("v").pwrite(0, bytes([number]) * 4096)
        node.router.drain("v", 20.0)
        node.host.watch._period = 0.0
        node.host.watch.look()
    assert node.router.show("v").state == "serving"


def watched(node: Node, memory: CountingStore) -> tuple[int, int]:
    """(HEADs, LISTs) of one look at all volumes."""
    wait_for(lambda: all(volume.committer.confirmed for volume in node.host.volumes()), "a quiet host")
    before = memory.requests["head"], memory.requests["list"]
    node.host.watch._period = 0.0
    node.host.watch.look()
    return memory.requests["head"] - before[0], memory.requests["list"] - before[1]


def test_many_idle_volumes_cost_one_listing_and_few_one_request_each(
    make_node: MakeNode, memory: CountingStore
) -> None:
    node = make_node()
    for number in range(3):
        node.create(f"v{number}", SIZE, wait=True)
    node.create("unknown", SIZE)
    node.router.drain("unknown", 20.0)
    assert watched(node, memory) == (4, 0)
    for number in range(3, 16):
        node.create(f"v{number}", SIZE, wait=True)
    assert watched(node, memory) == (0, 1)


def test_a_prefix_that_is_mostly_of_others_is_not_listed_to_its_end(
    make_node: MakeNode, memory: CountingStore
) -> None:
    node = make_node()
    for number in range(10):
        node.create(f"v{number}", SIZE, wait=True)
    for number in range(2500):
        memory.put(manifest_key(PREFIX, f"other{number}"), b"x")
    assert watched(node, memory) == (10, 1)
    assert watched(node, memory) == (10, 0), "it is known to be long"


def test_a_handoff_asks_for_nothing(make_node: MakeNode, memory: CountingStore) -> None:
    node = make_node()
    node.create("v", SIZE, wait=True)
    node.host.pause(20.0)
    assert watched(node, memory) == (0, 0)
    node.host.resume()
    assert watched(node, memory) == (1, 0)


def test_a_handoff_does_not_move_what_was_fenced_meanwhile(make_node: MakeNode) -> None:
    """! The successor read the record before, and would serve the volume."""
    node, _ = lose(make_node)
    entry = node.router.table.get("v")
    coordinator = HandoffCoordinator(
        node.router, node.host, node.engine, cast(NbdServer, None), cast(VhostUserTransport, None), [entry]
    )
    with pytest.raises(GlideError, match="v was fenced meanwhile"):
        coordinator.snapshot()


# -- removed and put back --------------------------------------------------------------------------


def test_a_removed_volume_can_be_undeleted(make_node: MakeNode) -> None:
    node, other = make_node("a"), make_node("b")
    node.create("v", SIZE, wait=True)
    node.core("v").pwrite(0, OLD)
    node.router.drain("v", 20.0)
    answer = node.router.remove("v")
    assert "glidefs undelete v" in answer["note"]
    assert answer["restorable_until"] > 0
    with pytest.raises(UnknownExport, match="was removed"):
        attach(node)
    assert other.router.undelete("v")["size"] == SIZE
    with pytest.raises(ExportExists, match="was not removed"):
        node.router.undelete("v")
    attach(other)
    assert other.core("v").pread(0, 4096) == OLD
    with pytest.raises(ExportExists):
        other.router.undelete("v")


def test_what_is_removed_for_good_cannot_be_undeleted(node: Node) -> None:
    node.create("v", SIZE, wait=True)
    assert "undelete" not in node.router.remove("v", now=True)["note"]
    with pytest.raises(UnknownExport):
        node.router.undelete("v")


def test_a_create_takes_the_name_of_a_removed_volume_for_good(node: Node) -> None:
    node.create("v", SIZE, wait=True)
    node.router.remove("v")
    node.create("v", SIZE, wait=True)
    node.router.detach("v", 20.0)
    with pytest.raises(ExportExists, match="was not removed"):
        node.router.undelete("v")
