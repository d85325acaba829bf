"""The first and the last root under a name, and who may take it after that."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from stored_roots import owner_of, put_root

from glidefs.errors import AccessDenied, Conflict, ExportExists, Fenced, UnknownExport
from glidefs.formats.manifest import EMPTY_PAGE, Root, decode_root
from glidefs.manifest import lease
from glidefs.manifest.lease import delete_root, put_first_root, undelete_root
from glidefs.names import manifest_key
from glidefs.store.memory import MemoryStore

PREFIX = "p"
KEY = manifest_key(PREFIX, "v")


def volume() -> Root:
    return lease.empty_root("v", 1 << 20, owner_of("a"))


def anyone(root: Root) -> bool:
    """As if there were no copies of hosts."""
    return True


def put_again(store: MemoryStore, root: Root) -> None:
    """What a node does that never had an answer to its first put."""
    lease.commit_first(store, KEY, root)


def stored(store: MemoryStore) -> Root:
    return decode_root(KEY, store.get(KEY).data)


def test_a_volume_with_one_owner_leaves_nothing_if_asked_to() -> None:
    store, root = MemoryStore(), volume()
    put_first_root(store, PREFIX, root)
    assert delete_root(store, PREFIX, root, anyone, now=True)
    with pytest.raises(UnknownExport):
        lease.read_root(store, PREFIX, "v")
    assert delete_root(store, PREFIX, root, anyone, now=True)
    with pytest.raises(UnknownExport):
        undelete_root(store, PREFIX, "v")


def test_a_removed_volume_is_put_back_as_it_was_without_an_owner() -> None:
    store, root = MemoryStore(), msgspec.structs.replace(volume(), inline_page=EMPTY_PAGE, flush="store")
    put_first_root(store, PREFIX, root)
    assert delete_root(store, PREFIX, root, anyone)
    assert delete_root(store, PREFIX, root, anyone), "a removal that is done is done"
    with pytest.raises(UnknownExport, match="was removed"):
        lease.attach(store, PREFIX, "v", owner_of("a"))
    back = undelete_root(store, PREFIX, "v")
    assert stored(store) == back
    kept = ("volume_id", "size", "page_ids", "inline_page", "flush", "source", "created_at")
    assert [getattr(back, field) for field in kept] == [getattr(root, field) for field in kept]
    assert (back.owner_node, back.log_id, back.removed_at) == ("", lease.NO_ID, 0)
    assert not delete_root(store, PREFIX, root, anyone), "who removed it once has no part in its new life"
    with pytest.raises(ExportExists, match="was not removed"):
        undelete_root(store, PREFIX, "v")
    assert lease.attach(store, PREFIX, "v", owner_of("b"))[0].epoch == root.epoch + 1


def test_what_is_about_to_be_deleted_is_not_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """! The delete would take the volume along."""
    store, root = MemoryStore(), volume()
    put_first_root(store, PREFIX, root)
    delete, refused = store.delete, []

    def slow(key: str) -> None:
        with pytest.raises(UnknownExport, match="for good"):
            undelete_root(store, PREFIX, "v")
        refused.append(1)
        delete(key)

    monkeypatch.setattr(store, "delete", slow)
    assert delete_root(store, PREFIX, root, anyone, now=True)
    assert refused


def test_who_takes_the_name_of_a_removed_volume_says_so(caplog: pytest.LogCaptureFixture) -> None:
    store, root = MemoryStore(), volume()
    put_first_root(store, PREFIX, root)
    delete_root(store, PREFIX, root, anyone)
    with caplog.at_level("INFO"):
        put_first_root(store, PREFIX, volume())
    (said,) = [record.getMessage() for record in caplog.records]
    assert root.volume_id.hex() in said
    assert "cannot be undeleted" in said
    with pytest.raises(ExportExists):
        undelete_root(store, PREFIX, "v")


def test_who_undeletes_and_who_creates_are_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """! An undelete that read the tombstone before must not put its root over another volume."""
    store, root, fresh = MemoryStore(), volume(), volume()
    put_first_root(store, PREFIX, root)
    delete_root(store, PREFIX, root, anyone)
    read_root = lease.read_root

    def slow(view: MemoryStore, prefix: str, name: str) -> tuple[Root, str]:
        found = read_root(view, prefix, name)
        if found[0].removed_at:
            put_first_root(store, PREFIX, fresh)
        return found

    monkeypatch.setattr(lease, "read_root", slow)
    with pytest.raises(ExportExists):
        undelete_root(store, PREFIX, "v")
    assert stored(store) == fresh


def test_an_undelete_whose_answer_was_lost_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    store, root = MemoryStore(), volume()
    put_first_root(store, PREFIX, root)
    delete_root(store, PREFIX, root, anyone)
    put = store.put

    def lost(key: str, data: Any, **conditions: Any) -> str:
        put(key, data, **conditions)
        return put(key, data, **conditions)  # sent again: refused

    monkeypatch.setattr(store, "put", lost)
    assert undelete_root(store, PREFIX, "v") == stored(store)


def test_what_was_taken_over_and_removed_is_not_put_again() -> None:
    """! Its node does not know that the store ever had it, and what it names may be gone."""
    store, root = MemoryStore(), volume()
    put_again(store, root)
    taken, _ = lease.attach(store, PREFIX, "v", owner_of("b"), take_over=True)
    assert delete_root(store, PREFIX, taken, anyone)
    with pytest.raises(Fenced, match="took it over and removed it"):
        put_again(store, root)
    assert delete_root(store, PREFIX, taken, anyone)
    assert stored(store).removed_at
    fresh = volume()
    put_first_root(store, PREFIX, fresh)
    assert stored(store) == fresh
    with pytest.raises(Fenced, match="node a has it"):
        put_again(store, root)


def test_nobody_takes_a_name_that_is_being_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    """! The delete would hit the new volume."""
    store, root, fresh = MemoryStore(), volume(), volume()
    put_first_root(store, PREFIX, root)
    monkeypatch.setattr(lease, "DOOMED_PATIENCE", 0.1)
    delete, refused = store.delete, []

    def slow(key: str) -> None:
        with pytest.raises(Conflict) as caught:
            put_first_root(store, PREFIX, fresh)
        refused.append(caught.value.temporary)
        delete(key)

    monkeypatch.setattr(store, "delete", slow)
    assert delete_root(store, PREFIX, root, anyone, now=True)
    assert refused == [True]
    put_first_root(store, PREFIX, fresh)
    assert stored(store) == fresh


def test_a_name_whose_removal_was_interrupted_is_free_later(monkeypatch: pytest.MonkeyPatch) -> None:
    store, root, fresh = MemoryStore(), volume(), volume()
    put_first_root(store, PREFIX, root)
    with monkeypatch.context() as patch:

        def fail(key: str) -> None:
            raise AccessDenied(key)

        patch.setattr(store, "delete", fail)
        with pytest.raises(AccessDenied):
            delete_root(store, PREFIX, root, anyone, now=True)
    monkeypatch.setattr(lease, "DOOMED_PATIENCE", 0.0)
    with pytest.raises(Conflict):
        put_first_root(store, PREFIX, fresh)
    old = msgspec.structs.replace(stored(store), removed_at=stored(store).removed_at - int(lease.DOOMED_FOR))
    put_root(store, KEY, old)
    put_first_root(store, PREFIX, fresh)
    assert stored(store) == fresh


def test_a_removal_that_goes_on_says_so_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first tombstone may be old enough for somebody to take the name."""
    store, root = MemoryStore(), volume()
    old = msgspec.structs.replace(lease.tombstone(root, doomed=True), removed_at=1)
    put_root(store, KEY, old)
    delete, seen = store.delete, []

    def look(key: str, **conditions: Any) -> None:
        seen.append(stored(store).removed_at)
        delete(key, **conditions)

    monkeypatch.setattr(store, "delete", look)
    assert delete_root(store, PREFIX, root, anyone, now=True)
    assert seen[0] > 1
