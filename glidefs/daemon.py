"""The daemon: one process per host that owns the engine, the host of volumes, and the listeners.

Start: directories, lock, engine, store, exports, NBD, API, and only then "ready". Stop (SIGTERM, SIGINT):
verbs that change something are refused, what is dirty is uploaded within the deadline while guests go
on, then guests are let go, logs are synced, and everything closes in the reverse order. What is not
uploaded by then is safe in the log. A second signal skips the upload.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from glidefs import heap, process
from glidefs.bases import BaseLibrary
from glidefs.config import Config, config_path, load_config
from glidefs.core.engine import Engine, EngineConfig, Event, EventKind
from glidefs.errors import GlideError, StoreError, StoreUnsupported
from glidefs.metrics import ExportFigures, Metrics, Snapshot
from glidefs.router import ExportRouter, RouterSettings
from glidefs.store import open_store
from glidefs.store.probe import probe_store
from glidefs.store.resilient import ResilientStore
from glidefs.transport.base import NbdTransport
from glidefs.transport.nbd import NbdServer
from glidefs.transport.ublk import UblkTransport
from glidefs.volume.host import Host
from glidefs.volume.settings import HostSettings
from glidefs.volume.volume import Volume

log = logging.getLogger(__name__)

PROBE_DEADLINE = 5.0
PROBE_RETRY = 15.0
FIRST_EXPORTS = 15.0
"""Seconds that the listeners wait for the exports of the last run to be open again."""
STOP_THREADS = 16
FORCED_EXIT = 60.0
"""Seconds after the drain deadline until a stop that hangs is ended."""


def milliseconds(seconds: float) -> int:
    """For the core: 0 stays 0 (no limit), anything else is at least 1."""
    return max(1, round(seconds * 1000)) if seconds else 0


def engine_config(config: Config) -> EngineConfig:
    """The engine's part of the configuration."""
    cache = config.cache
    return EngineConfig(
        cache_dir=cache.blocks,
        workers=config.daemon.workers,
        segment_bytes=cache.segment_size,
        log_limit=cache.log_size,
        map_budget=cache.map_budget,
        cache_bytes=cache.block_cache_size,
        log_full_timeout_ms=milliseconds(cache.log_full_timeout),
        read_timeout_ms=milliseconds(config.reader.read_timeout),
        busy_poll_us=config.daemon.busy_poll_us,
    )


def host_settings(config: Config) -> HostSettings:
    """The part of the configuration that readers and uploaders take."""
    upload, reader = config.upload, config.reader
    return HostSettings(
        log_dir=config.cache.logs,
        reader_threads=reader.workers,
        cache_scope=config.cache.scope,
        read_ahead_bytes=reader.read_ahead,
        uploaders=upload.volumes,
        put_threads=upload.workers,
        sync_interval=upload.sync_interval,
        max_dirty_age=upload.max_dirty_age,
        pack_bytes=upload.pack_size,
        compression_level=upload.compression_level,
        compaction=upload.compaction,
        compact_rate=upload.compact_rate,
        gc_grace=config.store.gc_grace,
        shadow_dir=Path(config.debug.shadow_dir) if config.debug.shadow_dir else None,
    )


class Daemon:
    """Owns everything. `start()` and `stop()` are called once each, from the main thread."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.started_at = time.time()
        self._stopping = threading.Event()
        self._ready = False
        self._locks: list[process.DirectoryLock] = []
        self._undo = contextlib.ExitStack()
        self._engine: Engine | None = None
        self._store: ResilientStore | None = None
        self._host: Host | None = None
        self._router: ExportRouter | None = None
        self._metrics = Metrics(self._snapshot)

    @property
    def router(self) -> ExportRouter:
        """The exports."""
        if self._router is None:
            raise GlideError("the daemon is starting; try again")
        return self._router

    # -- start ---------------------------------------------------------------------------------

    def start(self) -> None:
        """Bring everything up; what was up is taken down again if a part fails."""
        try:
            self._start()
        except BaseException:
            self._stopping.set()
            self._undo.close()
            raise

    def _start(self) -> None:
        config = self.config
        self._prepare_directories()
        heap.keep_large_buffers_apart()
        files = process.raise_file_limit()
        engine = self._engine = self._undo.enter_context(Engine(engine_config(config)))
        store = self._store = self._open_store()
        host = self._host = Host(
            engine,
            store,
            node=config.daemon.node_name,
            state_dir=config.cache.state,
            settings=host_settings(config),
        )
        nbd = NbdTransport()
        server = NbdServer(config.nbd, nbd)
        nbd.bind(server)
        ublk = UblkTransport(config.ublk, config.cache.state)
        settings = RouterSettings(
            node=config.daemon.node_name,
            exports_dir=Path(config.cache.dir) / "exports",
            state_dir=config.cache.state,
            logs_dir=config.cache.logs,
            prefixes=config.store.prefixes,
        )
        bases = BaseLibrary(store, grace=host.settings.gc_grace, stopping=self._stopping)
        router = self._router = ExportRouter(host, store, (nbd, ublk), settings, bases, self._stopping)
        host.on_event(partial(self._on_event, host, server))
        host.start()
        self._undo.callback(host.close)
        self._probe(has_exports=router.has_records())
        self._undo.callback(router.close)
        router.start()
        if not router.wait_tried(FIRST_EXPORTS):
            log.warning("some exports are still being opened; the others are served")
        server.start()
        self._undo.callback(server.close)
        self._start_api()
        self._ready = True
        log.info(
            "ready: %d exports, store %s, %d open files allowed", len(router.listing()), store.url, files
        )

    def _on_event(self, host: Host, server: NbdServer, event: Event) -> None:
        """On the host's event thread: must not block."""
        if event.kind == EventKind.CONN_CLOSED:
            server.connection_closed(event.a, event.b)
        elif event.kind == EventKind.UBLK_DOWN:
            volume = host.find(event.volume)
            if volume is not None:
                self.router.device_down(volume.name)

    def _prepare_directories(self) -> None:
        cache = self.config.cache
        own = {"dir": Path(cache.dir), "log_dir": cache.logs, "block_cache_dir": cache.blocks}
        for key, path in own.items():
            process.make_directory(key, path)
        if self.config.debug.shadow_dir is not None:
            process.make_directory("shadow_dir", Path(self.config.debug.shadow_dir), "debug")
        for path in (cache.state, Path(cache.dir) / "exports"):
            process.make_directory("dir", path)
        for path in dict.fromkeys(path.resolve() for path in own.values()):
            lock = process.DirectoryLock(path)
            lock.acquire()
            self._undo.callback(lock.release)

    def _open_store(self) -> ResilientStore:
        settings = self.config.store
        inner = open_store(
            settings.url,
            endpoint_url=settings.endpoint_url,
            region=settings.region,
            path_style=settings.path_style,
            connections=settings.reads + settings.writes + 8,
            connect_timeout=settings.connect_timeout,
            read_timeout=settings.read_timeout,
        )
        store = ResilientStore(inner, reads=settings.reads, writes=settings.writes, cancel=self._stopping)
        self._undo.callback(store.close)
        return store

    def _start_api(self) -> None:
        from glidefs.api.app import build_app
        from glidefs.api.server import ApiServer

        server = ApiServer(self.config.api, build_app(self))
        server.start()
        self._undo.callback(server.close)

    # -- the store's features ------------------------------------------------------------------

    def _probe(self, has_exports: bool) -> None:
        """Try the store once per url. An outage must not keep a host from serving what it has."""
        marker = Path(self.config.cache.dir) / "store-probed"
        identity = f"{self.config.store.url} {self.config.store.endpoint_url or ''}\n"
        with contextlib.suppress(OSError):
            if marker.read_text(encoding="utf-8") == identity:
                return
        try:
            self._probe_once(marker, identity)
        except StoreUnsupported:
            raise
        except StoreError as error:
            if not error.temporary and not has_exports:
                raise
            log.warning("the store could not be tried, again later: %s", error)
            thread = threading.Thread(
                target=self._probe_later, args=(marker, identity), name="store-probe", daemon=True
            )
            thread.start()

    def _probe_once(self, marker: Path, identity: str) -> None:
        assert self._store is not None
        probe_store(self._store.view("background", PROBE_DEADLINE), self.config.store.default_prefix)
        marker.write_text(identity, encoding="utf-8")

    def _probe_later(self, marker: Path, identity: str) -> None:
        while not self._stopping.wait(PROBE_RETRY):
            try:
                self._probe_once(marker, identity)
                log.info("the store answers and keeps what GlideFS relies on")
                return
            except StoreUnsupported as error:
                log.critical("%s", error)
                return
            except (StoreError, OSError) as error:
                log.warning("the store could not be tried, again later: %s", error)

    # -- what the API asks ---------------------------------------------------------------------

    def health(self) -> dict[str, Any]:
        """State of the process, for GET /health."""
        router, store = self._router, self._store
        states = Counter(status.state for status in router.listing()) if router else Counter[str]()
        figures = store.metrics() if store else None
        ready = self._ready and not self._stopping.is_set()
        return {
            "status": "ok" if ready else "stopping" if self._stopping.is_set() else "starting",
            "ready": ready,
            "pid": os.getpid(),
            "version": metadata_version(),
            "node": self.config.daemon.node_name,
            "uptime_seconds": round(time.time() - self.started_at, 3),
            "exports": {"total": sum(states.values()), **states, "failed": states.get("failed", 0)},
            "store": {
                "url": self.config.store.url,
                "state": "up" if figures and figures.breaker == "closed" else "down",
                "down_seconds": round(figures.down_seconds, 3) if figures else 0.0,
            },
        }

    def metrics(self) -> bytes:
        """The Prometheus text."""
        return self._metrics.render()

    def _snapshot(self) -> Snapshot:
        router = self._router
        exports: list[ExportFigures] = []
        states: Counter[str] = Counter()
        for entry in router.table.all() if router else ():
            states[entry.state] += 1
            volume, transport = entry.volume, entry.transport
            if volume is None or transport is None:
                continue
            with contextlib.suppress(GlideError):  # closed meanwhile
                info, stats = volume.core.info(), volume.core.stats()
                fenced = entry.is_fenced()
                exports.append(
                    ExportFigures(
                        name=entry.name, transport=transport.kind, info=info, stats=stats, fenced=fenced
                    )
                )
        return Snapshot(
            engine=self._engine.stats() if self._engine else None,
            exports=exports,
            states=states,
            store=self._store.metrics() if self._store else None,
            started_at=self.started_at,
            bases=router.bases.stats() if router else {},
            fault_fetches=self._host.faults.fetches if self._host else 0,
            shadow=self.config.debug.shadow_dir is not None,
        )

    # -- stop ----------------------------------------------------------------------------------

    def stop(self, hurry: threading.Event) -> None:
        """Upload within the deadline (unless `hurry`), let guests go, sync the logs, close everything."""
        deadline = self.config.daemon.drain_deadline
        process.notify("STOPPING=1", f"EXTEND_TIMEOUT_USEC={int((deadline + FORCED_EXIT) * 1e6)}")
        self._ready = False
        router, store = self._router, self._store
        if router is not None:
            router.refuse_changes()
        if router is not None and store is not None and deadline > 0:
            if store.metrics().breaker != "closed":
                log.warning("the store does not answer; what is not uploaded stays safe in the log")
            else:
                self._drain(router, time.monotonic() + deadline, hurry)
        if router is not None:
            router.let_go(remove_devices=self.config.daemon.on_stop == "remove")
        self._stopping.set()
        self._undo.close()
        log.info("stopped")

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


def metadata_version() -> str:
    """The installed version, or that of a source tree."""
    try:
        return metadata.version("glidefs")
    except metadata.PackageNotFoundError:
        return "0+source"


def run_daemon(config_file: str | None) -> int:
    """The whole life of the process; returns its exit code. Raises GlideError if it cannot start."""
    config = load_config(config_path(config_file))
    process.setup_logging(config.daemon.log_level)
    stop, hurry = threading.Event(), threading.Event()

    def on_signal(number: int, frame: object) -> None:
        (hurry if stop.is_set() else stop).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    daemon = Daemon(config)
    daemon.start()
    process.notify("READY=1", f"STATUS=serving {len(daemon.router.listing())} exports")
    while not stop.wait(3600):
        pass
    daemon.stop(hurry)
    return 0
