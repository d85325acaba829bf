"""What detach, remove and the deletion of logs refuse, and what forcing them costs."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fork_rig import MIB, PREFIX, CountingStore, Node

from glidefs.errors import GlideError, InUse, UnknownExport
from glidefs.exports.requests import AttachRequest
from glidefs.manifest import lease

MakeNode = Callable[..., Node]
SIZE = 16 * MIB
SENT, UNSENT = b"A" * 4096, b"B" * 8192

Verb = Callable[..., dict[str, Any]]


def verbs(node: Node) -> list[Verb]:
    return [node.router.detach, node.router.remove]


def segments(node: Node) -> list[Path]:
    return sorted((node.home / "logs").rglob("*.seg"))


def served(node: Node) -> Node:
    """``v`` has bytes that the store has, and bytes that it has not."""
    node.create("v", SIZE, wait=True)
    node.core("v").pwrite(0, SENT)
    node.router.drain("v", 20.0)
    node.core("v").pwrite(4096, UNSENT)
    return node


def with_damaged_record(node: Node, make_node: MakeNode, *, sent: bool = False) -> Node:
    if sent:
        node.router.drain("v", 20.0)
    node.close()
    path = node.home / "exports" / "v.json"
    data = bytearray(path.read_bytes())
    data[40] ^= 1
    path.write_bytes(data)
    again = make_node(node.home.name)
    again.router.start()
    assert again.router.wait_tried(20)
    return again


def only_log(node: Node) -> tuple[str, str]:
    (entry,) = node.router.logs.list()
    return entry["volume_id"], entry["log_id"]


@pytest.mark.parametrize("verb", [0, 1], ids=["detach", "remove"])
def test_an_export_that_is_in_use_stays(node: Node, memory: CountingStore, verb: int) -> None:
    served(node)
    node.transport.guests["v"] = "/dev/ublkb3 is open (pid 812 qemu)"
    with pytest.raises(InUse, match=r"v: /dev/ublkb3 is open \(pid 812 qemu\); .*--force"):
        verbs(node)[verb]("v")
    assert node.router.show("v").state == "serving"
    assert node.core("v").pread(4096, 8192) == UNSENT
    assert "pid 812 qemu" in verbs(node)[verb]("v", force=True)["note"]
    assert node.router.table.find("v") is None
    assert not lease.read_root(memory, PREFIX, "v")[0].owner_node


def test_a_guest_that_comes_while_a_detach_uploads_is_not_cut_off(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    served(node)
    entry = node.router.table.get("v")
    drain = type(entry).drain

    def guest_comes(self: object, timeout: float | None) -> None:
        drain(entry, timeout)
        node.transport.guests["v"] = "somebody is there"

    monkeypatch.setattr(type(entry), "drain", guest_comes)
    with pytest.raises(InUse, match="somebody is there"):
        node.router.detach("v", 20.0)
    assert node.router.show("v").state == "serving"


def test_what_could_not_be_opened_is_not_forgotten_by_accident(
    make_node: MakeNode, memory: CountingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """! Its log holds what nobody else has."""
    served(make_node()).close()

    def broken(*_: object, **__: object) -> None:
        raise GlideError("no such luck")

    node = make_node()
    monkeypatch.setattr(node.host, "open", broken)
    node.router.start()
    assert node.router.wait_tried(20)
    with pytest.raises(InUse, match=r"no such luck.* 8192 bytes of its log are not in the store"):
        node.router.detach("v", 1.0)
    assert node.router.show("v").state == "failed"
    before = segments(node)
    note = node.router.detach("v", force=True)["note"]
    assert "8192 bytes" in note
    assert "set aside" in note
    assert segments(node) == before
    assert not lease.read_root(memory, PREFIX, "v")[0].owner_node
    monkeypatch.undo()
    make_node("b").router.attach("v", AttachRequest(transport="nbd"))


def test_a_forced_detach_needs_no_store(
    make_node: MakeNode, memory: CountingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = served(make_node())
    before = segments(node)
    memory.set_down(True)
    monkeypatch.setattr("glidefs.exports.leaving.STORE_PATIENCE", 0.2)
    with pytest.raises(GlideError):
        node.router.detach("v", 0.2)
    assert node.router.show("v").state == "serving"
    note = node.router.detach("v", 0.2, force=True)["note"]
    assert "8192 bytes" in note
    assert "--take-over" in note
    assert node.router.table.find("v") is None
    assert segments(node) == before
    memory.set_down(False)
    make_node("b").router.attach("v", AttachRequest(transport="nbd", take_over=True))
    volume, log = only_log(node)
    image = node.home / "image"
    assert node.router.logs.export(volume, log, str(image))["bytes"] >= 8192
    assert image.read_bytes()[4096:12288] == UNSENT


def test_a_forced_detach_does_not_wait_for_the_packs_of_others(
    make_node: MakeNode, memory: CountingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the store away every thread that puts packs waits for it; those of other volumes for ever."""
    node = make_node("a", put_threads=1)
    names = [f"v{i}" for i in range(3)]
    for name in names:
        node.create(name, SIZE, wait=True)
    memory.set_down(True)
    monkeypatch.setattr("glidefs.exports.leaving.STORE_PATIENCE", 0.2)
    for name in names:
        node.core(name).pwrite(4096, UNSENT)
        with pytest.raises(GlideError):
            node.router.drain(name, 0.2)
    until = time.monotonic() + 20
    for name in reversed(names):  # those whose packs are queued first
        assert "8192 bytes" in node.router.detach(name, 0.2, force=True)["note"]
    assert time.monotonic() < until


@pytest.mark.parametrize("verb", [0, 1], ids=["detach", "remove"])
def test_a_damaged_record_is_deleted_by_force_only_and_its_log_stays(make_node: MakeNode, verb: int) -> None:
    node = with_damaged_record(served(make_node()), make_node)
    before = segments(node)
    with pytest.raises(InUse, match="damaged"):
        verbs(node)[verb]("v")
    assert (node.home / "exports" / "v.json").exists()
    verbs(node)[verb]("v", force=True)
    assert not (node.home / "exports" / "v.json").exists()
    assert segments(node) == before


@pytest.mark.parametrize("sent", [False, True], ids=["unsent", "sent"])
def test_a_log_that_may_be_that_of_a_damaged_record_stays(make_node: MakeNode, sent: bool) -> None:
    """! It is dirty, and nothing names it any more."""
    node = with_damaged_record(served(make_node()), make_node, sent=sent)
    before = segments(node)
    with pytest.raises(InUse, match=r"record is damaged \(v\)"):
        node.router.logs.delete(*only_log(node))
    assert segments(node) == before
    note = node.router.logs.delete(*only_log(node), force=True)["note"]
    assert "damaged" in note
    assert not segments(node)


def test_the_log_of_a_served_export_stays_even_if_its_record_rots(node: Node) -> None:
    served(node)
    path = node.home / "exports" / "v.json"
    path.write_bytes(path.read_bytes()[:-20])
    for force in (False, True):
        with pytest.raises(GlideError, match="is served here"):
            node.router.logs.delete(*only_log(node), force=force)
    assert segments(node)


def fenced(make_node: MakeNode, *, dirty: bool) -> Node:
    node, other = served(make_node()), make_node("b")
    node.router.drain("v", 20.0)
    other.router.attach("v", AttachRequest(transport="nbd", take_over=True))
    if dirty:
        node.core("v").pwrite(0, UNSENT)
    entry = node.router.table.get("v")
    assert entry.volume is not None
    with pytest.raises(GlideError):
        node.router._lineage.confirm(entry.volume)
    return node


def test_a_log_with_unsent_bytes_is_deleted_by_force_only(make_node: MakeNode) -> None:
    node = fenced(make_node, dirty=True)
    for force in (False, True):
        with pytest.raises(GlideError, match="detach v first"):
            node.router.logs.delete(*only_log(node), force=force)
    node.router.detach("v")
    with pytest.raises(InUse, match="the store does not have 8192 bytes"):
        node.router.logs.delete(*only_log(node))
    assert "8192 bytes" in node.router.logs.delete(*only_log(node), force=True)["note"]
    with pytest.raises(UnknownExport):
        node.router.logs.export("0" * 32, "1" * 32, "/x")
    assert not segments(node)


def test_a_log_that_the_store_has_is_deleted_without_a_word(make_node: MakeNode) -> None:
    node = fenced(make_node, dirty=False)
    node.router.detach("v")
    assert segments(node), "a committed segment is a cache, and still there"
    assert not node.router.logs.delete(*only_log(node))["note"]
    assert not segments(node)


@pytest.mark.parametrize("how", ["absent", "damaged"])
def test_without_a_note_beside_a_log_all_of_it_counts(make_node: MakeNode, how: str) -> None:
    node = fenced(make_node, dirty=False)
    node.router.detach("v")
    (note,) = (node.home / "logs").rglob("aside.json")
    if how == "absent":
        note.unlink()
    else:
        note.write_bytes(note.read_bytes().replace(b'"sent":', b'"sent":9'))
    with pytest.raises(InUse, match="the store does not have"):
        node.router.logs.delete(*only_log(node))


def test_a_damaged_log_is_deleted_by_force_only(make_node: MakeNode) -> None:
    node = fenced(make_node, dirty=True)
    node.router.detach("v")
    for path in segments(node):
        path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(InUse, match="its content is not known"):
        node.router.logs.delete(*only_log(node))
    assert node.router.logs.delete(*only_log(node), force=True)["deleted"]
