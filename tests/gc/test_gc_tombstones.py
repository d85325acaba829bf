"""Tombstones of bases and volumes: what they keep, when they go, and who has their names."""

from __future__ import annotations

import gc_rig as rig
import pytest
from gc_rig import GRACE, PREFIX, ClockStore
from stored_roots import owner_of, put_root

from glidefs import names
from glidefs.errors import Conflict, UnknownExport
from glidefs.formats.manifest import decode_root
from glidefs.manifest import lease
from glidefs.manifest.lease import undelete_root


def test_a_removed_base_keeps_its_packs_for_the_grace(store: ClockStore) -> None:
    pack = rig.put_pack(store)
    key = rig.put_base(store, "b", [pack])
    hot_set = names.hot_set_key(PREFIX, "b")
    store.put(hot_set, b"hot")
    store.now += 3 * GRACE
    rig.run(store)
    rig.remove_base(store, "b")
    store.now += GRACE - 1
    result = rig.run(store)
    assert (result.tombstones, result.unreferenced.objects) == (0, 0)
    assert {key, hot_set} <= store.key_set()
    store.now += 1
    result = rig.run(store)
    assert (result.tombstones, result.unreferenced.objects) == (1, 0)
    assert not {key, hot_set} & store.key_set()
    assert rig.has_pack(store, pack)
    rig.run(store)
    store.now += GRACE
    rig.run(store)
    assert not rig.has_pack(store, pack)


def test_tombstones_of_volumes_go_after_the_grace(store: ClockStore) -> None:
    """Until then they keep what they name."""
    pack, key = rig.put_pack(store), names.manifest_key(PREFIX, "x")
    put_root(store, key, rig.inline_root("x", [pack], removed_at=1))
    store.now += GRACE - 1
    result = rig.run(store)
    assert (result.tombstones, result.marked.objects) == (0, 1)
    store.now += 1
    assert rig.run(store).tombstones == 1
    assert key not in store.key_set()


def test_a_name_is_not_taken_while_gc_deletes_its_tombstone(store: ClockStore) -> None:
    """! The delete would hit the new volume."""
    key = names.manifest_key(PREFIX, "x")
    put_root(store, key, rig.inline_root("x", [], removed_at=1))
    store.now += GRACE
    fresh = lease.empty_root("x", 1 << 20, owner_of("n"))
    refused = []

    def other(op: str, where: str) -> None:
        if op == "delete" and where == key and not refused:
            refused.append(1)
            with pytest.raises(Conflict, match="is being removed"):
                lease.create(store, PREFIX, fresh)

    store.hook = other
    assert rig.run(store).tombstones == 1
    assert refused
    lease.create(store, PREFIX, fresh)
    assert decode_root(key, store.get(key).data) == fresh


def test_an_undelete_and_gc_are_one_after_the_other(store: ClockStore) -> None:
    """! Whoever is first: the volume is back with all that it names, or it is gone and stays so."""
    pack = rig.put_pack(store)
    key = names.manifest_key(PREFIX, "x")
    for when in ("first", "late"):
        put_root(store, key, rig.inline_root("x", [pack], removed_at=1))
        store.now += GRACE
        done = []

        def other(op: str, where: str, when: str = when, done: list[str] = done) -> None:
            before = op == "put" and where == names.gc_state_key(PREFIX)
            after = op == "delete" and where == key
            if (before if when == "first" else after) and not done:
                done.append(when)
                if when == "first":
                    undelete_root(store, PREFIX, "x")
                    return
                with pytest.raises(UnknownExport, match="for good"):
                    undelete_root(store, PREFIX, "x")

        store.hook = other
        assert rig.run(store).tombstones == (0 if when == "first" else 1)
        store.hook = lambda op, where: None
        assert done == [when]
        assert (key in store.key_set()) == (when == "first")
    rig.run(store)
    store.now += GRACE
    rig.run(store)
    assert not rig.has_pack(store, pack)


def test_an_undeleted_volume_is_a_root_again(store: ClockStore) -> None:
    pack, key = rig.put_pack(store), names.manifest_key(PREFIX, "x")
    put_root(store, key, rig.inline_root("x", [pack], removed_at=1))
    store.now += GRACE - 1
    rig.run(store)
    undelete_root(store, PREFIX, "x")
    for _ in range(3):
        store.now += 2 * GRACE
        rig.run(store)
    assert key in store.key_set()
    assert rig.has_pack(store, pack)


def test_a_base_blessed_anew_is_not_deleted(store: ClockStore) -> None:
    """Another run deletes the tombstone and the name is used again, while this one is about to."""
    pack = rig.put_pack(store)
    key = rig.put_base(store, "b", [pack])
    rig.remove_base(store, "b")
    store.now += GRACE
    done = []

    def other(op: str, where: str) -> None:
        if op == "put" and where == names.gc_state_key(PREFIX) and not done:
            done.append(1)
            store.delete(key)
            rig.put_base(store, "b", [pack])

    store.hook = other
    assert rig.run(store).tombstones == 0
    assert key in store.key_set()
