"""Commits, forks, removals and other runs at the worst moments of a run."""

from __future__ import annotations

from collections.abc import Callable

import gc_rig as rig
import pytest
from gc_rig import GRACE, PREFIX, ClockStore
from stored_roots import put_root

from glidefs import names
from glidefs.errors import GcRefused
from glidefs.gc import run as gc_module

STATE = names.gc_state_key(PREFIX)
VOLUMES = names.volumes_prefix(PREFIX)


def once(store: ClockStore, op: str, key: str, action: Callable[[], object], nth: int = 1) -> None:
    """Do `action` before the nth request `op` on `key`."""
    seen = []

    def hook(found_op: str, found_key: str) -> None:
        if (found_op, found_key) == (op, key):
            seen.append(1)
            if len(seen) == nth:
                action()

    store.hook = hook


def test_a_root_that_appears_between_listing_and_marking(store: ClockStore) -> None:
    """A commit after packs and pages were listed: its root is read after that, so it counts."""
    pack = rig.put_pack(store)
    page = rig.put_page(store, [pack])
    rig.put_volume(store, "v", [])
    store.now += GRACE
    rig.run(store)
    store.now += GRACE
    late = names.manifest_key(PREFIX, "late")
    once(store, "list", VOLUMES, lambda: put_root(store, late, rig.paged_root("late", [page])))
    assert rig.run(store).unreferenced.objects == 0
    assert rig.has_pack(store, pack)
    assert rig.has_page(store, page)


def test_a_pack_put_and_committed_during_a_run(store: ClockStore) -> None:
    rig.put_volume(store, "v", [])
    store.now += GRACE
    rig.run(store)
    store.now += GRACE
    made = []

    def upload() -> None:
        made.append(rig.put_pack(store))
        rig.put_volume(store, "v", made)

    once(store, "put", STATE, upload)  # after all roots were read
    rig.run(store)
    store.now += GRACE / 2
    rig.run(store)
    assert rig.has_pack(store, made[0])


def test_a_pack_listed_before_its_commit_and_a_slow_run(store: ClockStore) -> None:
    """The pack is young when it is listed; the run takes longer than the grace; it is committed late."""
    rig.put_volume(store, "v", [])
    store.now += GRACE
    rig.run(store)
    store.now += GRACE
    pack = rig.put_pack(store)

    def slow(op: str, key: str) -> None:
        if op == "put" and key == STATE:
            store.now += GRACE / 2 - 1
            rig.put_volume(store, "v", [pack])
            store.now += GRACE

    store.hook = slow
    rig.run(store)
    assert rig.has_pack(store, pack)


def test_a_commit_between_mark_and_delete(store: ClockStore) -> None:
    """A fork of what a removed root named is put when all roots were read: the last look sees it."""
    pack, other = rig.put_pack(store), rig.put_pack(store)
    rig.put_volume(store, "v", [])
    store.now += GRACE
    rig.run(store)
    store.now += GRACE
    once(store, "put", STATE, lambda: rig.put_volume(store, "fork", [pack]))
    result = rig.run(store)
    rig.check_sums(result)
    assert rig.has_pack(store, pack)
    assert not rig.has_pack(store, other)
    # And it has a whole grace again once the fork is gone.
    store.hook = lambda op, key: None
    store.delete(names.manifest_key(PREFIX, "fork"))
    assert rig.run(store).waiting.objects == 1
    assert rig.has_pack(store, pack)


def test_a_commit_between_two_batches_of_deletes(store: ClockStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gc_module, "BATCH", 5)
    packs = [rig.put_pack(store) for _ in range(20)]
    rig.put_volume(store, "v", [])
    store.now += GRACE
    rig.run(store)
    store.now += GRACE
    late: list[bytes] = []

    def commit(op: str, key: str) -> None:
        left = [pack for pack in packs if rig.has_pack(store, pack)]
        if op == "list" and len(left) == 10 and not late:
            late.extend(left[:3])
            rig.put_volume(store, "fork", late)

    store.hook = commit
    assert rig.run(store).deleted.objects == 17
    assert {pack for pack in packs if rig.has_pack(store, pack)} == set(late)
    assert late


def test_a_fork_whose_source_goes_before_its_root_comes(store: ClockStore) -> None:
    """The first run sees neither; the root is there within a quarter of the grace."""
    pack = rig.put_pack(store)
    source = rig.put_volume(store, "source", [pack])
    store.now += GRACE
    store.delete(source)
    rig.run(store)
    store.now += GRACE / 4
    rig.put_volume(store, "fork", [pack])
    store.now += GRACE * 3 / 4
    assert rig.run(store).unreferenced.objects == 0
    assert rig.has_pack(store, pack)


def test_a_base_that_is_handed_on_while_it_is_removed(store: ClockStore) -> None:
    """Caches may fork a removed base for a quarter of the grace; the fork has another to be put."""
    pack = rig.put_pack(store)
    rig.put_base(store, "b", [pack])
    store.now += GRACE
    rig.run(store)
    rig.remove_base(store, "b")
    store.now += GRACE / 2
    rig.run(store)
    rig.put_volume(store, "fork", [pack])
    for _ in range(4):
        store.now += GRACE / 2
        rig.run(store)
    assert rig.has_pack(store, pack)


def test_a_root_that_vanishes_between_listing_and_reading(store: ClockStore) -> None:
    """Its pack went to a fork whose place the listing had passed: the next listing finds that."""
    pack = rig.put_pack(store)
    source = rig.put_volume(store, "z-source", [pack])
    store.now += GRACE

    def hand_on(name: str) -> Callable[[], object]:
        def action() -> None:
            rig.put_volume(store, name, [pack])
            store.delete(source)

        return action

    once(store, "get", source, hand_on("a-fork"))
    assert rig.run(store).unreferenced.objects == 0
    source = names.manifest_key(PREFIX, "a-fork")
    store.now += GRACE
    once(store, "get", source, hand_on("b-fork"))
    rig.run(store)
    assert rig.has_pack(store, pack)


def test_a_root_handed_on_during_the_listing_of_both_runs(store: ClockStore) -> None:
    """No error shows it: the fork is put where the listing was already, the source goes before it is
    reached. Twice, a grace apart."""
    pack = rig.put_pack(store)
    rig.put_volume(store, "z1", [pack])
    store.list_limit = 1
    rig.put_volume(store, "b", [])
    store.now += GRACE
    for number in (1, 2):
        seen: list[str] = []

        def hand_on(prefix: str, number: int = number, seen: list[str] = seen) -> None:
            if prefix == VOLUMES and not seen:
                seen.append(prefix)  # the listing is at its first entry
                rig.put_volume(store, f"a{number}", [pack])
                store.delete(names.manifest_key(PREFIX, f"z{number}"))

        store.after_list = hand_on
        result = rig.run(store)
        assert result.unreferenced.objects == 0
        assert seen
        store.after_list = lambda prefix: None
        rig.put_volume(store, f"z{number + 1}", [pack])
        store.delete(names.manifest_key(PREFIX, f"a{number}"))
        store.now += GRACE
    assert rig.has_pack(store, pack)


def test_a_commit_replaces_a_page_while_it_is_read(store: ClockStore) -> None:
    old_pack, new_pack = rig.put_pack(store), rig.put_pack(store)
    old, new = rig.put_page(store, [old_pack]), rig.put_page(store, [new_pack])
    key = names.manifest_key(PREFIX, "v")
    put_root(store, key, rig.paged_root("v", [old]))
    store.now += GRACE
    old_key = names.page_key(PREFIX, old.hex())

    def commit() -> None:
        put_root(store, key, rig.paged_root("v", [new]))
        store.delete(old_key)

    once(store, "get", old_key, commit)
    result = rig.run(store)
    assert result.unreferenced.objects == 2  # the old pack, and the old page that was listed
    store.now += GRACE
    rig.run(store)
    assert rig.has_pack(store, new_pack)
    assert rig.has_page(store, new)


def test_a_volume_removed_while_its_page_is_read(store: ClockStore) -> None:
    page = rig.put_page(store, [])
    key = names.manifest_key(PREFIX, "v")
    put_root(store, key, rig.paged_root("v", [page]))
    page_key = names.page_key(PREFIX, page.hex())

    def remove() -> None:
        store.delete(key)
        store.delete(page_key)

    once(store, "get", page_key, remove)
    assert rig.run(store).roots == 0


# -- two runs at once -----------------------------------------------------------------------------


def test_of_two_runs_the_later_one_deletes_nothing(store: ClockStore) -> None:
    rig.put_volume(store, "v", [])
    rig.put_pack(store)
    store.now += GRACE
    rig.run(store)
    store.now += GRACE
    doomed = rig.put_pack(store)
    fast = []

    def other_run() -> None:
        store.hook = lambda op, key: None
        fast.append(rig.run(store, limit=0))

    once(store, "list", VOLUMES, other_run)
    before = store.key_set(f"{PREFIX}/packs/")
    with pytest.raises(GcRefused) as caught:
        rig.run(store)
    assert "\n" not in str(caught.value)
    assert "another run" in str(caught.value)
    assert fast[0].due.objects == 1
    assert store.key_set(f"{PREFIX}/packs/") == before
    assert rig.has_pack(store, doomed)


def test_two_first_runs(store: ClockStore) -> None:
    """There is no state yet: If-None-Match decides."""
    rig.put_volume(store, "v", [])

    def other_run() -> None:
        store.hook = lambda op, key: None
        rig.run(store)

    once(store, "list", VOLUMES, other_run)
    with pytest.raises(GcRefused):
        rig.run(store)


def test_an_own_put_of_the_state_whose_answer_was_lost(store: ClockStore) -> None:
    """The retry of the patient store meets its own work; that is no other run."""
    from glidefs.store.resilient import ResilientStore

    rig.put_volume(store, "v", [])
    rig.put_pack(store)
    patient = ResilientStore(store, deadline=5.0)
    store.now += GRACE
    rig.run(patient)
    store.now += GRACE

    def lose(op: str, key: str) -> None:
        if op == "put" and key == STATE:
            store.hook = lambda op, key: None
            store.lose_answers("put")

    store.hook = lose
    assert rig.run(patient).deleted.objects == 1
