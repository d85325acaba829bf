"""Steps of operators: volumes come, go and move; nodes stop, start, and hand over."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from fork_model import BASES, LARGE, SMALL, TAGS
from fork_rig import PREFIX
from sim_model import Origin, must
from sim_node import GRACE, SimNode
from sim_steps import Steps

from glidefs.errors import GlideError, OwnedElsewhere
from glidefs.exports.requests import AttachRequest, CreateRequest, PromoteRequest, SnapshotRequest, TagRequest
from glidefs.formats.manifest import NO_ID
from glidefs.names import Source, manifest_key, parse_source

VOLUMES = ("v0", "v1", "v2")
PATIENCE = 120.0
"""Seconds of the simulation's time that a verb may wait for uploads."""


class Verbs(Steps):
    """As in ``Steps``. A verb may fail whenever the store does; then the model finds out what it did."""

    def __init__(self, seed: int, keep_trace: bool = False, *, identity: bool = False) -> None:
        super().__init__(seed, keep_trace, identity=identity)
        self.gave_up: set[tuple[bytes, str]] = set()
        """Logs of volumes that the verb under way detaches or removes, and the node."""

    # -- choosing --------------------------------------------------------------------------------------

    def draw_node(self) -> SimNode | None:
        nodes = [node for node in self.nodes.values() if node.up and node not in self.acting]
        return self.rng.choice(nodes) if nodes else None

    @contextlib.contextmanager
    def verb(self, node: SimNode, what: str) -> Iterator[None]:
        """A verb on a node. That it failed is no matter, what it did is."""
        self.note(f"  {node.name}: {what}")
        with self.step_of(node):
            try:
                yield
            except (GlideError, OSError) as error:
                node.check_alive()
                self.note(f"  {node.name}: {what}: {type(error).__name__}: {error}")
                self.counts["verb failed"] += 1
            else:
                self.counts["verb worked"] += 1
        node.check_alive()
        self.check_given_up(node)

    def check_given_up(self, node: SimNode) -> None:
        """A volume that this node gave up itself it must not serve: what guests wrote to it would be lost."""
        for life, volume in self.entries(node):
            seen = self.model.roots.get(manifest_key(PREFIX, life.name))
            gone = life.published and (seen is None or not seen.root.owner_node)
            given_up = gone and (seen is None or seen.root.volume_id == life.volume_id)
            ours = (life.log_id, life.node) in self.gave_up
            assert not (given_up and ours) or volume.fenced, f"{life} is served, and was given up"
        self.gave_up.clear()

    def sources(self) -> list[str]:
        """What there is to be forked, tagged or deleted."""
        found = []
        for key, seen in self.model.roots.items():
            if seen.root.removed_at:
                continue
            match key.split("/"):
                case [_, "volumes", name, "manifest"]:
                    found.append(f"volume:{name}")
                case [_, "volumes", name, "snapshots", sequence]:
                    found.append(f"snapshot:{name}@{int(sequence)}")
                case [_, "tags", name]:
                    found.append(f"tag:{name}")
                case [_, "bases", name, "manifest"]:
                    found.append(f"base:{name}")
        return sorted(found)

    def draw_source(self, kinds: tuple[str, ...]) -> str | None:
        found = [source for source in self.sources() if source.startswith(kinds)]
        return self.rng.choice(found) if found else None

    def origins_of(self, node: SimNode, source: str) -> list[Origin]:
        """What a copy of it, made by this node, may hold."""
        parsed = parse_source(source)
        origins = [self.model.origin(parsed.key(PREFIX))]
        if parsed.kind != "volume":
            return origins
        for life, _ in self.entries(node):
            if life.name == parsed.name:
                if not life.lost:
                    return [Origin(life.now())]  # it is committed first
                origins.append(Origin(life.now()))
        return origins

    @contextlib.contextmanager
    def making(self, node: SimNode, name: str, origins: list[Origin], what: str) -> Iterator[None]:
        """A verb that makes a volume of one of these."""
        self.model.births[node.name, name] += origins
        self.model.making[node.name] = name
        with self.verb(node, what):
            yield
            del self.model.making[node.name]

    # -- volumes ---------------------------------------------------------------------------------------

    def create(self) -> None:
        node = self.draw_node()
        if node is None:
            return
        name = self.rng.choice(VOLUMES)
        size = LARGE if self.rng.random() < 0.25 else SMALL
        flush = "store" if self.rng.random() < 0.15 else "local"
        what = f"create {name} of {size >> 20} MiB, flush {flush}"
        with self.making(node, name, [Origin({})], what):
            wait = self.rng.random() < 0.3
            node.router.create(name, CreateRequest(size=size, transport="nbd", flush=flush, wait=wait))
        self.look()

    def fork(self) -> None:
        node, source = self.draw_node(), self.draw_source(("volume", "snapshot", "tag", "base"))
        if node is None or source is None:
            return
        name = self.rng.choice(VOLUMES)
        size = LARGE if self.rng.random() < 0.1 else None
        with self.making(node, name, self.origins_of(node, source), f"fork {name} from {source}"):
            wait = self.rng.random() < 0.3
            request = CreateRequest(source=source, size=size, transport="nbd", wait=wait, prefetch=False)
            node.router.create(name, request)
        self.look()

    def fork_and_drop(self) -> None:
        """A fork that nobody knows yet loses its source, and gc comes by."""
        node = self.draw_node()
        free = [name for name in VOLUMES if manifest_key(PREFIX, name) not in self.model.roots]
        sources = [source for source in self.sources() if node is not None and self.may_drop(node, source)]
        if node is None or not sources or not free:
            return
        name, source = self.rng.choice(free), self.rng.choice(sources)
        if self.rng.random() < 0.5:
            self.clock.sleep(GRACE + 1.0)
            self.gc()
            if not node.up:
                return
        what = f"fork {name} from {source}, which goes"
        with self.making(node, name, self.origins_of(node, source), what):
            request = CreateRequest(source=source, transport="nbd", prefetch=False)
            node.router.create(name, request)
        self.look()
        self.delete_now(node, source)
        for _ in range(2):
            self.gc()
            self.clock.sleep(self.rng.choice([1.0, GRACE / 10]))

    def may_drop(self, node: SimNode, source: str) -> bool:
        """Whether this node may delete it."""
        seen = self.model.roots[parse_source(source).key(PREFIX)]
        return seen.root.owner_host in (NO_ID, node.owner.host)

    def look(self) -> None:
        """Take note of what nodes serve that the store may not know yet."""
        for node in self.nodes.values():
            for _ in self.entries(node):
                pass

    def remove(self) -> None:
        node, source = self.draw_node(), self.draw_source(("volume",))
        if node is not None and source is not None:
            self.remove_now(node, source.removeprefix("volume:"), purge=self.rng.random() < 0.3)

    def remove_now(self, node: SimNode, name: str, *, purge: bool) -> None:
        self.model.removers.add(name)
        self.give_up(node, name)
        if purge:
            below = f"{PREFIX}/volumes/{name}/snapshots/"
            self.model.deleted |= {key for key in self.model.roots if key.startswith(below)}
        unknown = [life for life, _ in self.entries(node) if life.name == name and not life.published]
        with self.verb(node, f"remove {name}{' and its snapshots' if purge else ''}"):
            node.router.remove(name, purge=purge)
            for life in unknown:  # nobody but its node knew the fork
                life.stale = not life.published

    def undelete(self) -> None:
        """A removed volume is put back, unless gc or a create was faster; then it may be attached."""
        node = self.draw_node()
        removed = sorted(
            seen.root.name
            for key, seen in self.model.roots.items()
            if seen.root.removed_at and key.startswith(f"{PREFIX}/volumes/")
        )
        if node is None or not removed:
            self.remove()
            return
        name = self.rng.choice(removed)
        self.model.undeleters.add(name)
        with self.verb(node, f"undelete {name}"):
            node.router.undelete(name, PREFIX)
            self.counts["undeleted"] += 1

    def give_up(self, node: SimNode, name: str) -> None:
        """A verb begins after which the node has the volume no more, or has it as before."""
        lives = [life for life, _ in self.entries(node) if life.name == name and not life.lost]
        self.gave_up |= {(life.log_id, life.node) for life in lives}

    # -- owners ----------------------------------------------------------------------------------------

    def detach(self) -> None:
        where = self.draw_volume()
        if where is None:
            return
        node, life, _ = where
        now = life.now()
        self.model.leavers.add((node.name, life.name))
        self.give_up(node, life.name)
        worked = False
        with self.verb(node, f"detach {life.name}"):
            # One that turns out to be fenced is let go too, with a word on its log.
            worked = not node.router.detach(life.name, PATIENCE)["note"]
        if worked:
            assert life.stale, f"{life}: detached, and the store's root names it still"
            seen = self.model.roots[manifest_key(PREFIX, life.name)]
            assert all(seen.content.get(sector, bytes(4096)) == content for sector, content in now.items()), (
                f"{life}: detached, and the store has something else"
            )

    def attach(self) -> None:
        node, source = self.draw_node(), self.draw_source(("volume",))
        if node is not None and source is not None:
            self.attach_now(node, source.removeprefix("volume:"), take_over=self.rng.random() < 0.4)

    def take_over(self) -> None:
        """The other node takes a volume that is in use."""
        where = self.draw_volume()
        others = [node for node in self.nodes.values() if where is not None and node is not where[0]]
        if where is None:
            return
        other = others[0] if len(others) == 1 else self.rng.choice(others)
        if other.up and other not in self.acting:
            self.attach_now(other, where[1].name, take_over=True)

    def attach_now(
        self, node: SimNode, name: str, *, take_over: bool = False, accept_older: bool = False
    ) -> None:
        free = self.is_free(node, name)
        if free or take_over or accept_older or self.is_free(node, name, perhaps=True):
            self.model.takers.add((node.name, name))
        if accept_older:
            self.model.accepters.add((node.name, name))
        how = " by take-over" * take_over + " as it is in the store" * accept_older
        with self.verb(node, f"attach {name}{how}"):
            request = AttachRequest(transport="nbd", take_over=take_over, accept_older=accept_older)
            try:
                node.router.attach(name, request)
            except OwnedElsewhere as error:
                self.model.observe()  # a put that was late may have come since
                free = free and self.is_free(node, name)
                must(not (free or take_over or accept_older), f"{node.name} may not attach: {error}")
                raise
        self.check_open(node)

    def is_free(self, node: SimNode, name: str, *, perhaps: bool = False) -> bool:
        """Whether this node may have the volume without taking it from anybody.

        ``perhaps``: if it finds out that the root in the store, whose nonce it lost, is made of its log.
        """
        seen = self.model.roots.get(manifest_key(PREFIX, name))
        if seen is None or seen.root.owner_host == NO_ID:
            return True
        life = self.model.lives.get((seen.root.log_id, node.name))
        outdone = life is not None and life.outdone and not (perhaps and life.may_adopt)
        return seen.root.owner_host == node.owner.host and node.has_log(seen.root) and not outdone

    def use_stale(self) -> None:
        """Who lost a volume goes on for a while, and harms nothing.

        Not one whose name another volume has: it gets the name once that one is removed.
        """
        found = [
            (node, life, volume)
            for node in self.nodes.values()
            for life, volume in self.entries(node)
            if life.stale and not (life.may_adopt or life.unchecked or life.cut_at is not None)
            if node not in self.acting
        ]
        if not found:
            return
        node, life, volume = self.rng.choice(found)
        what = self.rng.choice(["write", "flush", "drain", "compact", "snapshot", "upload"])
        with self.verb(node, f"{what} of {life}, which is lost"):
            if what == "write":
                self.change((node, life, volume), *self.draw_range(life, 4096, 8 * 4096))
            elif what == "flush":
                node.guest(volume.core, volume.core.flush)
            elif what == "drain":
                node.router.drain(life.name, PATIENCE)
            elif what == "compact":
                node.host.compactor.compact(volume, settle=True)
            elif what == "snapshot":
                node.router.forks.snapshot(life.name, SnapshotRequest(timeout=PATIENCE))
            else:
                node.host.scheduler.request(volume, seal=True)
                node.run_due()

    def watch(self) -> None:
        """Volumes with nothing to upload are compared with the store."""
        node = self.draw_node()
        if node is None:
            return
        with self.step_of(node):
            node.host.watch.look()
            node.run_due()
        node.check_alive()

    # -- copies ----------------------------------------------------------------------------------------

    def snapshot(self) -> None:
        where = self.draw_volume()
        if where is None:
            return
        node, life, _ = where
        tag = self.rng.choice([None, None, *TAGS])
        begin, now = self.platter.position(), life.now()
        key = f"{PREFIX}/volumes/{life.name}/snapshots/"
        self.model.origins[key].append(Origin(now))
        if tag is not None:
            self.model.origins[Source("tag", tag).key(PREFIX)].append(Origin(now))
        worked = False
        with self.verb(node, f"snapshot {life.name}{f' with tag {tag}' if tag else ''}"):
            node.router.forks.snapshot(life.name, SnapshotRequest(tag=tag, timeout=PATIENCE))
            worked = True
        if worked and not life.lost:
            life.flushes.append((begin, self.platter.position()))
            life.sync_failed = False

    def tag(self) -> None:
        found = self._copied()
        if found is not None:
            node, source, origins = found
            tag = self.rng.choice(TAGS)
            self.model.origins[Source("tag", tag).key(PREFIX)] += origins
            with self.verb(node, f"tag {tag} of {source}"):
                sequence = source.sequence if source.kind == "snapshot" else None
                node.router.forks.tag(source.name, TagRequest(tag=tag, sequence=sequence))

    def make_base(self) -> None:
        found = self._copied()
        if found is not None:
            node, source, origins = found
            base = self.rng.choice(BASES)
            self.model.origins[Source("base", base).key(PREFIX)] += origins
            with self.verb(node, f"base {base} of {source}"):
                sequence = source.sequence if source.kind == "snapshot" else None
                node.router.forks.make_base(source.name, PromoteRequest(base=base, sequence=sequence))

    def _copied(self) -> tuple[SimNode, Source, list[Origin]] | None:
        node, text = self.draw_node(), self.draw_source(("volume", "snapshot"))
        if node is None or text is None:
            return None
        return node, parse_source(text), self.origins_of(node, text)

    def delete_copy(self) -> None:
        node, text = self.draw_node(), self.draw_source(("snapshot", "tag", "base"))
        if node is not None and text is not None:
            self.delete_now(node, text)

    def delete_now(self, node: SimNode, text: str) -> None:
        source = parse_source(text)
        if source.kind == "volume":
            self.remove_now(node, source.name, purge=False)
            return
        self.model.deleted.add(source.key(PREFIX))
        with self.verb(node, f"delete {text}"):
            if source.kind == "snapshot":
                node.router.forks.delete_snapshot(source.name, source.sequence, PREFIX)
            elif source.kind == "base":
                node.router.forks.remove_base(source.name, PREFIX)
            else:
                node.host.store.delete(source.key(PREFIX))

    # -- processes -------------------------------------------------------------------------------------

    def restart(self) -> None:
        """The daemon stops as it is asked to, and starts again."""
        node = self.draw_node()
        if node is None:
            return
        self.note(f"  {node.name}: restart")
        with self.step_of(node):
            node.router.let_go(remove_devices=False)
            node.check_alive()
            node.stop()
            self.mark_unchecked(node)
            self.boot(node)

    def mark_unchecked(self, node: SimNode) -> None:
        for life in self.model.lives.values():
            life.unchecked |= life.node == node.name

    def look_after(self) -> None:
        """Exports that could not be opened are tried again."""
        node = self.draw_node()
        if node is not None:
            with self.step_of(node):
                node.look_after()
            self.check_open(node)

    def crash_now(self) -> None:
        node = self.draw_node()
        if node is not None:
            self.note(f"  {node.name}: crash")
            self.crash(node, self.draw_keep())

    def crash_soon(self) -> None:
        """In the middle of whatever comes."""
        node = self.draw_node()
        if node is not None:
            self.arm(node.name, self.rng.choice(["store", "store", "file"]), self.rng.randrange(25))

    def lose_disk(self) -> None:
        """A host that comes back with an empty disk is another host, and takes nothing by its name."""
        node = self.draw_node()
        if node is None:
            return
        self.note(f"  {node.name}: its disk is lost")
        self.crash(node, None)
        node.lose_disk()
        for life in self.model.lives.values():
            # The root may name it still: nobody else commits, and its node draws another log.
            life.stale |= life.node == node.name
