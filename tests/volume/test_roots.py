"""The first and the last root under a name, and who may take it after that."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from glidefs.errors import AccessDenied, Conflict, Fenced, UnknownExport
from glidefs.formats.manifest import Root, decode_root, encode_root
from glidefs.names import manifest_key
from glidefs.roots import delete_root, put_first_root
from glidefs.store.memory import MemoryStore
from glidefs.volume import lease

PREFIX = "p"
KEY = manifest_key(PREFIX, "v")


def volume() -> Root:
    return lease.empty_root("v", 1 << 20, "a")


def put_again(store: MemoryStore, root: Root) -> None:
    """What a node does that never had an answer to its first put."""
    lease.commit_first(store, KEY, root, encode_root(root))


def stored(store: MemoryStore) -> Root:
    return decode_root(KEY, store.get(KEY).data)


def test_a_volume_with_one_owner_leaves_nothing() -> None:
    store, root = MemoryStore(), volume()
    put_first_root(store, PREFIX, root)
    assert delete_root(store, PREFIX, root)
    with pytest.raises(UnknownExport):
        lease.read_root(store, PREFIX, "v")
    assert delete_root(store, PREFIX, root)


def test_what_was_taken_over_and_removed_is_not_put_again() -> None:
    """! Its node does not know that the store ever had it, and what it names may be gone."""
    store, root = MemoryStore(), volume()
    put_again(store, root)
    taken, _ = lease.attach(store, PREFIX, "v", "b", take_over=True)
    assert delete_root(store, PREFIX, taken)
    with pytest.raises(Fenced, match="took it over and removed it"):
        put_again(store, root)
    assert delete_root(store, PREFIX, taken)
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
    assert delete_root(store, PREFIX, root)
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
            delete_root(store, PREFIX, root)
    monkeypatch.setattr(lease, "DOOMED_PATIENCE", 0.0)
    with pytest.raises(Conflict):
        put_first_root(store, PREFIX, fresh)
    old = msgspec.structs.replace(stored(store), removed_at=stored(store).removed_at - int(lease.DOOMED_FOR))
    store.put(KEY, encode_root(old))
    put_first_root(store, PREFIX, fresh)
    assert stored(store) == fresh


def test_a_removal_that_goes_on_says_so_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first tombstone may be old enough for somebody to take the name."""
    store, root = MemoryStore(), volume()
    old = msgspec.structs.replace(lease.tombstone(root, doomed=True), removed_at=1)
    store.put(KEY, encode_root(old))
    delete, seen = store.delete, []

    def look(key: str, **conditions: Any) -> None:
        seen.append(stored(store).removed_at)
        delete(key, **conditions)

    monkeypatch.setattr(store, "delete", look)
    assert delete_root(store, PREFIX, root)
    assert seen[0] > 1
