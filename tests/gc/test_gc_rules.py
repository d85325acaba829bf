"""What gc keeps, what it deletes, and when: one rule per test."""

from __future__ import annotations

from pathlib import Path

import gc_rig as rig
import pytest
from gc_rig import GRACE, PREFIX, ClockStore
from stored_roots import put_root

from glidefs import names
from glidefs.errors import AccessDenied, CorruptObject, GcRefused, GlideError, StoreUnavailable
from glidefs.formats.gc_state import decode_state, first_seen
from glidefs.gc import mark as gc_mark
from glidefs.gc.run import Tally
from glidefs.store import open_store

STATE = names.gc_state_key(PREFIX)
CLOCK = names.gc_clock_key(PREFIX)


def test_every_root_keeps_what_it_names(store: ClockStore) -> None:
    kept = [rig.put_pack(store) for _ in range(5)]
    page = rig.put_page(store, [kept[0]])
    put_root(store, names.manifest_key(PREFIX, "v"), rig.paged_root("v", [page]))
    put_root(store, names.snapshot_key(PREFIX, "v", 3), rig.inline_root("v", [kept[1]]))
    put_root(store, names.snapshot_key(PREFIX, "gone", 3), rig.inline_root("gone", [kept[2]]))
    put_root(store, names.tag_key(PREFIX, "t"), rig.inline_root("v", [kept[3]]))
    rig.put_base(store, "b", [kept[4]])
    store.put(names.hot_set_key(PREFIX, "b"), b"not decoded")
    before = store.key_set()
    for _ in range(4):
        result = rig.run(store)
        rig.check_sums(result)
        assert (result.roots, result.marked.objects, result.unreferenced.objects) == (5, 6, 0)
        store.now += GRACE
    assert store.key_set() == before | {STATE, CLOCK}


def test_garbage_goes_with_the_second_run(store: ClockStore) -> None:
    kept = rig.put_pack(store, 10)
    rig.put_volume(store, "v", [kept])
    pack, page = rig.put_pack(store, 1000), rig.put_page(store, [kept])
    store.now += 2 * GRACE  # old as they are, one run is not enough
    first = rig.run(store)
    rig.check_sums(first)
    assert (first.waiting.objects, first.due.objects, first.deleted.objects) == (2, 0, 0)
    store.now += GRACE
    second = rig.run(store)
    rig.check_sums(second)
    assert second.deleted.objects == 2
    assert second.deleted.bytes >= 1000
    assert not rig.has_pack(store, pack)
    assert not rig.has_page(store, page)
    assert rig.has_pack(store, kept)
    assert rig.run(store).listed == Tally(1, 10)


def test_a_run_before_the_grace_is_over_deletes_nothing(store: ClockStore) -> None:
    rig.put_volume(store, "v", [])
    pack = rig.put_pack(store)
    store.now += 5 * GRACE
    rig.run(store)
    for _ in range(3):
        store.now += GRACE / 4
        assert rig.run(store).waiting.objects == 1
    assert rig.has_pack(store, pack)
    store.now += GRACE / 4  # the first sighting counts, not the last
    assert rig.run(store).deleted.objects == 1


def test_a_young_object_stays_even_if_its_id_was_seen_before(store: ClockStore) -> None:
    rig.put_volume(store, "v", [])
    pack = rig.put_pack(store)
    store.now += GRACE
    rig.run(store)
    store.now += GRACE
    store.put(names.pack_key(PREFIX, pack.hex()), b"put again")
    assert rig.run(store).waiting.objects == 1
    assert rig.has_pack(store, pack)
    store.now += GRACE / 2 + 1
    assert rig.run(store).waiting.objects == 1
    store.now += GRACE
    assert rig.run(store).deleted.objects == 1


def test_a_sighting_of_what_an_upload_may_commit_does_not_count(store: ClockStore) -> None:
    """Seen between put and commit; named for a day; dropped, while a fork that holds it is under way."""
    pack = rig.put_pack(store)
    rig.put_volume(store, "v", [])
    rig.run(store)
    store.now += GRACE / 4
    key = rig.put_volume(store, "v", [pack])
    store.now += GRACE / 2
    # Here a host reads the root for a fork.
    store.delete(key)
    store.now += GRACE / 4
    rig.run(store)
    rig.put_volume(store, "fork", [pack])
    assert rig.has_pack(store, pack)


def test_what_is_named_again_starts_anew(store: ClockStore) -> None:
    pack = rig.put_pack(store)
    rig.put_volume(store, "v", [])
    store.now += GRACE
    rig.run(store)
    store.now += GRACE / 2
    key = rig.put_volume(store, "fork", [pack])
    assert rig.run(store).unreferenced.objects == 0
    assert first_seen(decode_state(STATE, store.data(STATE))) == ({}, {})
    store.delete(key)
    store.now += GRACE / 2
    assert rig.run(store).waiting.objects == 1
    store.now += GRACE - 1
    assert rig.run(store).deleted.objects == 0
    store.now += 1
    assert rig.run(store).deleted.objects == 1


def test_a_sighting_begins_at_the_end_of_a_run(store: ClockStore) -> None:
    """A root may have gone while the run read others."""
    rig.put_volume(store, "v", [])
    pack = rig.put_pack(store)
    store.now += GRACE

    def slow(op: str, key: str) -> None:
        if op == "list" and key == names.bases_prefix(PREFIX):
            store.now += GRACE / 2  # twice per run

    store.hook = slow
    rig.run(store)
    store.hook = lambda op, key: None
    assert store.now == rig.START + 2 * GRACE
    rig.run(store)  # a grace after the start of the first
    assert rig.has_pack(store, pack)
    store.now += GRACE
    assert rig.run(store).deleted.objects == 1


def test_ages_end_at_the_start_of_a_run(store: ClockStore) -> None:
    """Roots that are read early in a long run do not know what was committed in it."""
    rig.put_volume(store, "v", [])
    pack = rig.put_pack(store)
    store.now += GRACE
    rig.run(store)
    store.now += GRACE / 4

    def slow(op: str, key: str) -> None:
        if op == "list" and key == names.tags_prefix(PREFIX):
            store.now += GRACE

    store.hook = slow
    assert rig.run(store).waiting.objects == 1
    assert rig.has_pack(store, pack)


def test_the_local_clock_does_not_count(store: ClockStore, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.put_volume(store, "v", [])
    pack = rig.put_pack(store)
    store.now += GRACE
    rig.run(store)
    monkeypatch.setattr("time.time", lambda: store.now + 100 * GRACE)
    rig.run(store)
    assert rig.has_pack(store, pack)


def test_a_time_in_the_future_heals(store: ClockStore) -> None:
    """The store's clock was wrong during one run: its sightings begin anew when it is right again."""
    rig.put_volume(store, "v", [])
    pack = rig.put_pack(store)
    store.now += 1000 * GRACE
    rig.run(store)
    store.now -= 999 * GRACE
    rig.run(store)
    packs, _ = first_seen(decode_state(STATE, store.data(STATE)))
    assert packs == {pack: store.now}
    store.now += GRACE
    assert rig.run(store).deleted.objects == 1


def test_the_state_is_lost(store: ClockStore) -> None:
    rig.put_volume(store, "v", [])
    pack = rig.put_pack(store)
    store.now += GRACE
    rig.run(store)
    store.now += GRACE
    store.put(STATE, rig.flipped(store.data(STATE)))
    result = rig.run(store)
    assert "corrupt" in result.note
    assert result.waiting.objects == 1
    assert rig.has_pack(store, pack)
    store.now += GRACE
    assert (rig.run(store).deleted.objects, rig.has_pack(store, pack)) == (1, False)


def test_shared_pages_are_read_once(store: ClockStore) -> None:
    pack = rig.put_pack(store)
    page = rig.put_page(store, [pack])
    for number in range(40):
        put_root(store, names.manifest_key(PREFIX, f"v{number}"), rig.paged_root("v", [page]))
    store.requests.clear()
    assert rig.run(store).marked.objects == 2
    # 40 roots, the state, and the page: a few may find it unread at the same moment.
    assert store.requests["get"] <= 41 + 4 * gc_mark.THREADS


def test_strays_under_bases_stay(store: ClockStore) -> None:
    strays = {names.hot_set_key(PREFIX, "b"), f"{PREFIX}/packs/README"}
    for stray in strays:
        store.put(stray, b"?")
    assert rig.run_twice(store).strays == 1
    assert strays <= store.key_set()


# -- failing closed -------------------------------------------------------------------------------


def _doomed(store: ClockStore) -> tuple[bytes, bytes]:
    """A pack and a page that the next run would delete, beside roots of every kind."""
    kept = rig.put_pack(store)
    rig.put_volume(store, "v", [kept])
    put_root(store, names.snapshot_key(PREFIX, "v", 1), rig.inline_root("v", [kept]))
    put_root(store, names.tag_key(PREFIX, "t"), rig.inline_root("v", [kept]))
    rig.put_base(store, "b", [kept])
    page = rig.put_page(store, [kept])
    put_root(store, names.manifest_key(PREFIX, "big"), rig.paged_root("big", [page]))
    doomed = rig.put_pack(store), rig.put_page(store, [])
    store.now += GRACE
    rig.run(store)
    store.now += GRACE
    return doomed


def _refused(store: ClockStore, doomed: tuple[bytes, bytes], kind: type[GlideError]) -> GlideError:
    state = store.data(STATE)
    with pytest.raises(kind) as caught:
        rig.run(store)
    assert rig.has_pack(store, doomed[0])
    assert rig.has_page(store, doomed[1])
    assert store.data(STATE) == state
    return caught.value


@pytest.mark.parametrize(
    "key",
    [
        names.manifest_key(PREFIX, "v"),
        names.snapshot_key(PREFIX, "v", 1),
        names.tag_key(PREFIX, "t"),
        names.base_manifest_key(PREFIX, "b"),
    ],
)
def test_one_corrupt_root(store: ClockStore, key: str) -> None:
    doomed = _doomed(store)
    store.put(key, rig.flipped(store.data(key)))
    assert key in str(_refused(store, doomed, CorruptObject))


def test_a_corrupt_page(store: ClockStore) -> None:
    doomed = _doomed(store)
    page = rig.put_page(store, [])
    key = names.page_key(PREFIX, page.hex())
    store.put(key, b"x" * 100)
    put_root(store, names.manifest_key(PREFIX, "big"), rig.paged_root("big", [page]))
    assert key in str(_refused(store, doomed, CorruptObject))


def test_a_page_that_is_missing(store: ClockStore) -> None:
    doomed = _doomed(store)
    page = rig.new_id()
    put_root(store, names.manifest_key(PREFIX, "big"), rig.paged_root("big", [page]))
    error = _refused(store, doomed, CorruptObject)
    assert page.hex() in str(error)
    assert "volumes/big" in str(error)


@pytest.mark.parametrize("place", ["packs", "pages", "volumes", "bases", "tags"])
def test_an_error_of_a_listing(store: ClockStore, place: str) -> None:
    doomed = _doomed(store)

    def fail(op: str, key: str) -> None:
        if op == "list" and key == f"{PREFIX}/{place}/":
            raise StoreUnavailable("no", key=key, op=op)

    store.hook = fail
    _refused(store, doomed, StoreUnavailable)


def test_an_error_in_the_middle_of_a_listing(store: ClockStore) -> None:
    doomed = _doomed(store)
    store.list_limit = 1
    pages: list[str] = []

    def fail(op: str, key: str) -> None:
        if op == "list" and key == names.volumes_prefix(PREFIX):
            pages.append(key)
            if len(pages) == 2:
                raise StoreUnavailable("no", key=key, op=op)

    store.hook = fail
    _refused(store, doomed, StoreUnavailable)


def test_a_root_that_may_not_be_read(store: ClockStore) -> None:
    doomed = _doomed(store)

    def fail(op: str, key: str) -> None:
        if op == "get" and key == names.tag_key(PREFIX, "t"):
            raise AccessDenied(key=key, op=op)

    store.hook = fail
    _refused(store, doomed, AccessDenied)


@pytest.mark.parametrize(
    "key", ["volumes/v/leases/1", "volumes/v", "bases/b/x", "tags/t/x", "roots/new", "snapshots/v/1"]
)
def test_an_object_of_an_unknown_kind(store: ClockStore, key: str) -> None:
    """A newer version may keep roots there."""
    doomed = _doomed(store)
    store.put(f"{PREFIX}/{key}", b"?")
    assert f"{PREFIX}/{key.split('/')[0]}/" in str(_refused(store, doomed, GcRefused))


def test_a_failed_put_of_the_state(store: ClockStore) -> None:
    doomed = _doomed(store)

    def fail(op: str, key: str) -> None:
        if op == "put" and key == STATE:
            raise StoreUnavailable("no", key=key, op=op)

    store.hook = fail
    _refused(store, doomed, StoreUnavailable)


# -- bounds, crashes, dry runs --------------------------------------------------------------------


def test_deletes_are_bounded(store: ClockStore) -> None:
    kept = rig.put_pack(store)
    rig.put_volume(store, "v", [kept])
    for _ in range(25):
        rig.put_pack(store)
    store.now += GRACE
    rig.run(store)
    store.now += GRACE
    left = []
    for _ in range(3):
        result = rig.run(store, limit=10)
        rig.check_sums(result)
        assert result.deleted.objects <= 10
        left.append(result.left.objects)
    assert left == [15, 5, 0]
    assert rig.has_pack(store, kept)


def test_the_oldest_go_first(store: ClockStore) -> None:
    rig.put_volume(store, "v", [])
    packs = []
    for _ in range(3):
        packs.append(rig.put_pack(store))
        store.now += GRACE / 2 + 1
        rig.run(store, limit=0)
    store.now += GRACE
    for number in range(3):
        rig.run(store, limit=1)
        assert [rig.has_pack(store, pack) for pack in packs] == [i > number for i in range(3)]


def test_a_crash_between_state_and_deletes_loses_no_time(store: ClockStore) -> None:
    rig.put_volume(store, "v", [])
    packs = [rig.put_pack(store) for _ in range(3)]
    store.now += GRACE
    rig.run(store)
    store.now += GRACE

    def fail(op: str, key: str) -> None:
        if op == "delete":
            raise StoreUnavailable("crash", key=key, op=op)

    store.hook = fail
    with pytest.raises(StoreUnavailable):
        rig.run(store)
    store.hook = lambda op, key: None
    assert all(rig.has_pack(store, pack) for pack in packs)
    assert rig.run(store).deleted.objects == 3


@pytest.mark.parametrize("due", [False, True])
def test_a_dry_run_writes_nothing(store: ClockStore, due: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = rig.put_pack(store)
    rig.put_volume(store, "v", [kept])
    rig.put_pack(store)
    rig.put_base(store, "b", [], removed_at=1)
    store.now += GRACE
    if due:
        rig.run(store)
        store.now += GRACE
    before = store.snapshot()
    monkeypatch.setattr("time.time", lambda: store.now)
    store.requests.clear()
    result = rig.run(store, dry_run=True)
    assert store.snapshot() == before
    assert not {"put", "delete"} & set(store.requests)
    rig.check_sums(result)
    assert (result.dry_run, result.due.objects, result.deleted.objects) == (True, int(due), 0)


def test_nothing_under_the_prefix_leaves_nothing(store: ClockStore) -> None:
    assert "nothing" in rig.run(store).note
    assert store.key_set() == set()


def test_arguments_out_of_range(store: ClockStore) -> None:
    for options in ({"grace": -1.0}, {"grace": float("nan")}, {"grace": 1.0, "limit": -1}):
        with pytest.raises(ValueError, match="out of range"):
            rig.run(store, **options)


def test_a_store_of_files(tmp_path: Path) -> None:
    with open_store(f"file://{tmp_path}/store", create=True) as store:
        kept, doomed = rig.put_pack(store), rig.put_pack(store)
        page = rig.put_page(store, [kept])
        put_root(store, names.manifest_key(PREFIX, "v"), rig.paged_root("v", [page]))
        assert rig.run(store, grace=0.0).waiting.objects == 1
        result = rig.run(store, grace=0.0)
        assert (result.deleted.objects, result.marked.objects) == (1, 2)
        assert names.pack_key(PREFIX, doomed.hex()) not in {info.key for info in store.list("")}
        assert rig.run(store).listed.objects == 2


def test_progress_is_told(store: ClockStore) -> None:
    rig.put_volume(store, "v", [])
    rig.put_pack(store)
    told = set()
    rig.run_twice(store, progress=lambda what, done, total: told.add(what))
    assert told == {"listing packs", "reading roots", "deleting"}
