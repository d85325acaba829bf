"""Steps that put in question who is who: clones of hosts, other stores, and a store that goes back in time.

What each node may do after such an event:

- *Hosts with one name.* A name is no evidence: neither takes, fences or gives up anything of the other.
- *A clone* has the logs of its original, and what that had sent to the store: it may adopt that, and nothing
  that was sent later. Both serve until one of them commits; from then on the other is *outdone*: it commits,
  removes and gives up nothing, and is fenced when it hears of it.
- *Another store*, or none: nothing is put, deleted, fenced or drained; what is resident is served.
- *The store went back*: it has an older root of the log in use, with all that this names. Who knows the newer
  one serves that, commits nothing, and drains say why. It goes on when the store is brought forward, or
  takes the older state when it is told to. A host that knows no better may be told to take the volume over.
"""

from __future__ import annotations

import random
import shutil
from typing import NamedTuple

import msgspec
from fork_rig import PREFIX
from power_cut import Keep
from sim_doors import OtherStore
from sim_model import Life, Seen, must
from sim_node import SimNode
from sim_steps import Where
from sim_verbs import Verbs
from sim_world import CLONES, NODES

from glidefs.errors import StoreWentBack
from glidefs.formats import identity
from glidefs.formats.identity import StoreIdentity
from glidefs.formats.manifest import decode_root, encode_root
from glidefs.manifest import local
from glidefs.names import manifest_key, pack_key, page_key
from glidefs.store.which import STORE_KEY
from glidefs.volume.volume import Volume

IDENTITY_WEIGHTS = {
    "clone": 5,
    "swap_store": 3,
    "roll_back": 4,
    "bring_forward": 2,
    "accept_older": 2,
    "attach_as_it_was": 1,
}
SWAPPED_FOR = (5.0, 60.0, 200.0)
STORES = ("unmounted", "unmounted", "copy", "older copy", "others")
CLONED = ("clean", "dead", "running", "power cut")


class Rollback(NamedTuple):
    """A root that is older than it was: what it was, and what it is."""

    key: str
    newest: Seen
    older: Seen


class Identity(Verbs):
    """As in ``Verbs``."""

    def __init__(self, seed: int, keep_trace: bool = False, *, identity: bool = False) -> None:
        super().__init__(seed, keep_trace, identity=identity)
        self.rollbacks: list[Rollback] = []

    def name_nodes(self) -> None:
        """Two hosts may have one name."""
        if self.identity and self.rng.random() < 0.5:
            for node in self.nodes.values():
                node.label = "n"
            self.counts["hosts of one name"] += 1
        for node in self.nodes.values():
            node.when_stuck = self.rescue

    def read(self, node: SimNode, life: Life, volume: Volume) -> dict[int, bytes]:
        """The node does nothing else meanwhile: it would wait for what this one fetches, on this thread."""
        if not self.identity:
            return super().read(node, life, volume)
        with self.step_of(node):
            return super().read(node, life, volume)

    # -- clones ------------------------------------------------------------------------------------------

    def clone(self) -> None:
        """A host is copied with its disk, and both run on."""
        node = self.draw_node()
        free = [name for name in CLONES if name not in self.nodes]
        if node is None or not free:
            return
        how, name = self.rng.choice(CLONED), free[0]
        self.note(f"  {node.name} is cloned as {name}: {how}")
        self.counts[f"cloned {how}"] += 1
        if how == "clean":
            with self.step_of(node):
                node.router.let_go(remove_devices=False)
                node.check_alive()
                node.stop()
            self.mark_unchecked(node)
        elif how == "dead":
            self.crash(node, None)
        else:
            node.engine.rest()
        self.copy_host(node, name)
        if how == "power cut":
            self.cut_clone(self.nodes[name])
        both = [one for one in (node, self.nodes[name]) if not one.up]
        for one in self.rng.sample(both, len(both)):
            if self.rng.random() < 0.7:
                self.start(one)

    def copy_host(self, node: SimNode, name: str) -> None:
        """All of its disk, and what the model knows of it."""
        self.look()
        clone = self.add_node(name)
        shutil.copytree(node.home, clone.home, dirs_exist_ok=True)
        self.platter.clone(node.home, clone.home)
        clone.label, clone.host_name, clone.store_id = node.label, node.host_name, node.store_id
        clone.other_boot, clone.when_stuck = True, self.rescue
        model = self.model
        for life in [life for life in model.lives.values() if life.node == node.name]:
            model.lives[life.log_id, name] = life.twin(name)
        for where in (model.takers, model.leavers, model.accepters):
            where |= {(name, volume) for who, volume in where if who == node.name}
        for (who, volume), origins in list(model.births.items()):
            if who == node.name:
                model.births[name, volume] = list(origins)
        if node.name in model.making:
            model.making[name] = model.making[node.name]
        model.sent[name] = set(model.sent[node.name])
        self.fenced |= {(log_id, name) for log_id, who in self.fenced if who == node.name}

    def cut_clone(self, clone: SimNode) -> None:
        """It has what was on the platter, of what was not yet there perhaps something."""
        keep = self.draw_keep()
        if keep is None:
            return
        self.no_latecomers()
        at = self.platter.position()
        for life in self.model.lives.values():
            if life.node == clone.name and life.cut_at is None:
                life.cut_at = at
        self.model.forget_log(clone.name)
        clone.cut_power(keep, random.Random(self.rng.random()))

    # -- other stores ------------------------------------------------------------------------------------

    def swap_store(self) -> None:
        """Where some hosts look for their store is another one for a while, or none."""
        free = [one for one in self.nodes.values() if one.store_id and not self.doors[one.name].swapped]
        if not free:
            return
        nodes = free if self.rng.random() < 0.3 else [self.rng.choice(free)]
        kind = self.rng.choice(STORES)
        seconds = self.rng.choice(SWAPPED_FOR)
        self.counts[f"store {kind}"] += 1
        self.no_latecomers()
        for node in nodes:
            self.note(f"  {node.name} sees another store for {seconds:.0f} s: {kind}")
            other = OtherStore(self.clock, self.objects_of(kind))
            self.doors[node.name].swap(other, self.clock.now + seconds)

    def objects_of(self, kind: str):
        """What another store has."""
        objects = {} if kind == "unmounted" else self.store.objects()
        if not objects:
            return objects
        info = objects[STORE_KEY][1]
        id_ = StoreIdentity(id=self.rng.randbytes(16).hex(), created=0)
        objects[STORE_KEY] = (identity.encode(id_), info)
        for key, (data, info) in list(objects.items()):
            if not (key.endswith("/manifest") and "/volumes/" in key):
                continue
            if kind == "others":
                root = msgspec.structs.replace(decode_root(key, data), volume_id=self.rng.randbytes(16))
                objects[key] = (encode_root(root, key), msgspec.structs.replace(info, etag=f'"{key}"'))
            elif kind == "older copy":
                if self.rng.random() < 0.5:
                    del objects[key]
                    continue
                seen = self.rng.choice(self.model.versions[key])
                objects[key] = (seen.data, msgspec.structs.replace(info, etag=seen.etag or info.etag))
        return objects

    def no_latecomers(self) -> None:
        """What was sent to the store that was there has arrived."""
        self.clock.sleep(self.plan.lag)
        self.backlog.catch_up()
        self.model.observe()

    def doors_back(self) -> None:
        for door in self.doors.values():
            door.back()

    def check_doors(self) -> None:
        for door in self.doors.values():
            door.check()

    def crash(self, node: SimNode, keep: Keep | None, at: int | None = None) -> None:
        """A host that lost its power takes longer to start than what it had sent takes to arrive.

        (What a failed sync lost, and a commit that comes after the start brings back, guests would see go and
        come.)
        """
        super().crash(node, keep, at)
        if self.identity and keep is not None:
            self.no_latecomers()

    def lose_disk(self) -> None:
        """A host that knows no store believes the one that it finds, and knows of no newer root."""
        self.doors_back()
        super().lose_disk()
        for life in self.model.lives.values():
            life.back &= not life.stale

    # -- the store goes back -----------------------------------------------------------------------------

    def roll_back(self) -> None:
        """The root of a volume is an older one of its log again, with all that it names."""
        self.no_latecomers()
        found = [one for where in self.usable() for one in self.older_of(where)]
        if not found:
            return
        rollback = self.rng.choice(found)
        key, newest, older = rollback
        self.note(f"  {key}: commit {newest.root.sequence} becomes {older.root.sequence} again")
        self.counts["store went back"] += 1
        self.put_back(key, older)
        for life in self.model.of_log(newest.root.log_id):
            life.back = not life.stale
        self.rollbacks.append(rollback)

    def older_of(self, where: Where) -> list[Rollback]:
        """To what its volume may be rolled back, so that just this node knows better for good."""
        node, life, volume = where
        key = manifest_key(PREFIX, life.name)
        seen = self.model.named(life)
        if life.flush != "local" or life.back or seen is None or volume.root != seen.root:
            return []  # a guest that waits for the store would wait for ever
        saved = local.load(node.home / "state", life.volume_id, key)
        if volume.committer.copy_lags or saved is None or saved[0] != seen.root:
            return []
        for other in self.model.lives.values():
            if other is not life and other.volume_id == life.volume_id and not self.is_over(other):
                return []
        return [
            Rollback(key, seen, one)
            for one in self.model.versions[key]
            if one.root.log_id == life.log_id and one.root.sequence < seen.root.sequence
        ]

    def is_over(self, life: Life) -> bool:
        """Whether nobody will ever serve this log again."""
        node = self.nodes[life.node]
        entries = node.router.table.all() if node.up else []
        held = any(entry.record is not None and entry.record.log_id == life.log_id for entry in entries)
        return (life.log_id, life.node) in self.fenced or (node.up and not held)

    def put_back(self, key: str, seen: Seen) -> None:
        """An administrator puts another version of a root, and what it names."""
        for named in self.named_by(seen):
            if self.store.etag_of(named) is None:
                self.store.restore(named, self.store.kept[named], None)
        etag = seen.etag if self.rng.random() < 0.5 else None
        self.store.restore(key, seen.data, etag)
        self.model.show(key, seen._replace(etag=self.store.etag_of(key)))

    def named_by(self, seen: Seen) -> list[str]:
        pages = [page_key(PREFIX, page.hex()) for page in seen.root.page_ids if page]
        for page in pages:
            if self.store.etag_of(page) is None:
                self.store.restore(page, self.store.kept[page], None)
        packs = {ref.id.hex() for _, page in self.model.stored.pages(seen.root) for ref in page.packs}
        return [pack_key(PREFIX, one) for one in sorted(packs)]

    def open_rollbacks(self) -> list[Rollback]:
        """Those that nobody has decided yet: the older root is there still."""
        self.model.observe()
        roots = self.model.roots
        self.rollbacks = [
            one for one in self.rollbacks if one.key in roots and roots[one.key].data == one.older.data
        ]
        return self.rollbacks

    def resting(self) -> bool:
        """While it is open whether the newer state counts, nobody collects what it names."""
        return bool(self.open_rollbacks())

    def bring_forward(self) -> None:
        """The newest root is found again."""
        found = self.open_rollbacks()
        if found:
            self.forward(self.rng.choice(found))

    def forward(self, rollback: Rollback) -> None:
        self.no_latecomers()
        if rollback not in self.open_rollbacks():
            return
        self.note(f"  {rollback.key}: commit {rollback.newest.root.sequence} is back")
        self.counts["store brought forward"] += 1
        self.rollbacks.remove(rollback)
        self.put_back(rollback.key, rollback.newest)
        for life in self.model.of_log(rollback.newest.root.log_id):
            life.back = False

    def rescue(self, node: SimNode) -> None:
        """A guest of this node waits: the log is full, perhaps as the store went back."""
        for rollback in list(self.open_rollbacks()):
            self.forward(rollback)

    def gone_back(self) -> list[Where]:
        """Volumes that know better than the store."""
        self.open_rollbacks()
        return [where for where in self.usable() if where[1].back]

    def accept_older(self) -> None:
        """An operator takes the older state."""
        found = self.gone_back()
        if found:
            node, life, _ = self.rng.choice(found)
            self.attach_now(node, life.name, accept_older=True)
            self.counts["older state accepted"] += self.model.named(life) is None

    def attach_as_it_was(self) -> None:
        """An operator tries to take the volume over, without a word on the older state."""
        found = self.gone_back()
        if found:
            node, life, _ = self.rng.choice(found)
            self.attach_now(node, life.name, take_over=True)

    def may_drain(self, where: Where) -> bool:
        """A store that went back takes nothing, and whoever waits for it is told."""
        node, life, volume = where
        if not life.back:
            return True
        dirty = volume.done_segment < volume.core.seal() or volume.went_back is not None
        error = self.try_drain(node, life)
        if error is None:
            must(not (dirty and life.back) or life.lost, f"{life} was drained into a store that went back")
            return False
        calm = not self.plan.rates and self.clock.now > self.plan.down_until + 150.0
        if calm and not self.doors[node.name].swapped and life.back and not life.lost:
            must(isinstance(error, StoreWentBack), f"{life}: the store went back, and it says {error}")
            must("went back" in volume.last_error, f"{life}: nothing says that the store went back")
        return False

    def check_all_know(self) -> None:
        """The jobs that drains left first: a twin with nothing to upload was drained by its own word."""
        self.clock.sleep(1.0)
        self.background()
        super().check_all_know()

    def end_rollbacks(self) -> None:
        """Everybody says so; then half of it is found again, the other half is not."""
        for node, life, volume in self.gone_back():
            self.change((node, life, volume), *self.draw_range(life, 4096, 4096))
            self.may_drain((node, life, volume))
        for rollback in list(self.open_rollbacks()):
            if self.rng.random() < 0.5:
                self.forward(rollback)
        for node, life, _ in self.gone_back():
            self.attach_now(node, life.name, accept_older=True)
        for rollback in list(self.open_rollbacks()):
            self.forward(rollback)


__all__ = ["IDENTITY_WEIGHTS", "NODES", "Identity"]
