"""Verbs whose answer is lost, and starts after a disk failed: what became of it is found out first."""

from __future__ import annotations

import errno
import shutil
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from fork_rig import MIB, PREFIX, CountingStore, Node
from stored_roots import put_root
from waiting import wait_for

import glidefs.exports.leaving
import glidefs.exports.opener
import glidefs.exports.router
import glidefs.exports.table
import glidefs.writing.upload
from glidefs.core.check import CoreError
from glidefs.core.testing import DiskKind, disk_inject
from glidefs.errors import (
    AccessDenied,
    PreconditionFailed,
    StoreError,
    StoreUnavailable,
    StoreWentBack,
    UnknownExport,
)
from glidefs.exports.requests import AttachRequest
from glidefs.exports.table import RecordDirectory
from glidefs.formats.manifest import Root, decode_root
from glidefs.manifest import lease, local
from glidefs.names import manifest_key
from glidefs.store.base import join_body
from glidefs.volume.volume import DrainTimeout

MakeNode = Callable[..., Node]
SIZE = 256 * MIB


def root_of(node: Node, name: str) -> Root:
    return lease.read_root(node.store, PREFIX, name)[0]


def lose_answer(
    memory: CountingStore, monkeypatch: pytest.MonkeyPatch, which: Callable[[Root], bool]
) -> None:
    """The put of this root is applied; nobody hears of it, and the store is away from then on."""
    put = memory.put

    def then_down(key: str, data: Any, **conditions: Any) -> str:
        etag = put(key, data, **conditions)
        if key.endswith("/manifest") and which(decode_root(key, join_body(data))):
            memory.set_down(True)
            monkeypatch.setattr(memory, "put", put)
            raise StoreUnavailable("no answer", key=key, op="put")
        return etag

    monkeypatch.setattr(memory, "put", then_down)


def stay_on_the_way(
    memory: CountingStore, monkeypatch: pytest.MonkeyPatch, which: Callable[[Root], bool]
) -> list[Callable[[], str]]:
    """Puts of ``which`` roots fail, and are still to come: call one."""
    put, late = memory.put, list[Callable[[], str]]()

    def refuse(key: str, data: Any, **conditions: Any) -> str:
        if key.endswith("/manifest") and which(decode_root(key, join_body(data))):
            late.append(lambda: put(key, data, **conditions))
            raise AccessDenied("refused", key=key, op="put")
        return put(key, data, **conditions)

    monkeypatch.setattr(memory, "put", refuse)
    return late


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "no space")


def no_small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the nonce of a root nor its local copy can be written."""
    for where in ("local.save_tried", "local.save"):
        monkeypatch.setattr(f"glidefs.manifest.{where}", full)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(glidefs.exports.router, "VERB_PATIENCE", 0.4)
    monkeypatch.setattr(glidefs.exports.leaving, "PATIENCE", 0.4)
    monkeypatch.setattr(glidefs.exports.opener, "STORE_PATIENCE", 0.2)


def test_a_fork_that_was_put_in_time_is_served_though_its_answer_was_lost(
    make_node: MakeNode, memory: CountingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """! Its data would be set aside for nothing."""
    node = make_node(grace=3600.0)
    node.base("deb", b"d" * 4096)
    node.bases.get(PREFIX, "deb")
    lose_answer(memory, monkeypatch, lambda root: root.name == "fork")
    node.fork("fork", "base:deb")
    node.core("fork").pwrite(4096, b"w" * 4096)
    wait_for(lambda: memory._down, "the put")
    later = SimpleNamespace(time=lambda: time.time() + 1000.0, monotonic=time.monotonic, sleep=time.sleep)
    monkeypatch.setattr(glidefs.writing.upload, "time", later)
    memory.set_down(False)
    node.router.drain("fork", 20.0)
    assert node.router.show("fork").state == "serving"
    assert root_of(node, "fork").sequence > 0


def test_a_fork_takes_the_name_of_one_whose_removal_was_interrupted(
    node: Node, memory: CountingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """! It was served before its root was put; a fence would lose what guests wrote."""
    node.base("deb", b"d" * 4096)
    node.create("v", SIZE, wait=True)
    memory.fail_next("delete", AccessDenied())
    with pytest.raises(AccessDenied):
        node.router.remove("v", now=True)
    assert root_of(node, "v").removed_at
    assert node.router.table.find("v") is None  # what is given up is not served again
    node.fork("v", "base:deb")
    node.core("v").pwrite(4096, b"w" * 4096)
    volume = node.router.table.get("v").volume
    assert volume is not None
    wait_for(lambda: "is being removed" in volume.last_error, "the refusal")
    with pytest.raises(DrainTimeout, match="is being removed"):
        node.router.drain("v", 0.5)  # by a host that may be slow
    monkeypatch.setattr(lease, "DOOMED_FOR", 0.0)
    node.router.drain("v", 20.0)
    assert root_of(node, "v").owner_node == node.home.name


@pytest.mark.usefixtures("impatient")
def test_a_detach_whose_answer_was_lost_is_not_served_again(
    node: Node, memory: CountingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """! What guests wrote to it would be lost. Once the store says what became of it, the detach is over."""
    node.create("v", SIZE)
    node.core("v").pwrite(0, b"a" * 4096)
    lose_answer(memory, monkeypatch, lambda root: not root.owner_node)
    with pytest.raises(StoreError):
        node.router.detach("v", 20.0)
    assert node.router.show("v").state == "failed"
    assert node.router.table.get("v").volume is None
    monkeypatch.undo()
    memory.set_down(False)
    assert node.router._opener._retry()
    assert node.router.table.find("v") is None
    node.router.attach("v", AttachRequest(transport="nbd"))
    assert node.core("v").pread(0, 4096) == b"a" * 4096


@pytest.mark.usefixtures("impatient")
def test_a_detach_that_the_store_did_not_take_is_undone(
    node: Node, memory: CountingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.create("v", SIZE)
    node.core("v").pwrite(0, b"a" * 4096)
    node.router.drain("v", 20.0)
    memory.set_down(True)
    with pytest.raises(StoreError):
        node.router.detach("v", 20.0)
    assert node.router.show("v").state == "failed"
    memory.set_down(False)
    assert node.router._opener._retry()
    assert node.router.show("v").state == "serving"
    node.core("v").pwrite(0, b"b" * 4096)
    node.router.drain("v", 20.0)
    assert root_of(node, "v").owner_node == node.home.name


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("verb", ["detach", "remove"])
def test_a_late_put_of_a_verb_that_failed_is_refused(
    node: Node, memory: CountingStore, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    """! The request was still on its way when the volume was served again: guests write to it since."""
    node.create("v", SIZE)
    node.core("v").pwrite(0, b"a" * 4096)
    node.router.drain("v", 20.0)
    late = stay_on_the_way(memory, monkeypatch, lambda root: not root.owner_node)
    with pytest.raises(StoreError):
        getattr(node.router, verb)("v")
    assert node.router.show("v").state == "serving"
    node.core("v").pwrite(0, b"b" * 4096)
    with pytest.raises(PreconditionFailed):
        late[0]()
    node.router.drain("v", 20.0)
    assert root_of(node, "v").owner_node == node.home.name


@pytest.mark.usefixtures("impatient")
def test_a_detach_puts_nothing_over_a_store_that_went_back(
    node: Node, memory: CountingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """! By one commit: its root has a nonce that was put here."""
    node.create("v", SIZE)
    key = manifest_key(PREFIX, "v")
    node.core("v").pwrite(0, b"a" * 4096)
    node.router.drain("v", 20.0)
    older = memory.get(key).data
    node.core("v").pwrite(0, b"b" * 4096)
    node.router.drain("v", 20.0)
    memory.put(key, older)
    with pytest.raises(StoreWentBack):
        node.router.detach("v", 20.0)
    assert memory.get(key).data == older
    assert not node.router.table.get("v").is_fenced()
    assert node.core("v").pread(0, 4096) == b"b" * 4096


@pytest.mark.usefixtures("impatient")
def test_a_full_disk_after_a_failed_detach_is_waited_for(
    node: Node, memory: CountingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.create("v", SIZE)
    node.core("v").pwrite(0, b"a" * 4096)
    node.router.drain("v", 20.0)
    memory.fail_next("put", *[AccessDenied("refused", key="k", op="put")])

    monkeypatch.setattr(local, "save_tried", full)
    with pytest.raises(StoreError):
        node.router.detach("v", 20.0)
    assert node.router.show("v").state == "failed"
    monkeypatch.undo()
    assert node.router._opener._retry()
    assert node.router.show("v").state == "serving"
    assert node.core("v").pread(0, 4096) == b"a" * 4096


def test_after_a_failed_sync_the_store_is_asked_for_the_root(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """! The upload sent what the page cache had. The platter may have less, and the local root be older."""
    node.create("v", SIZE)
    core = node.core("v")
    core.pwrite(0, b"a" * 4096)
    node.router.drain("v", 20.0)
    entry = node.router.table.get("v")
    assert entry.volume is not None
    monkeypatch.setattr(node.host._retirer, "run", lambda volume: None)  # it would go with the next commit
    volume_id, log_dir = entry.volume.id, entry.volume.log_dir
    copy = node.home / "state" / "volumes" / volume_id.hex() / "root"
    older = copy.read_bytes()
    core.pwrite(0, b"b" * 4096)
    disk_inject(DiskKind.SYNC_BEGIN, errno.EIO, count=100)
    with pytest.raises(CoreError):
        core.flush()
    disk_inject(DiskKind.SYNC_BEGIN, 0, count=0)
    node.router.drain("v", 20.0)
    with entry.lock:
        node.router._opener.close_entry(entry, remove_device=False)
        copy.write_bytes(older)
        (mark,) = log_dir.glob("*.syncfail")
        segment = mark.with_suffix(".seg")
        written = segment.read_bytes()
        segment.write_bytes(written.replace(b"b" * 4096, bytes(4096)))
        assert segment.read_bytes() != written
        node.router._opener.reopen(entry)
        assert entry.serves(), entry.reason
    node.engine.cache.evict_all()
    assert node.core("v").pread(0, 4096) == b"b" * 4096
    node.core("v").flush()


def test_a_late_put_of_what_a_failed_sync_lost_is_refused(
    node: Node, memory: CountingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """! It would bring back, under guests that saw it gone, what the log lost with the power."""
    node.create("v", SIZE)
    core = node.core("v")
    core.pwrite(0, b"a" * 4096)
    node.router.drain("v", 20.0)
    core.pwrite(0, b"b" * 4096)
    late = stay_on_the_way(memory, monkeypatch, lambda root: True)
    disk_inject(DiskKind.SYNC_BEGIN, errno.EIO, count=100)
    with pytest.raises(CoreError):
        core.flush()
    disk_inject(DiskKind.SYNC_BEGIN, 0, count=0)
    with pytest.raises(DrainTimeout):
        node.router.drain("v", 0.5)
    entry = node.router.table.get("v")
    with entry.lock:
        assert entry.volume is not None
        log_dir = entry.volume.log_dir
        node.router._opener.close_entry(entry, remove_device=False)
        monkeypatch.undo()
        (mark,) = log_dir.glob("*.syncfail")
        mark.with_suffix(".seg").unlink()
        node.router._opener.reopen(entry)
        assert entry.serves(), entry.reason
    assert node.core("v").pread(0, 4096) == b"a" * 4096
    with pytest.raises(PreconditionFailed):
        late[0]()
    node.core("v").pwrite(0, b"c" * 4096)
    node.router.drain("v", 20.0)
    node.engine.cache.evict_all()
    assert node.core("v").pread(0, 4096) == b"c" * 4096


def test_a_volume_that_had_another_owner_can_be_removed_once(make_node: MakeNode) -> None:
    """Its tombstone stays for gc, and is nothing that anybody has."""
    node, other = make_node("a"), make_node("b")
    node.create("v", SIZE, wait=True)
    other.router.attach("v", AttachRequest(transport="nbd", take_over=True))
    assert other.router.remove("v")["removed"]
    assert root_of(other, "v").removed_at
    with pytest.raises(UnknownExport, match="neither this host nor the store"):
        other.router.remove("v")
    with pytest.raises(UnknownExport, match="it was removed"):
        other.router.attach("v", AttachRequest(transport="nbd"))
    other.create("v", SIZE)
    assert not root_of(other, "v").removed_at


def test_an_export_that_the_disk_kept_from_being_opened_is_tried_again(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.create("v", SIZE)
    node.core("v").pwrite(0, b"a" * 4096)
    node.router.drain("v", 20.0)
    entry = node.router.table.get("v")
    assert entry.volume is not None
    state = node.home / "state" / "volumes" / entry.volume.id.hex()
    with entry.lock:
        node.router._opener.close_entry(entry, remove_device=False)
        shutil.rmtree(state)
        monkeypatch.setattr("glidefs.manifest.local.write_file_atomic", full)
        node.router._opener.reopen(entry)
    assert entry.state == "failed"
    monkeypatch.undo()
    assert node.router._opener._retry()
    assert node.core("v").pread(0, 4096) == b"a" * 4096


def test_a_commit_whose_local_copy_is_lost_is_found_after_the_start(
    make_node: MakeNode, memory: CountingStore
) -> None:
    """! With nothing to upload the old root would be in use for good, and gc deletes what only that names."""
    node = make_node()
    node.create("v", SIZE, wait=True)
    node.core("v").pwrite(0, b"v" * 4096)
    node.router.drain("v")
    node.close()
    key = manifest_key(PREFIX, "v")
    root = root_of(node, "v")
    newer = lease.next_root(root)
    local.save_tried(node.home / "state", root.volume_id, [newer.nonce])
    put_root(memory, key, newer)
    memory.set_down(True)
    again = make_node()
    again.router.start()
    assert again.router.wait_tried(20)
    volume = again.router.table.get("v").volume
    assert volume is not None
    assert volume.root.sequence == root.sequence
    memory.set_down(False)
    wait_for(lambda: volume.root.sequence == newer.sequence, "the root that the store has")


def test_what_was_put_while_no_small_file_could_be_written_is_told_by_the_log(
    make_node: MakeNode, memory: CountingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """! Nor was it kept that the store has the first root: it is put again, and there is a later one."""
    node = make_node()
    memory.set_down(True)
    node.create("v", SIZE)
    no_small_files(monkeypatch)
    monkeypatch.setattr(RecordDirectory, "save", full)
    memory.set_down(False)
    for data in (b"a", b"b"):
        node.core("v").pwrite(0, data * 4096)
        node.router.drain("v", 20.0)
    assert root_of(node, "v").sequence >= 2
    node.close()
    monkeypatch.undo()
    again = make_node()
    again.router.start()
    assert again.router.wait_tried(20)
    again.core("v").pwrite(4096, b"c" * 4096)
    again.router.drain("v", 20.0)
    assert not again.router.table.get("v").is_fenced()
    again.engine.cache.evict_all()
    assert again.core("v").pread(0, 8192) == b"b" * 4096 + b"c" * 4096


@pytest.mark.parametrize("verb", ["remove", "attach"])
def test_a_closed_volume_knows_what_was_put_while_no_nonce_could_be_kept(
    node: Node, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    """! It would be another host's: neither removed in the store, nor to be had again without a take-over."""
    node.create("v", SIZE, wait=True)
    no_small_files(monkeypatch)
    node.core("v").pwrite(0, b"a" * 4096)
    node.router.drain("v", 20.0)
    entry = node.router.table.get("v")
    with entry.lock:
        node.router._opener.close_entry(entry, remove_device=False)
    monkeypatch.undo()
    if verb == "remove":
        assert node.router.remove("v")["removed"]
        assert root_of(node, "v").removed_at
        return
    entry.delete_record(node.router._records)
    node.router.table.drop(entry)
    node.router.attach("v", AttachRequest(transport="nbd"))
    assert node.core("v").pread(0, 4096) == b"a" * 4096


def test_a_clean_volume_that_was_taken_over_is_fenced_after_a_start(
    make_node: MakeNode, memory: CountingStore
) -> None:
    node = make_node()
    node.create("v", SIZE, wait=True)
    node.close()
    make_node("b").router.attach("v", AttachRequest(transport="nbd", take_over=True))
    again = make_node()
    again.router.start()
    assert again.router.wait_tried(20)
    entry = again.router.table.get("v")
    assert entry.is_fenced(), "the store is asked before guests are let in"
    assert entry.transport is None


def test_a_start_asks_for_each_root_once(make_node: MakeNode, memory: CountingStore) -> None:
    node = make_node()
    node.create("v", SIZE, wait=True)
    node.close()
    before = memory.requests["head"]
    again = make_node()
    again.router.start()
    assert again.router.wait_tried(20)
    wait_for(lambda: memory.requests["head"] > before, "the question")
    time.sleep(0.5)
    assert memory.requests["head"] == before + 1


def test_a_fork_that_was_taken_over_and_removed_is_not_put_after_a_start(
    make_node: MakeNode, memory: CountingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """! Nobody would know why the volume is there again, nor keep what it names."""
    node = make_node()
    node.base("deb", b"d" * 4096)
    node.bases.get(PREFIX, "deb")
    lose_answer(memory, monkeypatch, lambda root: root.name == "f")
    node.fork("f", "base:deb")
    wait_for(lambda: memory._down, "the put")
    node.host.pause(20.0)
    memory.set_down(False)
    other = make_node("b")
    other.router.attach("f", AttachRequest(transport="nbd", take_over=True))
    other.router.remove("f")
    node.host.resume()
    wait_for(lambda: node.router.table.get("f").is_fenced(), "the fence")
    node.close()
    memory.delete(manifest_key(PREFIX, "f"))  # gc, when the tombstone is old enough
    again = make_node()
    again.router.start()
    assert again.router.wait_tried(20)
    assert again.router.table.get("f").is_fenced()
    assert "took it over and removed it" in again.router.show("f").reason
    with pytest.raises(UnknownExport):
        root_of(again, "f")
    assert again.router.remove("f")["removed"]


def test_what_a_start_finds_is_made_durable(
    make_node: MakeNode, memory: CountingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """! The process before may have died between a rename and its sync, and log space goes after that."""
    node = make_node()
    node.create("v", SIZE, wait=True)
    node.core("v").pwrite(0, b"v" * 4096)
    node.router.drain("v")
    volume = node.router.table.get("v").volume
    assert volume is not None
    copies = local.volume_dir(node.home / "state", volume.id)
    node.close()
    synced: set[str] = set()
    for module in (local, glidefs.exports.table):
        sync = module.fsync_dir
        monkeypatch.setattr(module, "fsync_dir", lambda path, sync=sync: (synced.add(str(path)), sync(path)))
    again = make_node()
    again.router.start()
    assert again.router.wait_tried(20)
    assert {str(again.home / "exports"), str(copies), str(copies.parent), str(copies.parent.parent)} <= synced
