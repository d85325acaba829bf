"""The host: every volume that this process serves, and the threads and caches that they share."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

from glidefs.compaction.compactor import Compactor
from glidefs.core import handoff
from glidefs.core.check import Closed
from glidefs.core.engine import Engine
from glidefs.core.handoff import Position
from glidefs.core.priority import lower_priority
from glidefs.core.volume import Recovery, VolumeConfig
from glidefs.errors import Fenced, GlideError
from glidefs.formats import reserve
from glidefs.formats.export_record import ExportRecord
from glidefs.formats.manifest import Root
from glidefs.host.cache_keeper import CacheKeeper
from glidefs.host.shadow import ShadowVerifier
from glidefs.host.watch import Watch
from glidefs.manifest import local
from glidefs.manifest.cache import IndexFiles, MetaCache
from glidefs.reading.prefetch import Prefetcher
from glidefs.reading.service import FaultService
from glidefs.store.resilient import ResilientStore
from glidefs.tracing.spans import Sink
from glidefs.volume import logs
from glidefs.volume.settings import MIB, HostSettings
from glidefs.volume.volume import Volume
from glidefs.writing.demote import Demoter
from glidefs.writing.retire import Retirer
from glidefs.writing.scheduler import EventHandler, Scheduler
from glidefs.writing.throttle import Throttle
from glidefs.writing.upload import Uploader
from glidefs.writing.write_out import WriteOut

log = logging.getLogger(__name__)


class Host:
    """Serves volumes of ``engine`` from ``store``; ``state_dir`` holds local copies of manifests.

    ``start()`` before the first volume is opened, ``close()`` before the engine is closed. ``sink`` gets
    spans. ``_lock`` guards the table of volumes.
    """

    def __init__(
        self,
        engine: Engine,
        store: ResilientStore,
        *,
        state_dir: Path,
        settings: HostSettings,
        sink: Sink | None = None,
    ) -> None:
        self.engine = engine
        self.store = store
        self.state_dir = state_dir
        self.settings = settings
        self._index_files = IndexFiles(state_dir / "indices", settings.index_disk_bytes)
        self.meta = MetaCache(settings.index_cache_bytes, settings.page_cache_pages, self._index_files)
        self._lock = threading.Lock()
        self._volumes: dict[int, Volume] = {}
        self._cookies = itertools.count(1)
        self._activated: list[tuple[Volume, Recovery, float]] = []
        self._puts = ThreadPoolExecutor(
            settings.put_threads, "glide-put", initializer=partial(lower_priority, settings.nice)
        )
        self.demoter = Demoter(settings, store)
        self._retirer = Retirer(engine, settings, self.demoter)
        self.uploader = Uploader(store, self.meta, settings, self._puts)
        self.scheduler = Scheduler(engine, self.uploader, settings, self.find, self._retirer)
        self._throttle = Throttle(
            engine, self._retirer, self.scheduler.writers, self.scheduler.life, lambda: store.away
        )
        self._write_out = WriteOut(settings.nice, lambda: self._throttle.filling)
        self.scheduler.on_sealed = self._write_out.note
        self.faults = FaultService(engine, store, settings, self._volumes.get, sink)
        self.prefetcher = Prefetcher(self.faults, settings)
        self.compactor = Compactor(store, self.meta, settings, self.uploader, self._quiet_for)
        if settings.compaction:
            self.scheduler.on_commit = self.compactor.note
        self.watch = Watch(
            store.view("background", settings.store_patience),
            interval=settings.sync_interval,
            volumes=self.volumes,
            doubt=self.confirm,
            paused=lambda: self.uploader.life.pausing or self.uploader.life.stopping,
        )
        self._shadow = (
            ShadowVerifier(engine, store, settings, settings.shadow_dir, self.find)
            if settings.shadow_dir is not None
            else None
        )
        self._cache_keeper = CacheKeeper(engine)
        self._reserve: reserve.Reserve | None = None
        self._closed = False

    # -- life ------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the threads."""
        self.state_dir.mkdir(parents=True, exist_ok=True)
        self._reserve = self._cache_keeper.reserve = reserve.register(self.state_dir)
        self._reserve.hints.append(self._index_files.give_way)
        self.settings.log_dir.mkdir(parents=True, exist_ok=True)
        if self.settings.shadow_dir is not None:
            self.settings.shadow_dir.mkdir(parents=True, exist_ok=True)
        self.faults.start()
        self.scheduler.start()
        self._throttle.start()
        self._write_out.start()
        self.compactor.start()
        self._cache_keeper.start()
        self.watch.start()
        if self._shadow is not None:
            self._shadow.start()

    def close(self) -> None:
        """Close all volumes and stop the threads. Nothing is uploaded: see :meth:`Volume.drain`."""
        if self._closed:
            return
        self._closed = True
        self.scheduler.stop()
        self._throttle.close()
        self._write_out.close()
        self.watch.close()
        self.compactor.close()
        for volume in self.volumes():
            volume.close()
        self.scheduler.close()
        self.prefetcher.close()
        self.faults.close()
        self._cache_keeper.close()
        if self._reserve is not None:
            reserve.forget(self._reserve)
        if self._shadow is not None:
            self._shadow.close()
        self._puts.shutdown(cancel_futures=True)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- volumes ---------------------------------------------------------------------------------

    def open(
        self,
        record: ExportRecord,
        root: Root,
        etag: str | None,
        *,
        standby: bool = False,
        copy: local.LocalCopy = local.LocalCopy.UNKNOWN,
    ) -> Volume:
        """Replay the log of a volume and serve it; with ``standby`` only once :meth:`activate` was called.

        ``root`` is the newest known of the record's log id (or of a read-only export's manifest),
        ``etag`` that of the store, None where its first put is still to come, which then happens
        in the background. Raises Fenced where the record says so; CorruptLog, CoreError, OSError, GlideError.
        """
        if record.fenced:
            raise Fenced(record.name, record.fenced)
        if not record.read_only and root.log_id != record.log_id:
            raise GlideError(f"volume {record.name}: its root names another log; attach it first")
        volume = Volume(
            record,
            root,
            etag,
            next(self._cookies),
            meta=self.meta,
            state_dir=self.state_dir,
            log_path=logs.log_path(self.settings.log_dir, record.volume_id, record.log_id),
            upload=partial(self.scheduler.request, seal=True),
            forget=self.forget,
        )
        if not record.read_only and not standby:
            # The core unlinks what the root includes: that root must be durable here first.
            volume.committer.save_local(copy)
        config = VolumeConfig(
            cookie=volume.cookie,
            log_dir=volume.log_path,
            volume_id=record.volume_id,
            log_id=record.log_id,
            size=record.size,
            committed_seq=0 if record.read_only else root.last_segment,
            read_only=record.read_only,
            flush_store=record.flush == "store",
            standby=standby,
        )
        with self._lock:
            if self._closed:
                raise Closed("the host is closed")
            self._volumes[volume.cookie] = volume
        began = time.monotonic()
        try:
            # What is taken over in a handoff is not compared: its log goes on in another process meanwhile.
            verify = self._shadow if not standby else None
            with verify.source(volume, root, config) if verify else nullcontext() as shadow:
                volume.core, recovery = self.engine.open_volume(config, shadow)
        except BaseException:
            with self._lock:
                del self._volumes[volume.cookie]
            raise
        if not standby:
            self._opened(volume, recovery, time.monotonic() - began)
        return volume

    def activate(self, volume: Volume, position: Position) -> None:
        """The process that served the volume has stopped where ``position`` says. It stays frozen.

        Guests wait: :meth:`settle` does the rest. Raises CoreError (ESTALE) if its log ends elsewhere,
        CorruptLog.
        """
        began = time.monotonic()
        recovery = handoff.activate(volume.core, position)
        self._activated.append((volume, recovery, time.monotonic() - began))

    def settle(self) -> None:
        """Guests go on: look after the volumes that were activated, from :meth:`resume` on."""
        activated, self._activated = self._activated, []
        for volume, recovery, seconds in activated:
            self._opened(volume, recovery, seconds)
            self.confirm(volume)

    def confirm(self, volume: Volume) -> None:
        """Compare the root, a local copy, with the store's in the background.

        A volume with nothing to upload would keep an old one, and gc deletes what only that one names.
        """
        if volume.committer.published or not volume.read_only:
            volume.committer.doubt()
            self.scheduler.request(volume)

    def save_roots(self) -> None:
        """Make the local copies of all roots durable: until then nothing that was taken over is retired."""
        for volume in self.volumes():
            if not volume.read_only:
                volume.committer.save_local()

    def _opened(self, volume: Volume, recovery: Recovery, seconds: float) -> None:
        volume.committer.known_segment = max(recovery.last_seq, volume.root.last_segment)
        if recovery.repaired:
            log.warning(
                "volume %s: %d segments had a bad header, repaired from its copy; check the disk (%s)",
                volume.name,
                recovery.repaired,
                volume.log_dir,
            )
        if recovery.segments:
            log.info(
                "volume %s: replayed %d records (%.1f MiB) of %d segments in %.3f s, %.1f MiB verified%s, "
                "%d torn records dropped",
                volume.name,
                recovery.records,
                recovery.bytes / MIB,
                recovery.segments,
                seconds,
                recovery.verified / MIB,
                f" ({recovery.verified / MIB / max(seconds, 1e-6):.0f} MiB/s)" if recovery.verified else "",
                recovery.dropped,
            )
            self._retirer.watch(volume)
        if not volume.read_only and (
            recovery.segments or volume.etag is None or volume.size != volume.root.size
        ):
            volume.size_changed()
            self.scheduler.request(volume)

    def _quiet_for(self) -> float:
        """Seconds since a guest waited for something; 0 while one does."""
        return 0.0 if self._throttle.active else self.faults.quiet_for()

    def find(self, cookie: int) -> Volume | None:
        """The open volume of a cookie."""
        return self._volumes.get(cookie)

    def volumes(self) -> list[Volume]:
        """All open volumes."""
        with self._lock:
            return list(self._volumes.values())

    def forget(self, volume: Volume) -> None:
        """Part of :meth:`Volume.close`: no thread of the host touches the volume after it."""
        with self._lock:
            self._volumes.pop(volume.cookie, None)
        self.scheduler.forget(volume)
        self.compactor.forget(volume)
        self.faults.forget(volume)
        self._retirer.forget(volume)
        if self._shadow is not None:
            self._shadow.forget(volume)

    def forget_state(self, volume_id: bytes) -> None:
        """Delete the local copies of the manifest of a volume that was detached or removed."""
        local.forget(self.state_dir, volume_id)

    # -- for handoff and tests -----------------------------------------------------------

    def on_event(self, handler: EventHandler) -> None:
        """Call ``handler`` for each CONN_CLOSED, UBLK_DOWN and VHOST_DOWN event, on the event thread."""
        self.scheduler.on_event.append(handler)

    def pause(self, timeout: float) -> None:
        """Let uploads and compaction end and start no more: no commit and no retire until ``resume``.

        Raises GlideError, and goes on as before, if they do not end within ``timeout`` seconds.
        """
        deadline = time.monotonic() + timeout
        quiet = [
            self.scheduler.pause(deadline),
            self.compactor.pause(deadline),
            self._retirer.pause(deadline),
        ]
        if not all(quiet):
            self.resume()
            raise GlideError(f"uploads did not come to rest within {timeout:g} s")

    def resume(self) -> None:
        """Undo a :meth:`pause`."""
        self.scheduler.resume()
        self.compactor.resume()
        self._retirer.resume()

    def retire_committed(self) -> None:
        """Give back all log space whose data the store has, of every volume."""
        for volume in self.volumes():
            try:
                volume.retire_committed()
            except Closed:
                continue
