"""Checkpoints of interrupted blesses: what they keep, when they go, and a bless that goes on meanwhile."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import gc_rig as rig
import pytest
from gc_rig import GRACE, PREFIX, ClockStore

from glidefs import names
from glidefs.bases.stored import load_base
from glidefs.bless import resume
from glidefs.bless.bless import BlessResult, bless
from glidefs.errors import GlideError, NewerFormat
from glidefs.formats import blessing as format_
from glidefs.formats import envelope
from glidefs.formats.blessing import decode_blessing
from glidefs.formats.gc_state import decode_state
from glidefs.formats.pack import BLOCK
from glidefs.offline.export import export_image

STATE = names.gc_state_key(PREFIX)
KEY = names.blessing_key(PREFIX, "b")
MANIFEST = names.base_manifest_key(PREFIX, "b")


def test_it_keeps_its_packs_and_goes_with_the_second_run(store: ClockStore) -> None:
    pack = rig.put_pack(store)
    key = rig.put_checkpoint(store, "b", [pack])
    store.now += GRACE + 1
    first = rig.run(store)  # old, but seen for the first time
    rig.check_sums(first)
    assert (first.roots, first.marked.objects, first.checkpoints) == (
        0,
        1,
        0,
    )
    store.now += GRACE - 1
    assert rig.run(store).checkpoints == 0
    store.now += 1
    second = rig.run(store)
    assert (second.checkpoints, second.unreferenced.objects) == (1, 0)
    assert key not in store.key_set()
    # What it named has its own grace from here.
    assert rig.run(store).waiting.objects == 1
    store.now += GRACE - 1
    assert rig.run(store).deleted.objects == 0
    store.now += 1
    assert rig.run(store).deleted.objects == 1
    assert not rig.has_pack(store, pack)


def test_one_that_is_written_again_begins_anew(store: ClockStore) -> None:
    packs = [rig.put_pack(store)]
    rig.put_checkpoint(store, "b", packs)
    for _ in range(5):
        rig.run(store)
        store.now += GRACE / 2
        packs.append(rig.put_pack(store))
        rig.put_checkpoint(store, "b", packs)
        store.now += GRACE / 2
    assert KEY in store.key_set()
    assert all(rig.has_pack(store, pack) for pack in packs)
    store.now += GRACE
    assert rig.run(store).checkpoints == 0  # no run saw the last version
    store.now += GRACE
    assert rig.run(store).checkpoints == 1


def test_one_whose_base_is_there_goes_at_once(store: ClockStore) -> None:
    used, unused = rig.put_pack(store), rig.put_pack(store)
    rig.put_checkpoint(store, "b", [used, unused])
    other = rig.put_checkpoint(store, "other", [])
    rig.put_base(store, "b", [used])
    result = rig.run(store)
    assert (result.checkpoints, result.unreferenced.objects) == (1, 0)
    assert KEY not in store.key_set()
    assert other in store.key_set()
    rig.run_twice(store)
    assert (rig.has_pack(store, used), rig.has_pack(store, unused)) == (True, False)


def test_of_a_removed_base_too(store: ClockStore) -> None:
    rig.put_checkpoint(store, "b", [])
    rig.put_base(store, "b", [], removed_at=1)
    assert rig.run(store).checkpoints == 1


def test_the_clock_was_wrong_once(store: ClockStore) -> None:
    """A sighting in the future is one of now."""
    rig.put_checkpoint(store, "b", [rig.put_pack(store)])
    store.now += 1000 * GRACE
    assert rig.run(store).checkpoints == 0
    store.now -= 999 * GRACE
    assert rig.run(store).checkpoints == 0
    assert [seen.since for seen in decode_state(STATE, store.data(STATE)).checkpoints] == [store.now]
    store.now += GRACE
    assert rig.run(store).checkpoints == 1


def test_a_sighting_in_the_past_is_not_enough(store: ClockStore) -> None:
    """The store's clock was behind during one run."""
    rig.put_checkpoint(store, "b", [rig.put_pack(store)])
    store.now -= 10 * GRACE
    rig.run(store)
    store.now += 10 * GRACE + 1
    assert rig.run(store).checkpoints == 0
    store.now += GRACE
    assert rig.run(store).checkpoints == 1


def test_a_damaged_one_keeps_nothing_and_goes(store: ClockStore) -> None:
    pack = rig.put_pack(store)
    key = rig.put_checkpoint(store, "b", [pack])
    store.put(key, rig.flipped(store.data(key)))
    store.now += GRACE + 1
    result = rig.run(store)
    assert key in result.note
    assert (result.marked.objects, result.waiting.objects) == (0, 1)
    store.now += GRACE
    result = rig.run(store)
    assert (result.checkpoints, result.deleted.objects) == (1, 1)
    assert key not in store.key_set()


@pytest.mark.parametrize(("major", "flags"), [(format_.FORMAT + 1, 0), (format_.FORMAT, 1 << 31)])
def test_one_of_a_newer_version_ends_the_run(store: ClockStore, major: int, flags: int) -> None:
    """It may name packs."""
    pack = rig.put_pack(store)
    store.now += GRACE
    rig.run(store)
    store.now += GRACE
    store.put(KEY, envelope.seal(format_.BLESSING_MAGIC, major, 0, flags, b"?", KEY.encode()))
    with pytest.raises(NewerFormat):
        rig.run(store)
    assert rig.has_pack(store, pack)


def test_a_dry_run_and_a_limit(store: ClockStore) -> None:
    keys = {rig.put_checkpoint(store, f"b{i}", [rig.put_pack(store)]) for i in range(5)}
    doomed = rig.put_pack(store)
    for i in range(5):
        rig.put_base(store, f"b{i}", [])
    store.now += GRACE
    assert rig.run(store, limit=0).checkpoints == 0
    store.now += GRACE
    assert rig.run(store, dry_run=True).checkpoints == 0
    assert keys <= store.key_set()
    result = rig.run(store, limit=3)
    assert (result.checkpoints, result.deleted.objects) == (3, 0)
    result = rig.run(store, limit=3)
    assert (result.checkpoints, result.deleted.objects) == (2, 1)
    assert not rig.has_pack(store, doomed)
    assert not keys & store.key_set()


# -- a bless that goes on ---------------------------------------------------------------------------


class Host:
    """Where blesses run. Its clock is that of the store, ``skew`` seconds off."""

    def __init__(self, store: ClockStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.store = store
        self.skew = 0.0
        self.image = tmp_path / "image"
        self.image.write_bytes(random.Random(1).randbytes(160 * BLOCK))
        self._copy = tmp_path / "copy"
        monkeypatch.setattr("time.time", lambda: self.store.now + self.skew)

    def bless(self, *, stop: bool = False) -> BlessResult:
        def progress(done: int, total: int) -> None:
            if stop and done >= 144 * BLOCK:
                raise KeyboardInterrupt

        return bless(
            self.store,
            PREFIX,
            "b",
            self.image,
            pack_bytes=2 * BLOCK,
            workers=1,
            max_age=GRACE / 2,
            progress=progress,
        )

    def interrupt(self) -> int:
        """A bless that ends early. The packs of its checkpoint."""
        with pytest.raises(KeyboardInterrupt):
            self.bless(stop=True)
        return len(decode_blessing(KEY, self.store.data(KEY)).packs)

    def check(self) -> None:
        """The base is whole."""
        export_image(self.store, PREFIX, "base:b", self._copy, force=True)
        assert self._copy.read_bytes() == self.image.read_bytes()


@pytest.fixture
def host(store: ClockStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(store, tmp_path, monkeypatch)


@pytest.mark.parametrize("age", [0.0, 0.3, 0.45, 0.55, 0.9, 1.1, 2.0, 2.5, 4.0])
@pytest.mark.parametrize("skew", [0.0, -3 * GRACE, 3 * GRACE])
def test_at_any_age_and_with_any_clock(store: ClockStore, host: Host, age: float, skew: float) -> None:
    """Another host goes on, whose clock differs, and gc runs all the time."""
    known = host.interrupt()
    assert known >= 4
    for _ in range(round(age * 20)):
        store.now += GRACE / 20
        rig.run(store)
    host.skew = skew
    result = host.bless()
    assert result.reused_packs == (known if age <= 0.5 else 0)
    host.check()
    rig.run_twice(store)
    rig.run_twice(store)
    host.check()
    # Nothing is left of what the base does not name.
    assert len(store.key_set(f"{PREFIX}/packs/")) == result.packs
    assert KEY not in store.key_set()


def test_ages_add_up_over_several_interruptions(store: ClockStore, host: Host) -> None:
    """Each host has another clock; what was put first is too old at the third."""
    first = host.interrupt()
    store.now += 0.3 * GRACE
    host.skew = -5 * GRACE
    assert host.interrupt() >= first
    store.now += 0.15 * GRACE
    host.skew = 5 * GRACE
    assert host.interrupt() >= first
    store.now += 0.1 * GRACE
    host.skew = 0.0
    assert host.bless().reused_packs == 0
    host.check()


def test_what_is_too_old_is_put_again_from_there_on(store: ClockStore, host: Host) -> None:
    known = host.interrupt()
    found = decode_blessing(KEY, store.data(KEY))
    packs = [
        format_.PutPack(pack.ref, pack.put_at - (int(GRACE) if number == known // 2 else 0))
        for number, pack in enumerate(found.packs)
    ]
    again = format_.make_blessing(found.started_at, packs, found.saved_at)
    store.put(KEY, format_.encode_blessing(again, KEY))
    assert host.bless().reused_packs == known // 2
    host.check()


def before(store: ClockStore, op: str, key: str, action: Callable[[], object]) -> list[int]:
    """Do `action` once, before a request. The list has an element once it was done."""
    seen: list[int] = []

    def hook(found_op: str, found_key: str) -> None:
        if (found_op, found_key) == (op, key) and not seen:
            seen.append(1)
            action()

    store.hook = hook
    return seen


def _stale(store: ClockStore) -> None:
    """The next run is about to remove the checkpoint."""
    store.now += GRACE + 1
    rig.run(store)
    store.now += GRACE


def test_a_bless_takes_it_just_before_gc_does(
    store: ClockStore, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the ages that it goes by here it may (as if the store's clock were wrong): gc stands back."""
    host.interrupt()
    _stale(store)
    taken = []

    def take() -> None:
        taken.append(resume.load(store, PREFIX, "b", int(store.now), 10 * GRACE))

    seen = before(store, "put", STATE, take)
    assert rig.run(store).checkpoints == 0
    assert seen
    assert taken[0]
    assert all(rig.has_pack(store, pack.ref.id) for pack in taken[0])
    store.hook = lambda op, key: None
    for _ in range(2):
        store.now += GRACE - 1
        rig.run(store)
        assert all(rig.has_pack(store, pack.ref.id) for pack in taken[0])


def test_gc_takes_it_just_before_a_bless_does(
    store: ClockStore, host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    host.interrupt()
    _stale(store)
    result = []

    def run() -> None:
        store.hook = lambda op, key: None
        result.append(rig.run(store).checkpoints)

    before(store, "put", KEY, run)
    assert resume.load(store, PREFIX, "b", int(store.now), 10 * GRACE) == []
    assert result == [1]
    assert "beginning anew" in caplog.text
    caplog.clear()


def test_two_blesses_do_not_both_take_it(
    store: ClockStore, host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    host.interrupt()
    taken = []

    def other() -> None:
        store.hook = lambda op, key: None
        taken.append(resume.load(store, PREFIX, "b", int(store.now), GRACE / 2))

    before(store, "put", KEY, other)
    assert resume.load(store, PREFIX, "b", int(store.now), GRACE / 2) == []
    assert taken[0]
    caplog.clear()


def test_a_put_whose_answer_was_lost_is_its_own(store: ClockStore, host: Host) -> None:
    from glidefs.store.resilient import ResilientStore

    known = host.interrupt()
    patient = ResilientStore(store, deadline=5.0)
    before(store, "put", KEY, lambda: store.lose_answers("put"))
    assert len(resume.load(patient, PREFIX, "b", int(store.now), GRACE / 2)) == known


def test_a_checkpoint_that_the_delete_hits(store: ClockStore, host: Host) -> None:
    """A bless that began anew saves one between gc's replacement and its delete: it goes on without."""
    host.interrupt()
    _stale(store)
    rest = []

    def bless_all() -> None:
        store.hook = lambda op, key: None
        with pytest.raises(KeyboardInterrupt):
            host.bless(stop=True)

    rest = before(store, "delete", KEY, bless_all)
    assert rig.run(store).checkpoints == 1
    assert rest
    assert KEY not in store.key_set()
    assert host.bless().reused_packs == 0
    host.check()


def test_a_base_that_appears_while_a_bless_goes_on(store: ClockStore, host: Host) -> None:
    """gc removes the checkpoint under the bless, which comes too late with its name anyway."""
    host.interrupt()

    def other() -> None:
        store.hook = lambda op, key: None
        rig.put_base(store, "b", [rig.put_pack(store)])
        assert rig.run(store).checkpoints == 1

    before(store, "put", MANIFEST, other)
    with pytest.raises(GlideError, match="name"):
        host.bless()
    assert load_base(store, PREFIX, "b").root.content_hash == b""
