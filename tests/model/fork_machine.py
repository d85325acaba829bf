"""The state machine over several volumes that share a prefix: forks, snapshots, tags, bases, and gc.

Two nodes with real routers, uploaders and compactors (`fork_world.py`), and what they must hold
(`fork_model.py`). Each rule is something that a guest, an operator, gc or time does.
"""

from __future__ import annotations

import contextlib
import sys
from functools import partial
from typing import TypeAlias

import pytest
from fork_model import AREAS, BASES, LARGE, SMALL, TAGS, ForkModel, Kept, Steps, View, Vol, pick
from fork_rig import PREFIX
from fork_world import GRACE, NODES, tagged
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

from glidefs.errors import ExportExists, GlideError, OwnedElsewhere, StoreError
from glidefs.exports.requests import AttachRequest, PromoteRequest, SnapshotRequest, TagRequest
from glidefs.names import parse_source

SHORT = (1.0, GRACE / 8, GRACE / 4)
STEPS = (*SHORT, GRACE / 2, GRACE * 0.6, GRACE + 1.0)

choices = st.integers(0, 59)
node_names = st.sampled_from(NODES)
waits = st.lists(st.tuples(st.sampled_from(STEPS), st.booleans()), max_size=3)
OUTLAST = [(GRACE * 0.6, True), (GRACE + 1.0, True)]
"""After this gc has deleted what was put before it and not named."""
three_waits = st.tuples(waits, waits, waits)
LONGEST = ([(1.0, True)], [(GRACE * 0.6, False), (GRACE / 4, False)], [(GRACE / 4, True)])
"""A run after a base was removed, and the next while a fork of its fork is under way."""
Span: TypeAlias = tuple[int, int, int]
"""Area, first sector in it, length."""
spans = st.tuples(st.sampled_from(range(len(AREAS))), st.integers(0, 39), st.integers(1, 24))


class ForkMachine(ForkModel):
    """What owners read is exact, what was captured stays as it was, and gc deletes just the rest."""

    @initialize(size=st.sampled_from([SMALL, LARGE]))
    def begin(self, size: int) -> None:
        self.create("a", 0, size)
        self.write_at("a", "v0", (0, 2, 20))

    def teardown(self) -> None:
        try:
            if sys.exc_info()[0] is None:  # else the first failure is what counts
                self.settle()
        finally:
            self.scope.close()

    # -- volumes -----------------------------------------------------------------------------------

    @rule(node=node_names, number=choices, size=st.sampled_from([SMALL, LARGE]))
    def create(self, node: str, number: int, size: int) -> None:
        names = self.free(node)
        if not names:
            return
        name = pick(names, number)
        if name in self.volumes:
            with pytest.raises(ExportExists):
                self.node(node).create(name, size)
            return
        self.known_id(self.node(node).create(name, size).volume_id)
        self.volumes[name] = Vol(node, size, {})

    @rule(number=choices, span=spans)
    def write(self, number: int, span: Span) -> None:
        if self.own():
            self.write_at(*pick(self.own(), number), span)

    @rule(number=choices, span=spans, other=spans)
    def write_and_drain(self, number: int, span: Span, other: Span) -> None:
        if self.own():
            self.write_at(*pick(self.own(), number), span)
            self.drain(number)
            self.write_at(*pick(self.own(), number), other)

    @rule(number=choices, span=spans)
    def zero(self, number: int, span: Span) -> None:
        if self.own():
            self.write_at(*pick(self.own(), number), span, zero=True)

    @rule(number=choices, cold=st.booleans())
    def read(self, number: int, cold: bool) -> None:
        """! What its owner reads is what was written last."""
        if self.own():
            node, name = pick(self.own(), number)
            if cold:
                self.world.evict(self.node(node))
            self.check_read(node, name, self.volumes[name].size, self.volumes[name].now)

    @rule(number=choices)
    def drain(self, number: int) -> None:
        if self.own():
            node, name = pick(self.own(), number)
            self.node(node).router.drain(name, 60.0)
            self.volumes[name].committed = dict(self.volumes[name].now)

    @rule(number=choices)
    def retire(self, number: int) -> None:
        if self.own():
            node, name = pick(self.own(), number)
            self.volume_on(node, name).retire_committed()
            self.world.evict(self.node(node))

    @rule(number=choices, settle=st.booleans())
    def compact(self, number: int, settle: bool) -> None:
        if self.own():
            node, name = pick(self.own(), number)
            self.node(node).host.compactor.compact(self.volume_on(node, name), settle=settle)

    @rule(number=choices)
    def restart(self, number: int) -> None:
        """An export is closed and opened again from its record."""
        exports = sorted([*self.own(), *(key for key in self.views if self.is_kept(*key))])
        if not exports:
            return
        node, name = pick(exports, number)
        router = self.node(node).router
        with router.table.locked(name) as entry:
            router._opener.close_entry(entry, remove_device=False)
            router._opener.reopen(entry)
            assert entry.serves(), entry.reason

    # -- owners --------------------------------------------------------------------------------------

    @rule(number=choices, gone=st.booleans())
    def detach(self, number: int, gone: bool) -> None:
        if self.own():
            node, name = pick(self.own(), number)
            self.node(node).router.detach(name, 60.0)
            vol = self.volumes[name]
            vol.owner, vol.committed = None, dict(vol.now)

    @rule(node=node_names, number=choices, take_over=st.booleans())
    def attach(self, node: str, number: int, take_over: bool) -> None:
        """Of a volume that is taken over, what its owner had not committed is lost."""
        names = [name for name in self.free(node) if name in self.volumes]
        if not names:
            return
        name = pick(names, number)
        vol, router = self.volumes[name], self.node(node).router
        if vol.owner and not take_over:
            with pytest.raises(OwnedElsewhere):
                router.attach(name, AttachRequest(transport="nbd"))
            return
        self.world.rest()
        router.attach(name, AttachRequest(transport="nbd", take_over=take_over))
        if vol.owner:
            self.stale.add((vol.owner, name))
        vol.owner, vol.now = node, dict(vol.committed)
        self.check_read(node, name, vol.size, vol.now)

    @precondition(lambda self: self.stale)
    @rule(number=choices, verb=st.sampled_from(["fork", "snapshot", "tag", "base", "drain", "remove"]))
    def stale_owner(self, number: int, verb: str) -> None:
        """Who lost a volume makes nothing of it any more, and harms nothing."""
        node, name = pick(sorted(self.stale), number)
        here, router = self.node(node), self.node(node).router
        before = self.world.root_etags()
        if verb == "drain":
            with contextlib.suppress(GlideError):
                self.core(node, name).pwrite(0, tagged(next(self.tags), 0))
                router.drain(name, 60.0)
        elif verb == "remove":
            router.remove(name)
            self.stale.discard((node, name))
        elif verb == "snapshot":
            with pytest.raises(GlideError):
                router.forks.snapshot(name, SnapshotRequest(timeout=60.0))
        else:
            self.stale_copy(here, name, verb)
        assert self.world.root_etags() == before, "a stale owner changed a root"

    @rule(node=node_names, number=choices, purge=st.booleans())
    def remove(self, node: str, number: int, purge: bool) -> None:
        if not self.volumes:
            return
        name = pick(sorted(self.volumes), number)
        vol, router = self.volumes[name], self.node(node).router
        if router.table.find(name) is not None and vol.owner != node:
            return  # something else of that name
        if vol.owner not in (None, node):
            with pytest.raises(OwnedElsewhere):
                router.remove(name)
            return
        router.remove(name, purge=purge)
        del self.volumes[name]
        if purge:
            mine = [source for source in self.kept if source.startswith(f"snapshot:{name}@")]
            for source in mine:
                del self.kept[source]

    # -- copies --------------------------------------------------------------------------------------

    @rule(number=choices, tag=st.sampled_from([None, *TAGS]))
    def snapshot(self, number: int, tag: str | None) -> None:
        if not self.own():
            return
        node, name = pick(self.own(), number)
        vol = self.volumes[name]
        made = self.node(node).router.forks.snapshot(name, SnapshotRequest(tag=tag, timeout=60.0))
        vol.committed = dict(vol.now)
        assert made["source"] not in self.kept
        self.kept[made["source"]] = Kept(vol.size, dict(vol.now))
        if tag:
            self.kept[f"tag:{tag}"] = Kept(vol.size, dict(vol.now))

    @rule(node=node_names, number=choices, span=spans, kind=st.sampled_from(["snapshot", "tag", "base"]))
    def lone_copy(self, node: str, number: int, span: Span, kind: str) -> None:
        """Something that nothing else has any more."""
        names = [name for name in self.free(node) if name not in self.volumes]
        bases = [base for base in BASES if f"base:{base}" not in self.kept and base not in self.removed]
        if not names or (kind == "base" and not bases):
            return
        name, forks = pick(names, number), self.node(node).router.forks
        self.known_id(self.node(node).create(name, SMALL).volume_id)
        vol = self.volumes[name] = Vol(node, SMALL, {})
        self.write_at(node, name, span)
        if kind == "base":
            source = f"base:{pick(bases, number)}"
            forks.make_base(name, PromoteRequest(base=source[5:]))
        elif kind == "tag":
            source = f"tag:{pick(list(TAGS), number)}"
            forks.tag(name, TagRequest(tag=source[4:]))
        else:
            source = forks.snapshot(name, SnapshotRequest(timeout=60.0))["source"]
        self.kept[source] = Kept(vol.size, dict(vol.now))
        self.drop(node, f"volume:{name}")

    @rule(node=node_names, number=choices, tag=st.sampled_from(TAGS))
    def tag(self, node: str, number: int, tag: str) -> None:
        found = self.copied(node, number)
        if found is not None:
            name, sequence, kept = found
            self.node(node).router.forks.tag(name, TagRequest(tag=tag, sequence=sequence))
            self.kept[f"tag:{tag}"] = kept

    @rule(node=node_names, number=choices, base=st.sampled_from(BASES))
    def make_base(self, node: str, number: int, base: str) -> None:
        if f"base:{base}" in self.kept or base in self.removed:
            return
        found = self.copied(node, number)
        if found is not None:
            name, sequence, kept = found
            self.node(node).router.forks.make_base(name, PromoteRequest(base=base, sequence=sequence))
            self.kept[f"base:{base}"] = kept

    @rule(node=node_names, number=choices)
    def delete_copy(self, node: str, number: int) -> None:
        if self.kept:
            self.drop(node, pick(sorted(self.kept), number))

    # -- forks ---------------------------------------------------------------------------------------

    @rule(node=node_names, number=choices, which=choices, large=st.booleans(), wait=st.booleans())
    def fork(self, node: str, number: int, which: int, large: bool, wait: bool) -> None:
        names, sources = self.free(node), [s for s in self.sources() if self.usable(node, s)]
        if not names or not sources:
            return
        name, source = pick(names, number), pick(sources, which)
        kept = self.of_source(node, source)
        size = LARGE if large else kept.size
        if name in self.volumes and not (self.is_put_later(source) and not wait):
            with pytest.raises(ExportExists):
                self.node(node).fork(name, source, wait=wait, prefetch=False)
            return
        status = self.node(node).fork(name, source, size=size, wait=wait, prefetch=False)
        self.known_id(status.volume_id)
        self.forked(node, name, size, kept.content, late=False)

    @rule(node=node_names, number=choices, which=choices, steps=waits, drop=st.booleans())
    def fork_late(self, node: str, number: int, which: int, steps: Steps, drop: bool) -> None:
        """! The root of a fork of a base is put within a quarter of the grace, or not at all."""
        names, sources = self.free(node), [s for s in self.sources() if self.usable(node, s)]
        if names and sources:
            self.fork_slowly(node, pick(names, number), pick(sources, which), steps, drop)

    @precondition(lambda self: self.removed)
    @rule(node=node_names, number=choices, which=choices)
    def fork_of_removed_base(self, node: str, number: int, which: int) -> None:
        names = self.free(node)
        bases = [base for base in sorted(self.removed) if f"base:{base}" not in self.kept]
        if names and bases:
            self.fork_from_cache(node, pick(names, number), pick(bases, which))

    @rule(node=node_names, number=choices, span=spans, times=st.one_of(st.just(LONGEST), three_waits))
    def base_that_goes(self, node: str, number: int, span: Span, times: tuple[Steps, Steps, Steps]) -> None:
        """! A base that nothing else names is removed by one node; the other forks it, and forks that."""
        steps, more, last = times
        other = NODES[NODES.index(node) - 1]
        self.lone_copy(node, number, span, "base")
        bases = [source for source in sorted(self.kept) if source.startswith("base:")]
        if not bases:
            return
        source = pick(bases, number)
        base = source.removeprefix("base:")
        self.pass_time([(GRACE * 0.6, False)])  # old enough for gc to take note of at once
        self.node(other).bases.get(PREFIX, base)
        self.drop(node, source)
        self.pass_time(steps)
        names = self.free(other)
        if not names or base not in self.removed:
            return
        name = pick(names, number)
        if not self.fork_from_cache(other, name, base) or (other, name) in self.stale:
            return
        self.pass_time(more)
        if len(names) > 1 and name in self.volumes:
            self.fork_slowly(other, pick(names, number + 1), f"volume:{name}", last, True)

    # -- views ---------------------------------------------------------------------------------------

    @rule(node=node_names, number=choices, which=choices)
    def view(self, node: str, number: int, which: int) -> None:
        names, sources = self.free(node), [s for s in self.sources() if self.usable(node, s)]
        if not names or not sources:
            return
        name, source = pick(names, number), pick(sources, which)
        kept = self.of_source(node, source)
        self.known_id(self.node(node).fork(name, source, read_only=True, prefetch=False).volume_id)
        etag = self.store.etag_of(parse_source(source).key(PREFIX))
        self.views[node, name] = View(kept.size, kept.content, source, etag)

    @precondition(lambda self: self.views)
    @rule(number=choices, steps=st.one_of(waits, st.just(OUTLAST)))
    def promote_late(self, number: int, steps: Steps) -> None:
        """! What a view shows may be gone with its source."""
        node, name = pick(sorted(self.views), number)
        view = self.views[node, name]
        dropper = self.who_drops(view.source) if self.is_kept(node, name) else None
        if dropper is not None:
            self.drop(dropper, view.source)
        self.pass_time(steps)
        self.promote(node, name, view)

    @precondition(lambda self: self.views)
    @rule(number=choices, verb=st.sampled_from(["read", "promote", "detach", "remove"]))
    def use_view(self, number: int, verb: str) -> None:
        node, name = pick(sorted(self.views), number)
        view, router = self.views[node, name], self.node(node).router
        if verb == "read" and self.is_kept(node, name):
            self.world.evict(self.node(node))
            self.check_read(node, name, view.size, view.content)
        elif verb == "promote":
            self.promote(node, name, view)
        elif verb in ("detach", "remove"):
            getattr(router, verb)(name)
            del self.views[node, name]

    # -- time and gc ---------------------------------------------------------------------------------

    @rule(steps=waits)
    def advance(self, steps: Steps) -> None:
        self.pass_time(steps)

    @rule()
    def gc(self) -> None:
        self.collect()

    @rule(number=choices, span=spans, steps=st.one_of(waits, st.just(OUTLAST)))
    def drain_late(self, number: int, span: Span, steps: Steps) -> None:
        """! Packs that are put long before their commit are made anew."""
        if self.own():
            self.write_at(*pick(self.own(), number), span)
            self.store.after_pack = partial(self.pass_time, steps)
            self.drain(number)
            self.store.after_pack = None
            self.world.check_named()

    @rule(number=choices, steps=st.one_of(waits, st.just(OUTLAST)))
    def compact_late(self, number: int, steps: Steps) -> None:
        """! The same of packs that compaction makes; it gives up."""
        if self.own():
            self.store.after_pack = partial(self.pass_time, steps)
            with contextlib.suppress(StoreError):
                self.compact(number, True)
            self.store.after_pack = None
            self.world.check_named()
