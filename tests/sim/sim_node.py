"""A node of a simulation: the product's router, host and core, with nothing that runs by itself.

What threads of the daemon do is done here step by step, on the simulation's thread: ``run_due`` is the
uploaders' loop, ``guest`` is a fault thread, the event thread and the uploaders while a guest waits. A
guest's request alone runs on another thread, which waits in the core; the core's one worker has come to rest
whenever the simulation goes on, because it was asked something that it answers after all that came before.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from faulty_store import Crash, FaultyStore
from fork_rig import PREFIX, NoGuests
from history import SECTOR
from power_cut import Keep
from sim_disk import DiskFaults, Platter
from stored_roots import owner_of

from glidefs.bases.manifest_cache import BaseLibrary
from glidefs.core.check import Closed
from glidefs.core.engine import Engine, EngineConfig, EngineStats, EventKind
from glidefs.core.volume import CoreVolume
from glidefs.errors import StoreError
from glidefs.exports.router import ExportRouter
from glidefs.exports.settings import RouterSettings
from glidefs.exports.table import Entry
from glidefs.formats.manifest import Root
from glidefs.formats.pack import BLOCK
from glidefs.host.host import Host
from glidefs.manifest import local
from glidefs.manifest.lease import Owner
from glidefs.store.resilient import ResilientStore
from glidefs.store.which import WhichStore
from glidefs.volume.logs import log_dir
from glidefs.volume.settings import HostSettings
from glidefs.volume.volume import Volume

GRACE = 1000.0
SEGMENT_SECTORS = 12
HANGS = 4000
"""Times that a request is seen to wait with nothing to be done about it, after which it hangs."""
STUCK = 3
"""Such times after which a full disk has space again."""
REAL_PATIENCE = 300.0
FULL = (EventKind.LOG_FULL, EventKind.MAP_FULL, EventKind.DISK_ERROR)
DAMAGED_CACHE = 0.7

guests = ThreadPoolExecutor(4, "guest")
"""More than one: while a request of one node waits, the other node may do something."""


class _Wait:
    """What is known of a request that waits. ``told``: that it wants space."""

    def __init__(self) -> None:
        self.told = False
        self.idle = 0


class StillEngine(Engine):
    """An engine whose figures are those of a worker at rest."""

    __slots__ = ("volumes",)

    def __init__(self, config: EngineConfig) -> None:
        self.volumes: Callable[[], list[Volume]] = list
        super().__init__(config)

    def rest(self) -> None:
        """Until the worker has done all that was asked of it so far.

        A request is only begun in the round of the worker that it comes in, and goes on at the end of that.
        """
        for volume in self.volumes():
            with contextlib.suppress(Closed):
                volume.core.info()
                volume.core.info()
                return

    def stats(self) -> EngineStats:
        self.rest()
        return super().stats()


class SimNode:
    """One host, its disk and its processes one after another. ``up`` while one of them runs."""

    def __init__(
        self,
        name: str,
        home: Path,
        faulty: FaultyStore,
        platter: Platter,
        faults: DiskFaults,
        settings: dict[str, Any],
    ) -> None:
        self.name = name
        self.home = home
        self.faulty = faulty
        self.platter = platter
        self.faults = faults
        self.settings = settings
        self.disks = 1
        """How many disks this host has had: each is another host to the store."""
        self.label = name
        """What people call it: the node's name in roots."""
        self.host_name = f"{name}/1"
        """What its id is made of."""
        self.asks_which = False
        """Whether it asks the store which one it is."""
        self.store_id: str | None = None
        """The store that this host works with, as its disk has it."""
        self.up = False
        self.dead = False
        """The process died, and what it does on its way out does not count."""
        self.died_at = 0
        self.other_boot = False
        """Whether the power was cut since the logs were written: then replays verify what they read."""
        self.when_stuck: Callable[[SimNode], None] = lambda node: None
        """Called while a guest waits for something that no time brings about."""
        self._clock: Any = None
        self.engine: StillEngine
        self.host: Host
        self.router: ExportRouter
        home.mkdir(parents=True)

    @property
    def owner(self) -> Owner:
        """This host with the disk that it has now."""
        return Owner(owner_of(self.host_name).host, self.label)

    def has_log(self, root: Root) -> bool:
        """Whether the log that a root names is on this disk."""
        return log_dir(self.home / "logs", root.volume_id, root.log_id).is_dir()

    # -- the life of a process -----------------------------------------------------------------------

    def boot(self, threading: Any, clock: Any) -> None:
        """Start a process, and open what the records say. Raises Crash."""
        self._clock = clock
        stopping = threading.Event()
        store = ResilientStore(self.faulty, cancel=stopping)
        if self.asks_which:
            store.identity = WhichStore(self.store_id, self._bind)
        own = dict(self.settings)
        self.engine = StillEngine(
            EngineConfig(
                cache_dir=self.home / "blocks",
                workers=1,
                segment_bytes=SEGMENT_SECTORS * SECTOR,
                log_limit=own.pop("log_segments") * SEGMENT_SECTORS * (SECTOR + 32),
                map_budget=own.pop("map_budget"),
                cache_bytes=64 * BLOCK,
            )
        )
        (self.home / "exports").mkdir(exist_ok=True)
        (self.home / "logs").mkdir(exist_ok=True)
        (self.home / "state").mkdir(exist_ok=True)
        options = HostSettings(log_dir=self.home / "logs", gc_grace=GRACE, compaction=False, **own)
        self.host = Host(self.engine, store, state_dir=self.home / "state", settings=options)
        self.engine.volumes = self.host.volumes
        bases = BaseLibrary(store, grace=GRACE, stopping=stopping)
        places = RouterSettings(
            owner=self.owner,
            exports_dir=self.home / "exports",
            state_dir=self.home / "state",
            logs_dir=self.home / "logs",
            prefixes=(PREFIX,),
        )
        self.router = ExportRouter(self.host, store, (NoGuests(),), places, bases, stopping)
        self.up = True
        self.dead = False
        self._open_recorded()

    def _bind(self, id_: str) -> None:
        self.store_id = id_

    def _open_recorded(self) -> None:
        """What the opener's threads do at a start."""
        opener, table = self.router._opener, self.router.table
        self.router._records.sync()
        local.sync_volumes(self.home / "state")
        records, damaged = self.router._records.load()
        assert not damaged, f"records are damaged: {damaged}"
        entries = [Entry(record.name, record) for record in records]
        for entry in entries:
            entry.state = "starting"
            table.add(entry)
        for entry in entries:
            opener._open_recorded(entry)
        opener.tried.set()
        self.check_alive()

    def look_after(self) -> None:
        """What the opener's thread does now and then."""
        opener = self.router._opener
        if opener._offered():
            opener._retry()
        self.check_alive()

    def stop(self) -> None:
        """The process ends as it means to; what it should sync first is the caller's."""
        self.router.close()
        self.host.close()
        self.engine.close()
        self.up = False
        self.platter.settle()

    def kill(self, why: str) -> Crash:
        """The process ends now. Returns what the caller must raise."""
        if not self.dead:
            self.dead = True
            self.died_at = self.platter.position()
            os.rename(self.home, self._grave)
        return Crash(why)

    @property
    def _grave(self) -> Path:
        return self.home.with_name(self.home.name + ".dead")

    def check_alive(self) -> None:
        """Raises Crash on the way out of a process that died: some code swallows it."""
        if self.dead:
            raise Crash(self.name)

    def bury(self, at: int | None = None) -> None:
        """After the death of a process: what is left of it goes, its files are as they were when it died.

        ``at``: a position in the trace of the operation that it died in.
        """
        self.kill("")
        self.up = False
        for volume in self.host.volumes():
            volume.core.close()
        self.engine.close()
        shutil.rmtree(self.home, ignore_errors=True)
        os.rename(self._grave, self.home)
        self.platter.forget_after(self.died_at if at is None else at, self.home)
        self.dead = False

    def cut_power(self, keep: Keep, rng: random.Random) -> None:
        """The host of a node whose process has ended loses power."""
        self.platter.cut(self.home, keep, rng)
        self.other_boot = True
        cache = self.home / "blocks" / "blocks.data"
        if rng.random() < DAMAGED_CACHE:
            with cache.open("r+b") as file:
                for _ in range(8):
                    file.seek(rng.randrange(64) * BLOCK + rng.randrange(BLOCK // SECTOR) * SECTOR)
                    file.write(rng.randbytes(8))

    def lose_disk(self) -> None:
        """All that this host had is gone."""
        shutil.rmtree(self.home)
        self.home.mkdir()
        self.disks += 1
        self.host_name = f"{self.name}/{self.disks}"
        self.store_id = None
        self.platter.lose(self.home)

    # -- what threads do ------------------------------------------------------------------------------

    def run_due(self, most: int = 8) -> int:
        """Handle events, and run upload jobs that are due; returns how many. Raises Crash."""
        scheduler = self.host.scheduler
        self.handle_events()
        done = 0
        while done < most and any(
            not job.busy and job.due <= self._clock.now for job in scheduler._jobs.values()
        ):
            if scheduler.life.pauses:
                break
            taken = scheduler._take()
            assert taken is not None
            job, seal, urgent = taken
            delay: float | None = self.host.settings.backoff
            try:
                delay = scheduler._run(job, seal, urgent)
            finally:
                scheduler._done(job, delay)
            self.check_alive()
            done += 1
            self.handle_events()
        return done

    def handle_events(self, without: tuple[EventKind, ...] = ()) -> None:
        """Take the core's events; those of ``without`` are thrown away."""
        self.engine.rest()
        for event in self.engine.events_next(0):
            if event.kind not in without:
                with contextlib.suppress(Closed):
                    self.host.scheduler._handle(event)

    def read_ahead(self) -> None:
        """What the prefetch threads do."""
        tasks = self.host.faults._queue
        while not tasks.empty():
            with contextlib.suppress(Closed, StoreError):
                tasks.get()()
            self.check_alive()

    def guest(self, core: CoreVolume, request: Callable[[], Any]) -> Any:
        """The result of a guest's request, attended to until it ends. Raises Crash, and what it raises."""
        op = guests.submit(request)
        end = time.monotonic() + REAL_PATIENCE
        wait = _Wait()
        while wait.idle < HANGS and time.monotonic() < end:
            try:
                return op.result(0.0003)
            except TimeoutError:
                self._attend(core, wait)
        state = core.info()
        core.fail(errno.ETIMEDOUT)
        raise AssertionError(f"{self.name}: a request hangs: {state}")

    def _attend(self, core: CoreVolume, wait: _Wait) -> None:
        """One thing that a waiting request may need. Does nothing to one that only has not ended yet."""
        if not (core.info().parked and core.info().parked):  # twice: see `rest`
            return
        if Engine.stats(self.engine).faults_queued:
            fault = self.engine.faults_next(self.host.settings.fault_blocks, 0)
            if fault is not None:
                self.host.faults.answer(fault)
                self.check_alive()
            return
        # Who waits for space says so again every second of real time: once is enough.
        self.handle_events(without=FULL if wait.told else ())
        wait.told = True
        if self.run_due(1):
            return
        wait.idle += 1
        self._clock.sleep(0.25)
        if wait.idle == STUCK:
            self.when_stuck(self)
        if self.faults.log_is_stuck and wait.idle >= STUCK:
            self.faults.stop()
            core.sync()  # writes that wait are tried again with it, rather than at the next tick

    # -- look-ups --------------------------------------------------------------------------------------

    def volume(self, name: str, log_id: bytes) -> Volume | None:
        """The volume of that log, if it is served here."""
        entry = self.router.table.find(name) if self.up else None
        if entry is None or entry.volume is None or entry.record is None or entry.record.log_id != log_id:
            return None
        return entry.volume
