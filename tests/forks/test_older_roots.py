"""Roots that look like ours and are not: of a copy of this host, or of a store that went back in time."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable

import pytest
from fork_rig import MIB, PREFIX, CountingStore, Node
from stored_roots import put_root

from glidefs.errors import Fenced, GlideError, StoreUnavailable, StoreWentBack
from glidefs.exports.requests import AttachRequest
from glidefs.formats.manifest import Root, decode_root
from glidefs.manifest import local
from glidefs.names import manifest_key
from glidefs.volume import logs
from glidefs.volume.volume import Volume

MakeNode = Callable[..., Node]
SIZE = 16 * MIB
KEY = manifest_key(PREFIX, "v")


def stored(memory: CountingStore) -> Root:
    return decode_root(KEY, memory.get(KEY).data)


def volume_of(node: Node) -> Volume:
    volume = node.router.table.get("v").volume
    assert volume is not None
    return volume


def write(node: Node, fill: bytes, sector: int = 0) -> None:
    node.core("v").pwrite(sector * 4096, fill * 4096)
    node.router.drain("v", 20.0)


def begun(make_node: MakeNode) -> Node:
    """A host whose volume is in the store, with ones in its first sector."""
    node = make_node()
    node.create("v", SIZE, wait=True)
    write(node, b"1")
    return node


def started(make_node: MakeNode, name: str = "a") -> Node:
    node = make_node(name)
    node.router.start()
    assert node.router.wait_tried(20)
    return node


def roll_back(memory: CountingStore, root: Root) -> None:
    memory.delete(KEY)
    put_root(memory, KEY, root)


# -- the store went back ---------------------------------------------------------------------------


@pytest.mark.parametrize("restarted", [False, True])
def test_an_older_root_is_not_adopted_because_it_was_put_here(
    make_node: MakeNode, memory: CountingStore, monkeypatch: pytest.MonkeyPatch, restarted: bool
) -> None:
    """! The nonces that were tried are kept until the next commit, also those before the root in use."""
    node = make_node()
    node.create("v", SIZE, wait=True)
    roots = []
    with monkeypatch.context() as patch:
        if not restarted:  # while the local copy lags, no nonce is forgotten
            patch.setattr(local, "save", full)
        for fill in (b"1", b"2"):
            write(node, fill)
            roots.append(stored(memory))
    if restarted:
        root = stored(memory)
        node.close()
        local.save_tried(node.home / "state", root.volume_id, [one.nonce for one in roots])
        node = started(make_node)
    assert roots[0].nonce in volume_of(node).committer.tried
    roll_back(memory, roots[0])
    node.core("v").pwrite(4096, b"3" * 4096)
    with pytest.raises(StoreWentBack):
        node.router.drain("v", 20.0)
    assert stored(memory) == roots[0]
    assert node.core("v").pread(0, 8192) == b"2" * 4096 + b"3" * 4096


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "no space")


def test_an_older_root_does_not_replace_the_local_one_of_a_log_that_lost_a_sync(
    make_node: MakeNode, memory: CountingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """! The store's root is taken at a start for what such a log may lack; an older one lacks more."""
    node = begun(make_node)
    older = stored(memory)
    write(node, b"2")
    volume_of(node).retire_committed()
    node.close()
    roll_back(memory, older)
    monkeypatch.setattr(logs, "look", lambda directory: logs.LogLook(empty=False, lost_syncs=True))
    node = started(make_node)
    assert volume_of(node).root.sequence > older.sequence
    assert "went back" in volume_of(node).last_error
    assert node.core("v").pread(0, 4096) == b"2" * 4096


def test_a_drain_with_nothing_to_upload_says_what_is_known_of_the_store(
    make_node: MakeNode, memory: CountingStore
) -> None:
    """! What it would say is in the store was there once."""
    node = begun(make_node)
    older = stored(memory)
    write(node, b"2")
    newest = stored(memory)
    roll_back(memory, older)
    node.close()
    node = started(make_node)
    for _ in range(2):
        with pytest.raises(StoreWentBack):
            node.router.drain("v", 20.0)
        assert "went back" in volume_of(node).last_error
    node.host.pause(20.0)  # nobody asks meanwhile
    memory.set_down(True)
    node.host.resume()
    with pytest.raises((StoreUnavailable, GlideError), match="not drained within"):
        node.router.drain("v", 1.0)
    node.host.pause(20.0)
    memory.set_down(False)
    roll_back(memory, newest)
    node.host.resume()
    node.router.drain("v", 20.0)
    assert volume_of(node).last_error == ""


def test_who_takes_an_older_state_over_fences_who_knew_a_newer_one(
    make_node: MakeNode, memory: CountingStore
) -> None:
    """! Its root has a lower sequence, and a later epoch: two would serve until it has committed as often."""
    node, other = make_node("a"), make_node("b")
    node.create("v", SIZE, wait=True)
    write(node, b"1")
    older = stored(memory)
    for fill in (b"2", b"3", b"4"):
        write(node, fill)
    roll_back(memory, older)
    other.router.attach("v", AttachRequest(transport="nbd", take_over=True))
    assert stored(memory).sequence < volume_of(node).root.sequence
    node.core("v").pwrite(4096, b"5" * 4096)
    with pytest.raises(Fenced, match="node b"):
        node.router.drain("v", 20.0)
    assert other.core("v").pread(0, 4096) == b"1" * 4096


@pytest.mark.parametrize("served", [True, False])
def test_an_older_state_is_taken_only_when_that_is_said(
    make_node: MakeNode, memory: CountingStore, served: bool
) -> None:
    node = begun(make_node)
    older = stored(memory)
    write(node, b"2")
    roll_back(memory, older)
    if not served:
        entry = node.router.table.get("v")
        with entry.lock:
            node.router._opener.close_entry(entry, remove_device=False)
            entry.failed(GlideError("no such luck"))
    with pytest.raises(StoreWentBack):
        node.router.attach("v", AttachRequest(transport="nbd", take_over=True))
    assert stored(memory) == older
    node.router.attach("v", AttachRequest(transport="nbd", accept_older=True))
    assert node.core("v").pread(0, 4096) == b"1" * 4096
    write(node, b"3")


# -- a copy of this host ---------------------------------------------------------------------------


def clone(node: Node, make_node: MakeNode) -> tuple[Node, Node]:
    """Both of what was one host, started again."""
    node.close()
    shutil.copytree(node.home, node.home.parent / "copy" / "a")
    return started(make_node, "a"), started(make_node, "copy/a")


def test_a_log_that_lost_a_sync_is_not_opened_with_the_root_of_a_copy(
    make_node: MakeNode, memory: CountingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """! The store's root is taken for it at a start, and names the same log."""
    node = begun(make_node)
    one, two = clone(node, make_node)
    write(one, b"2")
    two.core("v").pwrite(4096, b"3" * 4096)
    two.close()
    monkeypatch.setattr(logs, "look", lambda directory: logs.LogLook(empty=False, lost_syncs=True))
    two = started(make_node, "copy/a")
    assert "cloned" in two.router.show("v").reason
    assert stored(memory) == volume_of(one).root


def no_nonces(monkeypatch: pytest.MonkeyPatch, node: Node) -> None:
    """The disk of this one takes no nonces."""
    save = local.save_tried

    def save_tried(state_dir, *rest):  # type: ignore[no-untyped-def]
        if state_dir == node.home / "state":
            full()
        save(state_dir, *rest)

    monkeypatch.setattr(local, "save_tried", save_tried)


def test_a_copy_does_not_adopt_what_was_committed_while_the_disk_took_no_nonce(
    make_node: MakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """! A nonce from before the copy was made is known to both: it is evidence of nothing."""
    node = begun(make_node)
    one, two = clone(node, make_node)
    no_nonces(monkeypatch, one)
    two.core("v").pwrite(4096, b"3" * 4096)  # a segment of the number that the other's has
    write(one, b"2")
    with pytest.raises(Fenced, match="cloned"):
        two.router.drain("v", 20.0)
    write(one, b"4", 1)
    assert one.core("v").pread(0, 8192) == b"2" * 4096 + b"4" * 4096


@pytest.mark.parametrize("segments", [1, 3])
def test_what_was_committed_while_the_disk_took_nothing_is_known_after_a_start(
    make_node: MakeNode, memory: CountingStore, monkeypatch: pytest.MonkeyPatch, segments: int
) -> None:
    """By what the log holds: the same data, the same root."""
    node = begun(make_node)
    with monkeypatch.context() as patch:
        no_nonces(patch, node)
        patch.setattr(local, "save", full)
        for number in range(segments):
            write(node, bytes([number]), number)
            node.core("v").zero(BIG * (number + 1), BIG // 2)
        node.core("v").pwrite(SIZE - 4096, b"z" * 4096)
        node.router.drain("v", 20.0)
        node.close()
    newest = stored(memory)
    node = started(make_node)
    assert volume_of(node).root == newest
    node.engine.cache.evict_all()
    assert node.core("v").pread(0, 4096) == bytes(4096)
    write(node, b"w")
    assert stored(memory).sequence == newest.sequence + 1


BIG = MIB


def test_remove_on_a_copy_leaves_a_volume_that_neither_had_put_yet(
    make_node: MakeNode, memory: CountingStore
) -> None:
    """! Who has not put its first root does not ask whose the one in the store is."""
    node = make_node()
    memory.set_down(True)
    node.create("v", SIZE)
    node.close()
    shutil.copytree(node.home, node.home.parent / "copy" / "a")
    two = started(make_node, "copy/a")
    two.host.pause(20.0)  # it does not put its root meanwhile, and hears nothing
    memory.set_down(False)
    one = started(make_node, "a")
    write(one, b"1")
    write(one, b"2")
    assert volume_of(two).etag is None
    assert "set aside" in two.router.remove("v")["note"]
    assert stored(memory) == volume_of(one).root
    write(one, b"3")
