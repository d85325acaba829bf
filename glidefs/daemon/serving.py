"""Builds what serves exports from the configuration: engine, host of volumes, router, NBD server."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

from glidefs.bases.manifest_cache import BaseLibrary
from glidefs.config import Config
from glidefs.core.engine import Engine, EngineConfig, Event, EventKind
from glidefs.daemon.identity import LOG_DIR, CacheIdentity
from glidefs.exports.router import ExportRouter
from glidefs.exports.settings import RouterSettings
from glidefs.exports.table import Entry
from glidefs.handoff.coordinator import HandoffCoordinator
from glidefs.host.host import Host
from glidefs.manifest.lease import Owner
from glidefs.store.resilient import ResilientStore
from glidefs.tracing.spans import Sink
from glidefs.transport.nbd.server import NbdServer
from glidefs.transport.nbd.transport import NbdTransport
from glidefs.transport.nbd_device.device import NbdDeviceTransport
from glidefs.transport.ublk.device import UblkTransport
from glidefs.transport.vhost_user.transport import VhostUserTransport
from glidefs.volume.settings import HostSettings


def milliseconds(seconds: float) -> int:
    """For the core: 0 stays 0 (no limit), anything else is at least 1."""
    return max(1, round(seconds * 1000)) if seconds else 0


def engine_config(config: Config, *, standby: bool = False) -> EngineConfig:
    """The engine's part of the configuration; `standby`: another process has the block cache still."""
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
        nbd_memory=config.nbd.reply_memory,
        nbd_stall_ms=milliseconds(config.nbd.stall_timeout),
        standby=standby,
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
        slow_read=config.telemetry.slow_read,
        shadow_dir=Path(config.debug.shadow_dir) if config.debug.shadow_dir else None,
    )


class Core:
    """What serves the exports: engine, host, router, servers. A daemon may have one after another."""

    def __init__(
        self,
        config: Config,
        store: ResilientStore,
        identity: CacheIdentity,
        *,
        standby: bool,
        sink: Sink | None = None,
    ) -> None:
        self.stopping = threading.Event()
        self._undo = contextlib.ExitStack()
        self.engine = self._undo.enter_context(Engine(engine_config(config, standby=standby)))
        self.host = Host(
            self.engine,
            store,
            state_dir=config.cache.state,
            settings=host_settings(config),
            sink=sink,
        )
        nbd = NbdTransport()
        self.server = NbdServer(config.nbd, nbd)
        nbd.bind(self.server)
        ublk = UblkTransport(config.ublk, config.cache.state)
        self._nbd_device = NbdDeviceTransport(
            config.nbd_device, config.cache.state, self.server.table, self._device_down
        )
        self.vhost = VhostUserTransport(config.vhost_user)
        settings = RouterSettings(
            owner=Owner(identity.host_id, config.daemon.node_name),
            exports_dir=Path(config.cache.dir) / "exports",
            state_dir=config.cache.state,
            logs_dir=config.cache.logs,
            prefixes=config.store.prefixes,
            logs_missing=identity.foreign.get(LOG_DIR, ""),
        )
        bases = BaseLibrary(store, grace=self.host.settings.gc_grace, stopping=self.stopping)
        self.router = ExportRouter(
            self.host, store, (nbd, ublk, self._nbd_device, self.vhost), settings, bases, self.stopping
        )
        self.host.on_event(self._on_event)
        self.host.start()
        self._undo.callback(self.host.close)
        self._undo.callback(self.router.close)
        self._undo.callback(self.server.close)
        self._undo.callback(self._nbd_device.close)
        self._undo.callback(self.vhost.close)

    def _on_event(self, event: Event) -> None:
        """On the host's event thread: must not block."""
        if event.kind == EventKind.CONN_CLOSED:
            self._nbd_device.connection_ended(self.server.connection_closed(event.a, event.b))
        elif event.kind == EventKind.VHOST_DOWN:
            self.vhost.trouble(event.a)
        elif event.kind == EventKind.UBLK_DOWN:
            volume = self.host.find(event.volume)
            if volume is not None:
                self._device_down(volume.name)

    def _device_down(self, name: str) -> bool:
        return self.router.device_down(name)

    def coordinator(self, entries: list[Entry]) -> HandoffCoordinator:
        """For a handoff of these exports."""
        return HandoffCoordinator(self.router, self.host, self.engine, self.server, self.vhost, entries)

    def close(self) -> None:
        """Close everything, in the reverse order. Safe to call twice."""
        self.stopping.set()
        self._undo.close()
