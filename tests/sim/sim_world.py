"""The world of a simulation: nodes, store, disks, time, and what goes wrong with them.

Steps are in ``sim_steps.py`` and ``sim_verbs.py``.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import os
import random
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

from faulty_store import Backlog, Crash, FaultPlan, FaultyStore
from fork_rig import PREFIX
from power_cut import KEEPS, Keep
from sim_clock import Clock, Threading, patched, simulated
from sim_disk import DiskFaults, Files, Platter
from sim_doors import Door
from sim_model import Life, Model, SimStore, must
from sim_node import GRACE, SimNode

import glidefs.exports.table
import glidefs.formats.atomic
import glidefs.formats.reserve
import glidefs.gc.run
import glidefs.host.host
from glidefs.core.check import Closed, CoreError
from glidefs.core.volume import VolumeConfig
from glidefs.errors import GlideError
from glidefs.formats.manifest import NO_ID
from glidefs.formats.pack import BLOCK
from glidefs.store.resilient import ResilientStore
from glidefs.store.which import STORE_KEY
from glidefs.volume.volume import Volume

NODES = ("a", "b")
CLONES = ("c", "d")
LOG = logging.getLogger("glidefs")
MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None
"""Where disks are that need not outlive the power; None: where temporary files are."""


class Result(NamedTuple):
    """What a run was: ``digest`` of all that happened, and counts of steps, faults and crashes."""

    digest: str
    counts: Counter[str]
    trace: list[str]


class Errors(logging.Handler):
    """Exceptions that product code logged instead of raising them."""

    def __init__(self) -> None:
        super().__init__()
        self.unexpected: list[BaseException] = []

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if error is not None and not isinstance(error, Crash | GlideError | OSError):
            self.unexpected.append(error)


class World:
    """The nodes, their store and disks, and what crashes them. Steps are elsewhere."""

    def __init__(self, seed: int, keep_trace: bool = False, *, identity: bool = False) -> None:
        self.seed = seed
        self.identity = identity
        """Whether hosts are cloned and stores are swapped, too: other histories (``sim_identity.py``)."""
        self.rng = random.Random(f"identity {seed}" if identity else seed)
        self.clock = Clock()
        self.store = SimStore(self.clock)
        self.model = Model(self.store)
        self.plan = FaultPlan()
        self.faults = DiskFaults()
        self.counts: Counter[str] = Counter()
        self.tags = itertools.count(1)
        self.trace: list[str] = []
        self._keep_trace = keep_trace
        self._thread = threading.current_thread()
        self._hash = hashlib.sha256()
        self.backlog = Backlog(self.clock)
        self._armed: dict[str, tuple[str, int]] = {}
        """What the next crash of a node waits for: (kind of operation, how many more)."""
        self.errors = Errors()
        self.fenced: set[tuple[bytes, str]] = set()
        """Logs whose records say that they are fenced, and the node."""
        self.acting: list[SimNode] = []
        """Nodes whose step is under way: while one waits for the store another may do something."""
        self.doors: dict[str, Door] = {}
        self._stores: dict[str, FaultyStore] = {}
        self._scope = contextlib.ExitStack()
        self.home = Path(tempfile.mkdtemp(prefix="glidefs-sim-", dir=MEMORY))
        self.nodes: dict[str, SimNode] = {}

    # -- begin and end ---------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        scope = self._scope
        scope.callback(shutil.rmtree, self.home, ignore_errors=True)
        self.platter = Platter(self.home)
        scope.callback(self.platter.close)
        scope.callback(self.faults.stop)
        self.threading: Threading = scope.enter_context(simulated(self.clock, self.seed, self._while_drained))
        files = Files(self.platter, self._file_operation)
        scope.enter_context(
            patched(
                [
                    (glidefs.formats.atomic, "os", files),
                    (glidefs.exports.table, "os", files),
                    (glidefs.formats.reserve, "_reserves", {}),  # those of other hosts are no room of ours
                    (glidefs.host.host, "VolumeConfig", self._volume_config),
                    (LOG, "propagate", False),
                    (LOG, "handlers", [self.errors]),
                ]
            )
        )
        self.settings = self._settings()
        for name in NODES:
            self.add_node(name)
        scope.callback(self._end)
        return self

    def add_node(self, name: str) -> SimNode:
        """Another host, with an empty disk."""
        faulty = self._faulty(name)
        node = SimNode(name, self.home / name, faulty, self.platter, self.faults, self.settings)
        node.asks_which = self.identity
        self.nodes[name] = node
        return node

    def __exit__(self, *_: object) -> None:
        self._scope.close()

    def _end(self) -> None:
        for node in self.nodes.values():
            if node.up:
                with contextlib.suppress(Exception):  # what went wrong before is what counts
                    node.bury()

    def _settings(self) -> dict[str, Any]:
        """The same for both nodes; small, so that everything happens often."""
        rng = self.rng
        return {
            "log_segments": rng.choice([16, 24, 48]),
            "map_budget": rng.choice([96, 128, 4096]) << 10,
            "read_ahead_bytes": rng.choice([0, 0, 4]) * BLOCK,
            "pack_bytes": rng.choice([64, 128, 512]) << 10,
            "batch_segments": rng.choice([1, 4, 16]),
            "batch_bytes": rng.choice([1, 4]) * BLOCK,
            "retire_segments": rng.choice([1, 8]),
            "put_threads": rng.choice([1, 3]),
            "cache_scope": rng.choice(["host", "prefix"]),
            "compact_width": 3,
            "settle_width": 1,
            "compact_commit_packs": rng.choice([1, 8]),
            "compact_rate": 1 << 40,
            "sync_interval": 1e9,
            "max_dirty_age": 1e9,
            "store_patience": 2.0,
            "poll_interval": 15.0,
            "backoff": 1.0,
        }

    def _volume_config(self, **fields: Any) -> VolumeConfig:
        for node in self.nodes.values():
            if Path(fields["log_dir"]).is_relative_to(node.home):
                fields["always_verify"] = node.other_boot
        return VolumeConfig(**fields)

    # -- the store, seen by each ------------------------------------------------------------------------

    def _faulty(self, who: str) -> FaultyStore:
        if who not in self._stores:
            self._stores[who] = self._new_faulty(who)
        return self._stores[who]

    def _new_faulty(self, who: str) -> FaultyStore:
        rng = random.Random(f"faults {self.seed} {who}")
        door = self.doors[who] = Door(who, self.store, self.clock)
        faulty = FaultyStore(door, self.clock, rng, self.plan, self.backlog)
        faulty.before = partial(self._request, who, "before")
        faulty.after = partial(self._request, who, "after")
        faulty.told = partial(self._told, who)
        faulty.sent = partial(self._sent, who)
        return faulty

    def _sent(self, who: str, key: str, body: bytes) -> None:
        if key.endswith("/manifest"):
            if self.identity:
                self.model.sent[who].add(body)
            if self.faults.small_fail:
                self.model.told_by_log.add(body)

    def _told(self, who: str, op: str, key: str, outcome: str) -> None:
        if outcome not in ("ok", "NotFound", "PreconditionFailed"):
            self.counts[f"store {outcome}"] += 1
        self.note(f"    {who} {op} {key.removeprefix(PREFIX + '/')[-60:]}: {outcome}")

    def _request(self, who: str, when: str, op: str, key: str) -> None:
        node = self.nodes.get(who)
        if node is not None:
            node.check_alive()
            node.engine.rest()
        # What a crash from here on leaves of an operation is at least what was there before the request.
        self.platter.settle()
        self._crash_point(who, "store", f"{when} {op} {key}")
        if when == "before":
            self.doors[who].enter()
        if when == "before" and key != STORE_KEY:  # of which others of the node wait for the answer
            self.meanwhile(node)
            if node is not None:
                node.check_alive()

    def meanwhile(self, node: SimNode | None) -> None:
        """Called before each request of a node, or of gc."""

    # -- crashes ---------------------------------------------------------------------------------------

    def arm(self, who: str, kind: str, count: int) -> None:
        """Crash a node (or gc) at its ``count``-th request to the store, or operation on a file, from now."""
        self._armed[who] = kind, count

    def _crash_point(self, who: str, kind: str, what: str) -> None:
        armed = self._armed.get(who)
        if armed is None or armed[0] != kind:
            return
        self._armed[who] = kind, armed[1] - 1
        if armed[1] > 0:
            return
        del self._armed[who]
        self.note(f"  {who} crashes {what}")
        self.counts[f"crash at {kind}"] += 1
        raise self.nodes[who].kill(what) if who in self.nodes else Crash(what)

    def _file_operation(self, operation: str, path: str) -> None:
        for node in self.nodes.values():
            if Path(path).is_relative_to(node.home):
                node.check_alive()
                self._crash_point(
                    node.name, "file", f"before {operation} of {path.removeprefix(str(node.home))}"
                )
        self.faults.check_small(operation, path)

    def crash(self, node: SimNode, keep: Keep | None, at: int | None = None) -> None:
        """A node's process has died, or dies now, and with ``keep`` its power is cut."""
        self._armed.pop(node.name, None)
        self.faults.stop()
        lives = self.model.lives.values()
        open_now = [life for life in lives if node.volume(life.name, life.log_id) is not None]
        node.bury(at)
        at = node.died_at if at is None else at
        self.counts["power cut" if keep is not None else "crash"] += 1
        how = f", its power was cut, keeping {keep}" if keep is not None else ""
        self.note(f"  {node.name} is down{how}")
        for life in open_now:
            life.unchecked = True
        if keep is not None:
            for life in lives:
                if life.node == node.name and life.cut_at is None:
                    life.cut_at = at
            self.model.forget_log(node.name)
            node.cut_power(keep, random.Random(self.rng.random()))
        self.model.observe()

    def draw_keep(self) -> Keep | None:
        """How a crash goes: None where the process dies, else what a power cut keeps."""
        return KEEPS[self.rng.choice(sorted(KEEPS))] if self.rng.random() < 0.5 else None

    def boot(self, node: SimNode) -> None:
        """Start a node that is down, and compare what it serves with what it must. Raises Crash."""
        self.note(f"  {node.name} starts")
        node.boot(self.threading, self.clock)
        self.check_open(node)

    # -- the model against a node -----------------------------------------------------------------------

    def entries(self, node: SimNode) -> Iterator[tuple[Life, Volume]]:
        """The lives that a node serves."""
        self.model.observe()
        for entry in node.router.table.all() if node.up else ():
            volume, record = entry.volume, entry.record
            if volume is None or record is None or record.log_id == NO_ID:
                continue
            self.model.found(node.name, volume.root, record.size)
            yield self.model.lives[record.log_id, node.name], volume

    def usable(self) -> list[tuple[SimNode, Life, Volume]]:
        """What guests can rely on."""
        return [
            (node, life, volume)
            for node in self.nodes.values()
            for life, volume in self.entries(node)
            if not life.lost and not volume.fenced and not self.late(life) and node not in self.acting
        ]

    def late(self, life: Life) -> bool:
        """Whether a fork should have been put by now: gc may have its packs, the next upload fences it."""
        return not life.published and self.clock.now - life.born > GRACE / 4 - 1

    def read(self, node: SimNode, life: Life, volume: Volume) -> dict[int, bytes]:
        """All hot sectors of a volume, as a guest reads them."""
        found: dict[int, bytes] = {}
        for first, count in life.history.areas:
            data = node.guest(volume.core, partial(volume.core.pread, first * 4096, count * 4096))
            for i in range(count):
                found[first + i] = data[i * 4096 : (i + 1) * 4096]
        return found

    def check_open(self, node: SimNode) -> None:
        """After a start: what the crash before it may have taken, and nothing else, is gone."""
        for life, volume in self.entries(node):
            if not (life.unchecked or life.cut_at is not None):
                continue
            try:
                found = self.read(node, life, volume)
                last = volume.core.info().last_seq
            except (CoreError, Closed, GlideError) as error:
                must(life.lost or volume.fenced or self.late(life), f"{life}: cannot be read: {error}")
                continue
            if life.lost:
                continue
            if life.cut_at is not None:
                life.settle_cut(found, max(last, life.segment))
            else:
                life.settle(found, last)
            life.unchecked = False
            self.note(f"  {life} is as it should be")

    def check_late(self) -> None:
        """What had another's name when its node started may have it for itself now: see what is there."""
        for node in self.nodes.values():
            waiting = [life for life, _ in self.entries(node) if life.unchecked or life.cut_at is not None]
            if node not in self.acting and not all(life.lost for life in waiting):
                self.check_open(node)

    def check_fenced(self) -> None:
        """Nobody is fenced but for a reason, and whoever was once stays so."""
        for node in self.nodes.values():
            for life, volume in self.entries(node):
                was_fenced = (life.log_id, node.name) in self.fenced
                must(volume.fenced or not was_fenced, f"{life} was fenced, and is served")
                if volume.fenced and not life.lost:
                    assert self.late(life), f"{life} is fenced: {volume.fenced}"
                    life.stale = True
            for entry in node.router.table.all() if node.up else ():
                if entry.record is not None and entry.record.fenced and not entry.unsaved:
                    self.fenced.add((entry.record.log_id, node.name))

    def check_all_know(self) -> None:
        """Whoever lost a volume to the store's knowledge hears of it, also with nothing to upload."""
        for node in self.nodes.values():
            with self.step_of(node):
                self.clock.sleep(node.host.settings.sync_interval)
                node.host.watch.look()
                node.run_due()
            for life, volume in self.entries(node):
                adopted = life.may_adopt and self.store.etag_of(volume.committer._key) == volume.etag
                stale = life.stale and life.published and volume.etag is not None and not adopted
                must(volume.fenced or not stale, f"{life} is stale, and does not know")
                if self.identity and life.outdone and volume.fenced:
                    self.counts["twin fenced"] += 1

    # -- what others do --------------------------------------------------------------------------------

    def _while_drained(self) -> None:
        """A drain waits: uploads go on."""
        self.acting[-1].run_due(2)

    def collect(self, who: str = "gc") -> None:
        """A run of gc, from a machine of its own."""
        if self.resting():
            return
        store = ResilientStore(self._faulty(who))
        try:
            glidefs.gc.run.collect(store.view("background", 30.0), PREFIX, grace=GRACE)
            self.counts["gc to its end"] += 1
        except Crash:
            self.counts["crash of gc"] += 1
        except GlideError as error:
            self.note(f"  gc: {error}")
        self._armed.pop(who, None)
        self.model.observe()
        self.model.stored.check_named()

    def resting(self) -> bool:
        """Whether gc does not run now, as its operator knows of something."""
        return False

    # -- the trace -------------------------------------------------------------------------------------

    def note(self, text: str) -> None:
        """What happened, for trace and digest: on one thread, or no seed is the same twice."""
        assert threading.current_thread() is self._thread, f"{threading.current_thread().name}: {text}"
        text = text.replace(str(self.home), "")
        self._hash.update(text.encode() + b"\n")
        if self._keep_trace:
            self.trace.append(f"{self.clock.now - 1_700_000_000:9.2f} {text}")

    def result(self) -> Result:
        self.counts.update(self.faults.counts)
        return Result(self._hash.hexdigest(), self.counts, self.trace)
