"""The daemon: one process per host that owns the engine, the host of volumes, and the listeners.

Start: directories, lock, engine, store, exports, NBD, API, and only then "ready". Stop (SIGTERM, SIGINT):
verbs that change something are refused, what is dirty is uploaded within the deadline while guests go
on, then guests are let go, logs are synced, and everything closes in the reverse order. What is not
uploaded by then is safe in the log. A second signal skips the upload.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glidefs.config import Config
from glidefs.core import heap
from glidefs.daemon import process
from glidefs.daemon.disk_sizes import misfits
from glidefs.daemon.identity import CacheIdentity
from glidefs.daemon.looking import Looks
from glidefs.daemon.serving import Core
from glidefs.daemon.store_check import StoreCheck
from glidefs.errors import GlideError
from glidefs.events import event
from glidefs.exports.router import ExportRouter
from glidefs.exports.table import Entry
from glidefs.handoff.coordinator import HandoffCoordinator, close_all
from glidefs.handoff.history import History
from glidefs.handoff.predecessor import HandoffFailed, Outcome, Predecessor
from glidefs.handoff.protocol import ExportCut, ListenerInfo
from glidefs.host.host import Host
from glidefs.store import open_configured
from glidefs.store.resilient import ResilientStore
from glidefs.store.which import WhichStore
from glidefs.tracing.exporter import Exporter
from glidefs.version import commit, version
from glidefs.volume.volume import Volume

if TYPE_CHECKING:
    from glidefs.api.server import ApiServer

log = logging.getLogger(__name__)

Listeners = list[tuple[ListenerInfo, int]]
"""Listening sockets as descriptors, and what they are for."""
FIRST_EXPORTS = 15.0
"""Seconds that the listeners wait for the exports of the last run to be open again."""
STOP_THREADS = 16
FORCED_EXIT = 60.0
"""Seconds after the drain deadline until a stop that hangs is ended."""


class Daemon:
    """Owns everything. `start()` and `stop()` are called once each, from the main thread.

    ``config_file`` is what a successor reads. ``asked_to_stop`` is set by a signal: a handoff that hangs
    is called off. With ``init_store`` the directory of the store is made. ``handed_over`` is set once
    another process serves the exports: then this one must end by :meth:`leave`.
    """

    def __init__(
        self,
        config: Config,
        config_file: str = "",
        asked_to_stop: threading.Event | None = None,
        *,
        init_store: bool = False,
    ) -> None:
        self.config = config
        self.asked_to_stop = asked_to_stop or threading.Event()
        self.config_file = config_file
        self._init_store = init_store
        self._has_exports = False
        self.started_at = time.time()
        self.history = History()
        self.handed_over = threading.Event()
        self.on_handed_over: Callable[[], None] = lambda: None
        self._stopping = threading.Event()
        self._ready = False
        self._handoff = threading.Lock()
        self._locks: list[process.DirectoryLock] = []
        self._undo = contextlib.ExitStack()
        self._store: ResilientStore | None = None
        self.spans: Exporter | None = None
        self._identity: CacheIdentity | None = None
        self._core: Core | None = None
        self._api: ApiServer | None = None
        self.looks = Looks(self)

    @property
    def core(self) -> Core:
        """What serves the exports now."""
        if self._core is None:
            raise GlideError("the daemon is starting; try again")
        return self._core

    @property
    def router(self) -> ExportRouter:
        """The exports."""
        return self.core.router

    @property
    def host(self) -> Host:
        """The volumes and their threads."""
        return self.core.host

    @property
    def cache_dir(self) -> Path:
        """Where everything local is."""
        return Path(self.config.cache.dir)

    # -- start ---------------------------------------------------------------------------------

    def start(self, listeners: Listeners | None = None, locks: list[int] | None = None) -> None:
        """Bring everything up, with what a process before left; taken down again if a part fails."""
        try:
            self._prepare(locks or [])
            self._open_core(standby=False)
            self.core.vhost.inherit(_duplicates(listeners or [], "vhost-user"))
            assert self._store is not None
            marker = self.cache_dir / "store-probed"
            check = StoreCheck(self._store, self.config.store, marker, self._stopping)
            check.run(has_exports=self.router.has_records())
            self._store.patient = True
            self._open_exports()
            self.core.vhost.close_inherited()
            self._listen(listeners or [])
        except BaseException:
            self._stopping.set()
            self._close()
            raise

    def _prepare(self, locks: list[int]) -> None:
        """Directories, locks, the store: what lasts as long as the process."""
        if self._store is not None:
            return
        self.spans = self._open_spans()
        self._prepare_directories(locks)
        heap.keep_large_buffers_apart()
        process.raise_file_limit()
        self._store = self._open_store()

    def _open_core(self, *, standby: bool) -> None:
        assert self._store is not None
        assert self._identity is not None
        self._core = Core(self.config, self._store, self._identity, standby=standby, sink=self.spans)

    def _open_exports(self) -> None:
        gc.disable()  # nothing that is made here is garbage; to look for some took a fifth of the time
        try:
            self.router.start()
            if not self.router.wait_tried(FIRST_EXPORTS):
                log.warning("some exports are still being opened; the others are served")
        finally:
            # All of it is old now: else it would be looked at once more before the first client is answered.
            gc.freeze()
            gc.unfreeze()
            gc.enable()

    def _listen(self, listeners: Listeners) -> None:
        """Answer clients, at the sockets of the process before if there was one."""
        self._inherit(listeners)
        if not self.core.server.is_running:
            self.core.server.start()
        self._prepare_api(listeners).start()
        close_all(fd for _, fd in listeners)
        self._ready = True
        self.looks.start()
        exports, url = len(self.router.table.all()), self.config.store.url
        log.info("ready: glidefs %s (commit %s), %d exports, store %s", version(), commit(), exports, url)

    def _inherit(self, listeners: Listeners) -> None:
        """Give the NBD server duplicates of its listeners, unless it has them."""
        mine = _duplicates(listeners, "nbd")
        if mine and not self.core.server.listeners:
            self.core.server.inherit(mine)

    def _prepare_api(self, listeners: Listeners) -> ApiServer:
        """The API with its listeners and its token, not served yet. Raises ConfigError, ListenError."""
        if self._api is None:
            api = _api_server(self)
            api.prepare(_duplicates(listeners, "api"))
            self._api = api
        return self._api

    def _prepare_directories(self, locks: list[int]) -> None:
        cache = self.config.cache
        own = {"dir": Path(cache.dir), "log_dir": cache.logs, "block_cache_dir": cache.blocks}
        for key, path in own.items():
            process.make_directory(key, path)
        if self.config.debug.shadow_dir is not None:
            process.make_directory("shadow_dir", Path(self.config.debug.shadow_dir), "debug")
        for path in (cache.state, Path(cache.dir) / "exports"):
            process.make_directory("dir", path)
        for line in misfits(self.config):
            log.warning("%s", line)
        inherited = {os.fstat(fd)[1:3]: fd for fd in locks}
        for path in dict.fromkeys(path.resolve() for path in own.values()):
            lock = process.DirectoryLock(path)
            lock.acquire(inherited)
            self._locks.append(lock)
            self._undo.callback(lock.release)
        for fd in inherited.values():
            os.close(fd)  # of a directory that the configuration names no more
        beside = {"log_dir": cache.logs, "block_cache_dir": cache.blocks}
        self._has_exports = any((Path(cache.dir) / "exports").glob("*.json"))
        self._identity = CacheIdentity(Path(cache.dir), beside, keeps_logs=self._has_exports)

    def _open_spans(self) -> Exporter | None:
        """Where spans go. At the end the last are sent when all else is done. Raises ConfigError."""
        if not (endpoint := self.config.telemetry.otlp_endpoint):
            return None
        spans = Exporter(endpoint, self.config.daemon.node_name)
        self._undo.callback(spans.close)
        return spans

    def _open_store(self) -> ResilientStore:
        settings = self.config.store
        inner = open_configured(settings, create=self._init_store)
        if not self._has_exports:
            inner.check_there()
        store = ResilientStore(inner, reads=settings.reads, writes=settings.writes, cancel=self._stopping)
        self._undo.callback(store.close)
        assert self._identity is not None
        store.identity = WhichStore(self._identity.store_id, self._identity.bind)
        return store

    # -- handoff: this process is the predecessor --------------------------------------------------

    def hand_over(self, *, dry_run: bool = False) -> Outcome:
        """Give the exports to a new process. Raises HandoffFailed: they are served here, as before.

        After success :attr:`handed_over` is set.
        """
        with event("handoff --dry-run" if dry_run else "handoff") as what:
            if not self._handoff.acquire(blocking=False):
                raise HandoffFailed("another handoff is under way")
            try:
                ending = self._stopping.is_set() or self.asked_to_stop.is_set() or self.handed_over.is_set()
                if not self._ready or ending:
                    raise HandoffFailed("the daemon is starting or stopping")
                outcome = Predecessor(self).run(dry_run=dry_run)
                what.detail = (
                    f"{outcome.outcome}, process {outcome.pid} serves {outcome.exports} exports and "
                    f"{outcome.connections} connections, guests waited {outcome.stall * 1e3:.1f} ms"
                )
                if outcome.outcome == "succeeded":
                    process.notify(f"MAINPID={outcome.pid}")
                    self.handed_over.set()
                    self.on_handed_over()
                return outcome
            finally:
                self._handoff.release()

    def shut(self, why: str, patience: float) -> contextlib.AbstractContextManager[list[Entry]]:
        """All exports, with no verb running on any; verbs that come are refused."""
        return self.router.table.shut(why, patience)

    def reopen(self) -> None:
        """Verbs run again."""
        self.router.table.reopen()

    def stop_listening(self) -> None:
        """The API takes no new connections."""
        if self._api is not None:
            self._api.stop_listening()

    def coordinator(self, entries: list[Entry]) -> HandoffCoordinator:
        """For a handoff of these exports."""
        return self.core.coordinator(entries)

    def descriptors(self) -> tuple[list[int], Listeners]:
        """Locks and listeners, as duplicates that are the caller's."""
        assert self._api is not None
        locks = [os.dup(lock.fileno()) for lock in self._locks]
        server = self.core.server
        listeners = [
            (ListenerInfo("nbd", path), os.dup(at.fileno())) for path, at in server.named_listeners()
        ]
        listeners += [
            (ListenerInfo("vhost-user", path), os.dup(at.fileno()))
            for path, at in self.core.vhost.listeners()
        ]
        return locks, listeners + [
            (ListenerInfo("api", path), os.dup(fd)) for path, fd in self._api.descriptors()
        ]

    def revive(self, cuts: list[ExportCut], sockets: list[int], listeners: Listeners) -> None:
        """The successor is dead: open everything again, as after a crash, with these connections."""
        self.core.close()
        self._open_core(standby=False)
        self.core.vhost.inherit(_duplicates(listeners, "vhost-user"))
        self._open_exports()
        served = [entry for entry in self.router.table.all() if entry.serves()]
        coordinator = self.core.coordinator(served)
        coordinator.readopt(cuts, sockets)
        self._listen(listeners)  # the API has served all the time

    def leave(self) -> None:
        """Another process serves: end this one, without closing what both have. Does not return."""
        for lock in self._locks:
            lock.leave()
        if self._api is not None:
            self._api.close(handed_over=True)
        if self.spans is not None:
            self.spans.close()
        process.end(0)

    # -- handoff: this process is the successor -----------------------------------------------------

    def stand_by(self, locks: list[int], listeners: Listeners, names: tuple[str, ...]) -> HandoffCoordinator:
        """Open these exports while the predecessor serves them, and all that could fail once it has left."""
        self._prepare(locks)
        assert self._store is not None
        self._store.patient = True
        self._open_core(standby=True)
        self.core.vhost.pause()
        self.core.vhost.inherit(_duplicates(listeners, "vhost-user"))
        self._inherit(listeners)
        self._prepare_api(listeners)
        self.host.pause(0.0)
        return self.core.coordinator(self.router.start_standby(names))

    def be_main_process(self) -> None:
        """Part of a handoff: tell the service manager that this process is the one to watch."""
        process.notify(f"MAINPID={os.getpid()}")

    def take_over(self, listeners: Listeners) -> None:
        """The exports are served: listen, and look after everything from now on.

        There is nobody to go back to: a failure here is logged, and the rest is done.
        """
        steps: tuple[tuple[str, Callable[[], None]], ...] = (
            *(("the lock file names another process", lock.sign) for lock in self._locks),
            ("some volumes are not looked after", self.host.settle),
            ("some local copies of roots are not saved", self.host.save_roots),
            ("uploads do not resume", self.host.resume),
            ("exports that were not handed over are not opened", self.router.end_standby),
            ("NBD does not listen", self.core.server.start),
            ("vhost-user does not listen", self.core.vhost.resume),
            ("vhost-user sockets are left over", self.core.vhost.close_inherited),
            (
                "the control API does not listen; send SIGHUP to hand over again",
                lambda: self._listen(listeners),
            ),
        )
        for failure, step in steps:
            try:
                step()
            except Exception as error:
                log.exception("after the handoff: %s: %s", failure, error)

    def discard_listeners(self) -> None:
        """This process does not take over: close what it would have listened on, keep what it inherited."""
        if self._api is not None:
            self._api.close(handed_over=True)
        if self._core is not None:
            self._core.server.discard()
            self._core.vhost.forget()

    def leave_standby(self) -> None:
        """Forget what was opened in standby."""
        if self._core is not None:
            self._core.engine.shutdown()
            self._core.server.close(handed_over=True)
            self._core.vhost.forget()
            self._core.router.abandon()
            self._core.close()
            self._core = None

    # -- what the API asks ---------------------------------------------------------------------

    @property
    def serving(self) -> ExportRouter | None:
        """The exports; None before they are there."""
        return self._core.router if self._core else None

    @property
    def store(self) -> ResilientStore | None:
        """The store; None before it is open."""
        return self._store

    @property
    def is_stopping(self) -> bool:
        """Whether the end of the process has begun."""
        return self._stopping.is_set()

    @property
    def ready(self) -> bool:
        """Whether it serves, every export was tried, and it goes on."""
        return self._ready and not self.is_stopping

    def health(self) -> dict[str, Any]:
        """State of the process, for GET /health."""
        return self.looks.health()

    def metrics(self) -> bytes:
        """The Prometheus text."""
        return self.looks.metrics()

    def live(self) -> bytes:
        """What all exports do now, as JSON."""
        return self.looks.live()

    def live_of(self, name: str) -> bytes:
        """What one did in the last hour, as JSON. Raises UnknownExport."""
        return self.looks.live_of(name)

    # -- stop ----------------------------------------------------------------------------------

    def stop(self, hurry: threading.Event) -> None:
        """Upload within the deadline (unless `hurry`), let guests go, sync the logs, close everything.

        A handoff that is under way ends first; if it succeeds there is nothing to stop any more.
        """
        self.asked_to_stop.set()
        if not self._handoff.acquire(timeout=FORCED_EXIT):
            log.critical("a handoff is past its cut-over and does not end; this process ends as in a crash")
            os._exit(1)
        if self.handed_over.is_set():
            self.leave()
        deadline = self.config.daemon.drain_deadline
        process.notify("STOPPING=1", f"EXTEND_TIMEOUT_USEC={int((deadline + FORCED_EXIT) * 1e6)}")
        self._ready = False
        router, store = self._core.router if self._core else None, self._store
        if router is not None:
            router.refuse_changes()
        if router is not None and store is not None and deadline > 0:
            # Asked now: what was known about the store may be from before it came back.
            if not store.answers():
                log.warning("what is not uploaded stays safe in the log")
            else:
                self._drain(router, time.monotonic() + deadline, hurry)
        if router is not None:
            router.let_go(remove_devices=self.config.daemon.on_stop == "remove")
        self._stopping.set()
        self._close()
        log.info("stopped")

    def _close(self) -> None:
        self.looks.close()
        if self._api is not None:
            self._api.close()
        if self._core is not None:
            self._core.close()
        self._undo.close()

    def _drain(self, router: ExportRouter, until: float, hurry: threading.Event) -> None:
        """Drain every dirty volume. The threads are left behind when time is up: closing ends them."""
        dirty = [
            entry.volume
            for entry in router.table.all()
            if entry.volume and entry.volume.core.info().dirty_bytes
        ]
        if not dirty:
            return
        log.info("uploading %d exports before the stop", len(dirty))
        pool = ThreadPoolExecutor(STOP_THREADS, "stop-drain")
        waiting = [pool.submit(_drain_quietly, volume, until) for volume in dirty]
        while time.monotonic() < until and not hurry.is_set():
            if all(future.done() for future in waiting):
                break
            hurry.wait(0.05)
        pool.shutdown(wait=False, cancel_futures=True)
        left = sum(volume.core.info().dirty_bytes for volume in dirty)
        if left:
            log.warning("%d bytes are not uploaded yet; they are safe in the log", left)


def _drain_quietly(volume: Volume, until: float) -> None:
    try:
        volume.drain(max(0.0, until - time.monotonic()))
    except GlideError as error:
        log.warning("%s", error)


def _duplicates(listeners: Listeners, role: str) -> list[tuple[str, socket.socket]]:
    return [(info.path, socket.socket(fileno=os.dup(fd))) for info, fd in listeners if info.role == role]


def _api_server(daemon: Daemon) -> ApiServer:
    # Its imports take as long as the rest of a start, so guests are served before.
    from glidefs.api.app import build_app
    from glidefs.api.audit import Audit
    from glidefs.api.server import ApiServer

    settings = daemon.config.api
    return ApiServer(settings, build_app(daemon, Audit(settings.audit_log, daemon.spans)))
