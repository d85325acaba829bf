"""Random histories of a prefix, with runs of gc between and inside of them.

Hosts keep the rules that gc relies on: packs are committed within half the grace of their put, a fork's
root is put within a quarter of reading its source. Then no run may take what a root names, or what an
upload, fork or bless under way may still name; and when nothing happens any more, all else goes.
A bless that goes on from a checkpoint finds all its packs, whatever the clocks of the hosts say.

Two things are left out, because a store without transactions cannot rule them out. More than one
root handed on (fork put, source removed) within one run. And objects that only a fork under way holds,
which had been in that position before, and were named in between but not when a run looked: such a
fork is given up here.
"""

from __future__ import annotations

import os
from random import Random
from typing import TypeAlias

import gc_rig as rig
import msgspec
import pytest
from gc_rig import GRACE, PREFIX, ClockStore, InlinePool
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from stored_roots import put_root

from glidefs import names
from glidefs.bless import resume
from glidefs.formats.blessing import PutPack, encode_blessing, make_blessing
from glidefs.formats.manifest import PackRef, Root, decode_root
from glidefs.formats.pack import TRAILER_SIZE
from glidefs.gc import run as gc_module

POOL = gc_module.ThreadPoolExecutor
FACTOR = {"quick": 1, "long": 20}.get(os.environ.get("GLIDEFS_TEST_LENGTH", ""), 2)
TICKS = (1.0, GRACE / 8, GRACE / 4, GRACE / 2, GRACE)


class Upload(msgspec.Struct):
    volume: str
    packs: list[bytes]
    put_at: float


class Fork(msgspec.Struct):
    root: Root
    read_at: float


class Bless(msgspec.Struct):
    """A bless under way, and its packs with when they were put by the host's clock."""

    base: str
    skew: float
    packs: list[PutPack]


class Prefix:
    """The hosts of a prefix. Each method does one step; ``number`` chooses on what."""

    def __init__(self) -> None:
        rig.restart_ids()
        self.store = ClockStore()
        self.store.list_limit = 2
        self.packs_of: dict[bytes, list[bytes]] = {}
        self.uploads: list[Upload] = []
        self.forks: list[Fork] = []
        self.blesses: list[Bless] = []
        self.counter = 0
        self.in_gap: set[bytes] = set()
        self.was_in_gap: set[bytes] = set()

    # -- what there is ---------------------------------------------------------------------------

    def root_keys(self, *kinds: str) -> list[str]:
        found = []
        for key in sorted(self.store.key_set()):
            match key.split("/"):
                case [_, "volumes", _, "manifest"] if "volume" in kinds:
                    found.append(key)
                case [_, "volumes", _, "snapshots", _] if "snapshot" in kinds:
                    found.append(key)
                case [_, "tags", _] if "tag" in kinds:
                    found.append(key)
                case [_, "bases", _, "manifest"] if "base" in kinds:
                    found.append(key)
        return found

    def all_roots(self) -> list[Root]:
        return [self.root(key) for key in self.root_keys("volume", "snapshot", "tag", "base")]

    def root(self, key: str) -> Root:
        return decode_root(key, self.store.data(key))

    def packs(self, root: Root) -> list[bytes]:
        if root.inline_page is not None:
            return [ref.id for ref in root.inline_page.packs]
        return [pack for page in root.page_ids if page for pack in self.packs_of[page]]

    def ids(self, root: Root) -> set[bytes]:
        return {page for page in root.page_ids if page} | set(self.packs(root))

    def exists(self, id_: bytes) -> bool:
        kind = names.page_key if id_ in self.packs_of else names.pack_key
        return kind(PREFIX, id_.hex()) in self.store.key_set()

    def new_root(self, name: str, packs: list[bytes], paged: bool) -> Root:
        if not paged:
            return rig.inline_root(name, packs)
        pages = []
        for half in (packs[::2], packs[1::2]):
            if half:
                page = rig.put_page(self.store, half)
                self.packs_of[page] = half
                pages.append(page)
        return rig.paged_root(name, pages)

    def name(self, kind: str) -> str:
        # The listing's order must not be that of creation.
        self.counter += 1
        return f"{self.counter * 7 % 10}{kind}{self.counter}"

    # -- steps -----------------------------------------------------------------------------------

    def tick(self, number: int) -> None:
        self.store.now += TICKS[number % len(TICKS)]

    def create(self, number: int) -> None:
        name = self.name("v")
        put_root(self.store, names.manifest_key(PREFIX, name), self.new_root(name, [], False))

    def upload(self, number: int) -> None:
        if keys := self.root_keys("volume"):
            packs = [rig.put_pack(self.store) for _ in range(1 + number % 3)]
            self.uploads.append(Upload(keys[number % len(keys)], packs, self.store.now))

    def commit(self, number: int) -> None:
        if not self.uploads:
            return
        upload = self.uploads.pop(number % len(self.uploads))
        if upload.volume not in self.store.key_set():
            return
        packs = upload.packs
        if self.store.now - upload.put_at > GRACE / 2:
            packs = [rig.put_pack(self.store) for _ in packs]
        old = self.root(upload.volume)
        new = self.new_root(old.name, self.packs(old) + packs, number % 2 == 0)
        put_root(self.store, upload.volume, new)

    def compact(self, number: int) -> None:
        if keys := self.root_keys("volume"):
            key = keys[number % len(keys)]
            packs = self.packs(self.root(key))[number % 3 :]
            new = self.new_root(self.root(key).name, [*packs, rig.put_pack(self.store)], number % 2 == 0)
            put_root(self.store, key, new)

    def keep(self, number: int) -> None:
        """Snapshot, tag or bless."""
        if not (keys := self.root_keys("volume")):
            return
        root = self.root(keys[number % len(keys)])
        key = (
            names.snapshot_key(PREFIX, root.name, self.counter),
            names.tag_key(PREFIX, f"t{number % 2}"),
            names.base_manifest_key(PREFIX, self.name("b")),
        )[number % 3]
        self.counter += 1
        put_root(self.store, key, root)

    def remove(self, number: int) -> None:
        if not (keys := self.root_keys("volume", "snapshot", "tag", "base")):
            return
        key = keys[number % len(keys)]
        if "/bases/" not in key:
            self.store.delete(key)
        elif not self.root(key).removed_at:
            gone = msgspec.structs.replace(self.root(key), removed_at=int(self.store.now))
            put_root(self.store, key, gone)

    def begin_fork(self, number: int) -> None:
        """From any root; of a removed base as long as a cache may have it."""
        keys = [
            key
            for key in self.root_keys("volume", "snapshot", "tag", "base")
            if not (at := self.root(key).removed_at) or self.store.now - at <= GRACE / 4
        ]
        if keys:
            self.forks.append(Fork(self.root(keys[number % len(keys)]), self.store.now))

    def end_fork(self, number: int) -> None:
        if not self.forks:
            return
        fork = self.forks.pop(number % len(self.forks))
        if self.store.now - fork.read_at <= GRACE / 4:
            name = self.name("f")
            root = msgspec.structs.replace(fork.root, name=name, volume_id=rig.new_id(), removed_at=0)
            put_root(self.store, names.manifest_key(PREFIX, name), root)

    def fork_and_remove(self, number: int) -> None:
        """A fork whose source goes before its own root comes."""
        keys = self.root_keys("volume", "snapshot", "tag")
        if keys:
            key = keys[number % len(keys)]
            self.forks.append(Fork(self.root(key), self.store.now))
            self.store.delete(key)

    def hand_on(self, number: int) -> None:
        """A root whose content never goes: the fork is there before the source is removed."""
        keys = self.root_keys("volume")
        if keys:
            old = keys[number % len(keys)]
            root = msgspec.structs.replace(self.root(old), name=self.name("h"), volume_id=rig.new_id())
            put_root(self.store, names.manifest_key(PREFIX, root.name), root)
            self.store.delete(old)

    def bless(self, number: int) -> None:
        """Begin or go on with the bless of a name, on a host with some clock."""
        base, skew = f"{number % 3}image", (number % 5 - 2) * GRACE
        packs = resume.load(self.store, PREFIX, base, int(self.store.now + skew), GRACE / 2)
        assert all(self.exists(pack.ref.id) for pack in packs)
        self.blesses.append(Bless(base, skew, packs))

    def bless_more(self, number: int) -> None:
        """Another pack of a bless, and maybe its checkpoint."""
        if not self.blesses:
            return
        bless = self.blesses[number % len(self.blesses)]
        now = int(self.store.now + bless.skew)
        bless.packs.append(PutPack(PackRef(rig.put_pack(self.store), 100, TRAILER_SIZE), now))
        if number % 4:
            key = names.blessing_key(PREFIX, bless.base)
            self.store.put(key, encode_blessing(make_blessing(now, bless.packs, now), key))

    def bless_dies(self, number: int) -> None:
        if self.blesses:
            self.blesses.pop(number % len(self.blesses))

    def publish(self, number: int) -> None:
        """The end of a bless. What grew too old is copied, if it is there; else the bless fails."""
        if not self.blesses:
            return
        bless = self.blesses.pop(number % len(self.blesses))
        ids = [pack.ref.id for pack in bless.packs]
        for at, pack in enumerate(bless.packs):
            if self.store.now + bless.skew - pack.put_at > GRACE / 2:
                if not self.exists(ids[at]):
                    return
                ids[at] = rig.put_pack(self.store)
        key = names.base_manifest_key(PREFIX, bless.base)
        if key not in self.store.key_set():
            put_root(self.store, key, self.new_root(bless.base, ids, number % 2 == 0))
            if number % 3:  # else it dies here
                self.store.delete(names.blessing_key(PREFIX, bless.base))

    def step(self, what: str, number: int) -> None:
        getattr(self, what)(number)
        self.give_up_forks()

    def give_up_forks(self) -> None:
        named = set().union(*map(self.ids, self.all_roots()))
        self.was_in_gap |= self.in_gap & named
        self.in_gap -= named
        self.forks = [fork for fork in self.forks if not (self.ids(fork.root) - named) & self.was_in_gap]
        for fork in self.forks:
            self.in_gap |= self.ids(fork.root) - named

    # -- what must hold --------------------------------------------------------------------------

    def check(self) -> None:
        needed = set().union(*map(self.ids, self.all_roots()))
        for fork in self.forks:
            if self.store.now - fork.read_at <= GRACE / 4:
                needed |= self.ids(fork.root)
        for upload in self.uploads:
            if self.store.now - upload.put_at <= GRACE / 2:
                needed |= set(upload.packs)
        for bless in self.blesses:
            now = self.store.now + bless.skew
            needed |= {pack.ref.id for pack in bless.packs if now - pack.put_at <= GRACE / 2}
        lost = {id_.hex() for id_ in needed if not self.exists(id_)}
        assert not lost

    def settle(self) -> None:
        """Nothing happens any more: all that no root names goes."""
        self.uploads, self.forks, self.blesses = [], [], []
        for _ in range(2):
            self.store.now += GRACE
            self.run(1000, [])  # old tombstones and checkpoints go
        for _ in range(2):
            self.run(1000, [])
            self.check()
            self.store.now += GRACE
        left = {
            bytes.fromhex(key[-32:])
            for place in ("packs", "pages")
            for key in self.store.key_set(f"{PREFIX}/{place}/")
        }
        assert left == set().union(*map(self.ids, self.all_roots()))
        assert not [key for key in self.store.key_set() if key.endswith("/blessing")]

    def day(self, quarters: list[Steps], races: Races) -> None:
        """What happens in a grace, and a run at its end."""
        for steps in quarters:
            for what, number in steps:
                self.step(what, number)
            self.store.now += GRACE / 4
        self.run(1000, races)

    def run(self, limit: int, races: Races) -> None:
        requests = 0
        busy = False

        def hook(op: str, key: str) -> None:
            nonlocal requests, busy
            if busy:
                return
            requests += 1
            busy = True
            for at, what, number in races:
                if at == requests:
                    self.step(what, number)
            busy = False

        self.store.hook = hook
        try:
            rig.check_sums(rig.run(self.store, limit=limit))
        finally:
            self.store.hook = lambda op, key: None
        self.give_up_forks()
        if not races:
            self.was_in_gap -= set().union(*map(self.ids, self.all_roots()))


STEPS = (
    *("tick", "create", "upload", "commit", "compact", "keep", "remove", "begin_fork", "end_fork"),
    # What makes and ends roots is worth more.
    *("upload", "commit", "commit", "remove", "end_fork", "end_fork", "tick", "fork_and_remove"),
    *("bless", "bless_more", "bless_more", "bless_dies", "publish"),
)
Steps: TypeAlias = list[tuple[str, int]]
Races: TypeAlias = list[tuple[int, str, int]]
AT, NUMBER = (1, 60), (0, 60)
"""Requests of a run at which something else happens, and what a step chooses by."""
step_lists = st.lists(st.tuples(st.sampled_from(STEPS), st.integers(*NUMBER)), max_size=4)
race_lists = st.one_of(
    st.lists(st.tuples(st.integers(*AT), st.sampled_from(STEPS), st.integers(*NUMBER)), max_size=3),
    st.lists(st.tuples(st.integers(*AT), st.just("hand_on"), st.integers(*NUMBER)), max_size=1),
)


class GcMachine(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        gc_module.ThreadPoolExecutor = InlinePool  # type: ignore[misc]
        self.prefix = Prefix()
        self.prefix.create(0)

    @rule(steps=step_lists)
    def work(self, steps: Steps) -> None:
        for what, number in steps:
            self.prefix.step(what, number)

    @rule(limit=st.sampled_from([1, 3, 1000]), races=race_lists)
    def gc(self, limit: int, races: Races) -> None:
        self.prefix.run(limit, races)

    @rule(quarters=st.lists(step_lists, min_size=4, max_size=4), races=race_lists)
    def a_day(self, quarters: list[Steps], races: Races) -> None:
        self.prefix.day(quarters, races)

    @invariant()
    def nothing_is_lost(self) -> None:
        if hasattr(self, "prefix"):
            self.prefix.check()

    def teardown(self) -> None:
        gc_module.ThreadPoolExecutor = POOL  # type: ignore[misc]
        if hasattr(self, "prefix"):
            self.prefix.settle()


def random_history(random: Random) -> None:
    """One history, much faster than Hypothesis makes them, from the same steps."""

    def steps() -> Steps:
        return [(random.choice(STEPS), random.randint(*NUMBER)) for _ in range(random.randint(0, 4))]

    def races() -> Races:
        if random.random() < 0.5:
            return [(random.randint(*AT), "hand_on", random.randint(*NUMBER))]
        some = range(random.randint(0, 3))
        return [(random.randint(*AT), random.choice(STEPS), random.randint(*NUMBER)) for _ in some]

    prefix = Prefix()
    prefix.create(0)
    for _ in range(random.randint(4, 20)):
        if random.random() < 0.3:
            prefix.run(random.choice([1, 3, 1000]), races())
        else:
            prefix.day([steps() for _ in range(4)], races())
        prefix.check()
    prefix.settle()


@pytest.mark.parametrize("seed", range(4))
def test_many_random_histories(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gc_module, "ThreadPoolExecutor", InlinePool)
    for number in range(30 * FACTOR):
        random_history(Random(f"{seed}/{number}"))


TestGcModel = GcMachine.TestCase
TestGcModel.settings = settings(
    max_examples=60 * FACTOR,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
