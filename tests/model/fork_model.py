"""What the volumes of a prefix and their copies must hold: the model of `fork_machine.py`.

A node commits only when a rule asks it to, so the model knows exactly what the store has: per volume what
its owner acknowledged and what of it was committed; per snapshot, tag and base what it captured.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeAlias, TypeVar

import pytest
from fork_rig import PREFIX, Node
from fork_world import GRACE, NODES, Content, shared_world, show, tagged, want
from history import SECTOR
from hypothesis.stateful import RuleBasedStateMachine
from waiting import wait_for

from glidefs.core.volume import CoreVolume
from glidefs.errors import ExportExists, GlideError, UnknownExport
from glidefs.exports.requests import PromoteRequest, TagRequest
from glidefs.names import Source, manifest_key, parse_source
from glidefs.volume.volume import Volume

MIB, GIB = 1 << 20, 1 << 30
SMALL, LARGE = 256 * MIB, 129 * GIB
"""Two chunks and a page in the root; two page objects."""
AREAS = ((0, 40), (1023 * 32 + 24, 16), ((128 * GIB) // SECTOR - 8, 16))
"""Hot sectors: at the start, over a border of chunks, over the border of pages."""
VOLUMES, BASES, TAGS = ("v0", "v1", "v2", "v3", "v4"), ("b0", "b1", "b2"), ("t0", "t1")

T = TypeVar("T")
Steps: TypeAlias = list[tuple[float, bool]]
"""Steps of the clock, in seconds, each with a run of gc after it or not."""


class Vol:
    """A volume of the store. ``size`` is that of its root."""

    def __init__(self, owner: str, size: int, content: Content) -> None:
        self.owner: str | None = owner
        self.size = size
        self.now = dict(content)
        self.committed = dict(content)


class View(NamedTuple):
    """A read-only export of a node, and the version of the object that keeps what it shows."""

    size: int
    content: Content
    source: str
    etag: str | None


class Kept(NamedTuple):
    """What a snapshot, tag or base holds."""

    size: int
    content: Content


class Removed(NamedTuple):
    """A base that was removed, and when."""

    kept: Kept
    when: float


def hot(size: int) -> list[int]:
    end = size // SECTOR
    return [sector for first, count in AREAS for sector in range(first, first + count) if sector < end]


def pick(of: list[T], number: int) -> T:
    return of[number % len(of)]


class ForkModel(RuleBasedStateMachine):
    """The two nodes, what they and the store must hold, and the steps that rules share."""

    def __init__(self) -> None:
        super().__init__()
        self.world = shared_world()
        self.store = self.world.store
        self.world.begin()
        self.scope = contextlib.ExitStack()
        self.scope.enter_context(self.world.clocked())
        self.tags = itertools.count(1)
        self.volumes: dict[str, Vol] = {}
        self.views: dict[tuple[str, str], View] = {}
        self.stale: set[tuple[str, str]] = set()
        """Exports (node, name) whose volume another node took, or that lost their name."""
        self.kept: dict[str, Kept] = {}
        self.removed: dict[str, Removed] = {}
        self.ids: set[str] = set()

    def node(self, name: str) -> Node:
        return self.world.nodes[name]

    def volume_on(self, node: str, name: str) -> Volume:
        volume = self.node(node).router.table.get(name).volume
        assert volume is not None
        return volume

    def core(self, node: str, name: str) -> CoreVolume:
        return self.volume_on(node, name).core

    def own(self) -> list[tuple[str, str]]:
        return [(vol.owner, name) for name, vol in sorted(self.volumes.items()) if vol.owner]

    def free(self, node: str) -> list[str]:
        """Names that this node exports nothing under."""
        return [name for name in VOLUMES if self.node(node).router.table.find(name) is None]

    def sources(self) -> list[str]:
        return [f"volume:{name}" for name in sorted(self.volumes)] + sorted(self.kept)

    def of_source(self, node: str, source: str) -> Kept:
        """What a fork of it by ``node`` holds; an own volume is committed by it."""
        parsed = parse_source(source)
        if parsed.kind != "volume":
            return self.kept[source]
        vol = self.volumes[parsed.name]
        if vol.owner == node:
            vol.committed = dict(vol.now)
        return Kept(vol.size, dict(vol.committed))

    def usable(self, node: str, source: str) -> bool:
        """Whether ``node`` may commit or leave alone what it is asked to fork."""
        parsed = parse_source(source)
        return parsed.kind != "volume" or (node, parsed.name) not in self.stale

    def pass_time(self, steps: Steps) -> float:
        before = self.store.now
        for seconds, gc in steps:
            self.store.now += seconds
            if gc:
                self.collect()
        return self.store.now - before

    def check_read(self, node: str, name: str, size: int, content: Content) -> None:
        core = self.core(node, name)
        for first, count in AREAS:
            length = min(count, size // SECTOR - first)
            if length > 0:
                data = core.pread(first * SECTOR, length * SECTOR)
                for i in range(length):
                    self.check_sector(
                        f"{name} on {node}", first + i, data[i * SECTOR : (i + 1) * SECTOR], content
                    )

    def check_sector(self, what: str, sector: int, got: bytes, content: Content) -> None:
        expected = want(content, sector)
        assert got == expected, f"{what}, sector {sector}: {show(got)}, not {show(expected)}"

    def check_stored(self, key: str, size: int, content: Content) -> None:
        for sector, got in self.world.stored(key, hot(size)).items():
            self.check_sector(key, sector, got, content)

    def known_id(self, volume_id: str) -> None:
        assert volume_id not in self.ids, "a volume id was used again"
        self.ids.add(volume_id)

    def settled(self, node: str, name: str) -> bool:
        """Wait until a fork's root is in the store; False if it was fenced."""
        volume = self.volume_on(node, name)
        wait_for(lambda: volume.fenced or volume.drained(0), f"the root of {name}")
        return not volume.fenced

    def forked(self, node: str, name: str, size: int, content: Content, late: bool) -> None:
        """A fork was made: is it what it should be? Where the name was taken it is fenced."""
        taken = name in self.volumes
        alive = self.settled(node, name)
        assert alive != (taken or late), f"{name}: alive {alive}, taken {taken}, late {late}"
        if alive:
            self.volumes[name] = Vol(node, size, content)
            self.check_stored(manifest_key(PREFIX, name), size, content)
        else:
            self.stale.add((node, name))

    def write_at(self, node: str, name: str, span: tuple[int, int, int], zero: bool = False) -> None:
        vol = self.volumes[name]
        first, count = AREAS[span[0]]
        start = first + span[1] % count
        length = min(span[2], first + count - start, vol.size // SECTOR - start)
        if length <= 0:
            return
        self.world.rest()
        sectors = range(start, start + length)
        if zero:
            self.core(node, name).zero(start * SECTOR, length * SECTOR)
            for sector in sectors:
                vol.now.pop(sector, None)
            return
        tag = next(self.tags)
        self.core(node, name).pwrite(start * SECTOR, b"".join(tagged(tag, sector) for sector in sectors))
        vol.now.update(dict.fromkeys(sectors, tag))

    def copied(self, node: str, number: int) -> tuple[str, int | None, Kept] | None:
        """Name and snapshot of what a tag or base can be made of, and what it holds."""
        sources = [
            source
            for source in self.sources()
            if source.startswith(("volume:", "snapshot:")) and self.usable(node, source)
        ]
        if not sources:
            return None
        source = pick(sources, number)
        parsed = parse_source(source)
        sequence = parsed.sequence if parsed.kind == "snapshot" else None
        return parsed.name, sequence, self.of_source(node, source)

    def drop(self, node: str, source: str) -> None:
        """Delete a volume that is owned by the node or nobody, a snapshot, tag or base."""
        parsed, forks = parse_source(source), self.node(node).router.forks
        if parsed.kind == "volume":
            self.node(node).router.remove(parsed.name)
            del self.volumes[parsed.name]
            return
        kept = self.kept.pop(source)
        if parsed.kind == "snapshot":
            forks.delete_snapshot(parsed.name, parsed.sequence, PREFIX)
        elif parsed.kind == "tag":
            self.store.delete(parsed.key(PREFIX))
        else:
            forks.remove_base(parsed.name, PREFIX)
            self.removed[parsed.name] = Removed(kept, self.store.now)

    def who_drops(self, source: str) -> str | None:
        """A node that may delete it."""
        parsed = parse_source(source)
        if parsed.kind != "volume":
            return NODES[len(self.ids) % 2] if source in self.kept else None
        vol = self.volumes.get(parsed.name)
        if vol is None or vol.owner is None:
            return None
        return vol.owner

    def fork_slowly(self, node: str, name: str, source: str, steps: Steps, drop: bool) -> None:
        """The source of a fork may go, and time passes, before the root of one of a base is put."""
        kept = self.of_source(node, source)
        if source.startswith("volume:") and self.volumes[source[7:]].owner == node:
            self.node(node).router.drain(source[7:], 60.0)
        with self.held(node):
            try:
                self.known_id(self.node(node).fork(name, source, prefetch=False).volume_id)
            except ExportExists:
                assert name in self.volumes
                return
            dropper = self.who_drops(source) if drop else None
            if dropper is not None:
                self.drop(dropper, source)
            took = self.pass_time(steps)
        self.forked(node, name, kept.size, kept.content, late=self.is_put_later(source) and took > GRACE / 4)

    @staticmethod
    def is_put_later(source: str) -> bool:
        """Whether a fork of it is served before its root is put."""
        return source.startswith("base:")

    def fork_from_cache(self, node: str, name: str, base: str) -> bool:
        """Fork a base that was removed: from a cache that was checked lately, or not at all."""
        kept, when = self.removed[base]
        try:
            status = self.node(node).fork(name, f"base:{base}", prefetch=False)
        except UnknownExport:
            return False
        assert self.store.now - when <= GRACE / 4, "a fork of a base that was removed long ago"
        self.known_id(status.volume_id)
        self.forked(node, name, kept.size, kept.content, late=False)
        return True

    @contextlib.contextmanager
    def held(self, node: str) -> Iterator[None]:
        """The node uploads nothing meanwhile."""
        scheduler = self.node(node).host.scheduler
        assert scheduler.pause(time.monotonic() + 20.0)
        try:
            yield
        finally:
            scheduler.resume()

    def is_kept(self, node: str, name: str) -> bool:
        """Whether the store still has the very root that a view shows."""
        view = self.views[node, name]
        return self.store.etag_of(parse_source(view.source).key(PREFIX)) == view.etag

    def promote(self, node: str, name: str, view: View) -> None:
        """It becomes a fork, which it may refuse once its source is not what it shows."""
        kept = self.is_kept(node, name)
        try:
            status = self.node(node).router.forks.promote(name)
        except ExportExists:
            assert name in self.volumes
            return
        except GlideError:
            assert not kept, "a view could not be promoted"
            return
        del self.views[node, name]
        self.known_id(status.volume_id)
        self.forked(node, name, view.size, view.content, late=False)

    def collect(self) -> None:
        """Run gc. The name of a removed base is free once its tombstone is gone."""
        self.world.gc()
        for base in list(self.removed):
            if self.store.etag_of(Source("base", base).key(PREFIX)) is None:
                assert self.store.now - self.removed[base].when >= GRACE
                del self.removed[base]

    def check_store(self) -> None:
        """What the store alone has of everything."""
        for name, vol in self.volumes.items():
            self.check_stored(manifest_key(PREFIX, name), vol.size, vol.committed)
        for source, kept in self.kept.items():
            self.check_stored(parse_source(source).key(PREFIX), kept.size, kept.content)
        for base, (kept, _) in self.removed.items():
            self.check_stored(Source("base", base).key(PREFIX), kept.size, kept.content)

    def settle(self) -> None:
        """Nothing happens any more: everything is there, and two runs of gc leave nothing else."""
        self.world.rest()
        for node in self.world.nodes.values():
            self.world.evict(node)
        for node_name, name in self.own():
            self.check_read(node_name, name, self.volumes[name].size, self.volumes[name].now)
        for node_name, name in self.views:
            if self.is_kept(node_name, name):
                view = self.views[node_name, name]
                self.check_read(node_name, name, view.size, view.content)
        self.check_store()
        self.pass_time([(GRACE + 1.0, True)])  # old tombstones go
        assert not self.removed
        self.pass_time([(0.0, True), (GRACE, True)])
        left = self.world.objects() - self.world.named()
        assert not left, f"gc left {self.world.ages(left)}"
        self.check_store()

    def stale_copy(self, node: Node, name: str, verb: str) -> None:
        """From the store's root, which is somebody else's, or not at all."""
        if node.router.table.get(name).is_fenced():
            return  # it knows, and takes the root as any other node does
        verbs: dict[str, Callable[[], object]] = {
            "fork": lambda: node.fork("stale", f"volume:{name}", wait=True, prefetch=False),
            "tag": lambda: node.router.forks.tag(name, TagRequest(tag="stale")),
            "base": lambda: node.router.forks.make_base(name, PromoteRequest(base="stale")),
        }
        with pytest.raises(GlideError):
            verbs[verb]()
