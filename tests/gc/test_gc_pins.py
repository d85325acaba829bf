"""Pins: the store names all of a copy from before it is made, whatever becomes of the source meanwhile."""

from __future__ import annotations

from collections.abc import Callable

import gc_rig as rig
import pytest
from gc_rig import GRACE, PREFIX, ClockStore
from stored_roots import put_root

from glidefs import names
from glidefs.errors import GlideError, UnknownExport
from glidefs.exports.copies.pins import pinned
from glidefs.names import Source

SOURCE = Source("volume", "v")
KEY = names.manifest_key(PREFIX, "v")


def pins(store: ClockStore) -> list[str]:
    return [key for key in store.key_set() if key.startswith(names.pins_prefix(PREFIX))]


def before_pin(store: ClockStore, act: Callable[[], None], times: int = 1) -> None:
    """Do that when the source was read, and its pin is about to be put."""
    left = [times]

    def hook(op: str, key: str) -> None:
        if op == "put" and key.startswith(names.pins_prefix(PREFIX)) and left[0]:
            left[0] -= 1
            act()

    store.hook = hook


def test_a_pin_is_there_in_the_block_and_gone_after_it(store: ClockStore) -> None:
    pack = rig.put_pack(store)
    rig.put_volume(store, "v", [pack])
    with pinned(store, PREFIX, SOURCE, None) as root:
        assert root.name == "v"
        assert len(pins(store)) == 1
        store.delete(KEY)
        store.now += 3 * GRACE / 4
        assert rig.run(store).marked.objects == 1
    assert pins(store) == []


def test_a_pin_goes_when_what_is_made_of_it_fails(store: ClockStore) -> None:
    rig.put_volume(store, "v", [])
    with pytest.raises(ZeroDivisionError), pinned(store, PREFIX, SOURCE, None):
        raise ZeroDivisionError
    assert pins(store) == []


def test_a_source_that_commits_meanwhile_is_read_again(store: ClockStore) -> None:
    """! The pin of what it was may name what gc did not see at an earlier run."""
    old, new = rig.put_pack(store), rig.put_pack(store)
    rig.put_volume(store, "v", [old])
    before_pin(store, lambda: rig.put_volume(store, "v", [new]))
    with pinned(store, PREFIX, SOURCE, None) as root:
        assert root.inline_page is not None
        assert [ref.id for ref in root.inline_page.packs] == [new]
        assert len(pins(store)) == 1


@pytest.mark.parametrize("tombstone", [False, True])
def test_a_source_that_goes_meanwhile_is_no_source(store: ClockStore, tombstone: bool) -> None:
    rig.put_volume(store, "v", [rig.put_pack(store)])

    def remove() -> None:
        if tombstone:
            put_root(store, KEY, rig.inline_root("v", [], removed_at=1))
        else:
            store.delete(KEY)

    before_pin(store, remove)
    with pytest.raises(UnknownExport), pinned(store, PREFIX, SOURCE, None):
        pytest.fail("it is gone")
    assert pins(store) == []


def test_a_source_that_does_not_keep_still_says_so(store: ClockStore) -> None:
    rig.put_volume(store, "v", [])
    before_pin(store, lambda: rig.put_volume(store, "v", [rig.put_pack(store)]), times=100)
    with pytest.raises(GlideError, match="changes all the time"), pinned(store, PREFIX, SOURCE, None):
        pytest.fail("it was never the same twice")
    assert pins(store) == []


def test_gc_keeps_what_a_pin_names_and_deletes_one_that_is_left(store: ClockStore) -> None:
    pack = rig.put_pack(store)
    key = names.pin_key(PREFIX, "0" * 32)
    put_root(store, key, rig.inline_root("v", [pack]))
    store.now += GRACE - 1
    result = rig.run(store)
    assert (result.pins, result.marked.objects) == (0, 1)
    store.now += 1
    assert rig.run(store, dry_run=True).pins == 0
    assert rig.run(store, limit=0).pins == 0
    result = rig.run(store)
    assert (result.pins, result.marked.objects) == (1, 1)
    assert key not in store.key_set()
    assert rig.has_pack(store, pack)
    rig.run(store)
    store.now += GRACE
    rig.run(store)
    assert not rig.has_pack(store, pack)
