"""Compaction: chunks of many packs are merged in the background, one volume at a time.

The result replaces a run of packs in those chunks where the run is still one run when it is
committed; packs appended meanwhile stay newer. Nothing is deleted here: ``gc`` does that.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from glidefs import clock
from glidefs.compaction.merge import Merger
from glidefs.compaction.plan import ChunkRun, runs_of
from glidefs.core.check import Closed
from glidefs.core.priority import lower_priority
from glidefs.errors import CorruptObject, Fenced, GlideError, StoreError
from glidefs.formats.manifest import chunk_count
from glidefs.formats.pack import SECTOR, PackEntry
from glidefs.manifest.cache import MetaCache
from glidefs.manifest.commit import Change, Superseded
from glidefs.manifest.view import Manifest
from glidefs.store.base import Buffer
from glidefs.store.packs import BuiltPack, put_pack
from glidefs.store.resilient import ResilientStore
from glidefs.volume.settings import HostSettings
from glidefs.writing.pace import Pace
from glidefs.writing.upload import Uploader

if TYPE_CHECKING:
    from glidefs.volume.volume import Volume

log = logging.getLogger(__name__)

MAX_LEVEL = 255
_RETRY = 30.0


class CompactState:
    """What is known about a volume that was written to. Guarded by the compactor's condition."""

    __slots__ = ("due", "last_commit", "touched", "unsettled")

    def __init__(self) -> None:
        self.due = 0.0
        self.last_commit = float("-inf")
        self.touched: set[int] = set()
        """Chunks that got packs since the last look."""
        self.unsettled: set[int] = set()
        """Chunks that got packs since the volume was last settled."""


class Compactor:
    """One thread for the host. ``_wake`` guards the table of volumes that may need it."""

    def __init__(
        self,
        store: ResilientStore,
        meta: MetaCache,
        settings: HostSettings,
        uploader: Uploader,
        quiet_for: Callable[[], float],
    ) -> None:
        self._store = store.view("background", settings.store_patience)
        self._puts = store.view("background", settings.store_patience)
        self._meta = meta
        self._settings = settings
        self._uploader = uploader
        self._wake = threading.Condition()
        self._volumes: dict[int, Volume] = {}
        self._stop = threading.Event()
        self._pace = Pace(settings.compact_rate, quiet_for, self._stop)
        self._thread: threading.Thread | None = None
        self._paused = 0
        self._running: Volume | None = None

    def start(self) -> None:
        """Start the thread, if compaction is on."""
        if self._settings.compaction:
            self._thread = threading.Thread(target=self._work, name="glide-compact", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Stop and join the thread; what it had not committed is left to ``gc``."""
        self._stop.set()
        with self._wake:
            self._wake.notify_all()
        if self._thread is not None:
            self._thread.join()

    def note(self, volume: Volume, chunks: frozenset[int]) -> None:
        """A commit added packs to ``chunks`` of the volume."""
        with self._wake:
            state = self._state(volume)
            state.due = state.last_commit = time.monotonic()
            state.touched |= chunks
            state.unsettled |= chunks
            self._volumes[volume.cookie] = volume
            self._wake.notify_all()

    def forget(self, volume: Volume) -> None:
        """The volume closes: wait until nothing is done for it any more."""
        with self._wake:
            self._volumes.pop(volume.cookie, None)
            while self._running is volume and threading.current_thread() is not self._thread:
                self._wake.wait(0.5)

    def pause(self, deadline: float) -> bool:
        """Start nothing until :meth:`resume`. Waits for what is under way; false if it did not end."""
        with self._wake:
            self._paused += 1
            while self._running is not None:
                if time.monotonic() >= deadline:
                    return False
                self._wake.wait(0.2)
            return True

    def resume(self) -> None:
        """Undo a :meth:`pause`."""
        with self._wake:
            self._paused -= 1
            self._wake.notify_all()

    # -- the thread ------------------------------------------------------------------------------

    def _work(self) -> None:
        lower_priority(self._settings.nice + 5)
        while (volume := self._take()) is not None:
            state = self._state(volume)
            with self._wake:
                idle = time.monotonic() - state.last_commit >= self._settings.settle_idle
                chunks = state.unsettled if idle else state.touched
                if idle:
                    state.unsettled = set()
                state.touched = set()
            delay: float | None = None if idle else self._settings.settle_idle
            left = chunks
            try:
                self.compact(volume, settle=idle, chunks=chunks)
                left = set()
            except Fenced as error:
                volume.fence(error.why)
                delay = None
            except Closed:
                delay = None
            except Superseded:
                delay = 0.0
            except GlideError as error:
                log.warning("volume %s: not compacted: %s", volume.name, error)
                delay = _RETRY
            except BaseException:
                log.exception("volume %s: compaction failed", volume.name)
                delay = _RETRY
            self._done(volume, state, delay, left)

    def _take(self) -> Volume | None:
        with self._wake:
            while not self._stop.is_set():
                now = time.monotonic()
                soonest: float | None = None
                for volume in self._volumes.values() if not self._paused else ():
                    due = self._state(volume).due
                    if due <= now:
                        self._running = volume
                        self._state(volume).due = float("inf")
                        return volume
                    soonest = due if soonest is None else min(soonest, due)
                self._wake.wait(None if soonest is None or soonest == float("inf") else soonest - now)
            return None

    def _done(self, volume: Volume, state: CompactState, delay: float | None, left: set[int]) -> None:
        with self._wake:
            self._running = None
            state.touched |= left
            state.unsettled |= left
            if state.due == float("inf"):  # else a commit came meanwhile
                if delay is None:
                    self._volumes.pop(volume.cookie, None)
                else:
                    state.due = time.monotonic() + delay
            self._wake.notify_all()

    @staticmethod
    def _state(volume: Volume) -> CompactState:
        state = volume.compact_state
        if not isinstance(state, CompactState):
            state = volume.compact_state = CompactState()
        return state

    # -- one volume ------------------------------------------------------------------------------

    def compact(self, volume: Volume, *, settle: bool = False, chunks: Iterable[int] | None = None) -> int:
        """Merge what the policy says, committing as it goes; returns the bytes put.

        ``settle``: bring chunks down to few packs, as when the volume is idle. ``chunks`` are those
        to look at, None for all. Raises Fenced, Closed, Superseded (call again), StoreError.
        """
        if not volume.committer.published:
            return 0  # its first root is the uploader's to put
        width = self._settings.settle_width + 1 if settle else self._settings.compact_width
        enough = self._settings.compact_commit_packs * self._settings.pack_bytes
        total = size = 0
        batch: list[ChunkRun] = []
        manifest = volume.manifest(self._store)
        if chunks is None:
            chunks = manifest.present(0, chunk_count(manifest.root.size) - 1)
        for run in self._runs(volume, manifest, width, sorted(chunks)):
            batch.append(run)
            size += run.sectors * SECTOR
            if size >= enough:
                total += self._merge(volume, batch)
                batch, size = [], 0
        if batch:
            total += self._merge(volume, batch)
        return total

    def _runs(
        self, volume: Volume, manifest: Manifest, width: int, chunks: Iterable[int]
    ) -> Iterator[ChunkRun]:
        for chunk in chunks:
            self._check(volume)
            refs = manifest.packs(chunk)
            if len(refs) < width:
                continue
            try:
                run = runs_of(chunk, refs, [manifest.index(ref) for ref in refs], width)
            except CorruptObject as error:
                log.error("volume %s: chunk %d is not compacted: %s", volume.name, chunk, error)
                continue
            if run is not None:
                yield run

    def _check(self, volume: Volume) -> None:
        if volume.fenced:
            raise Fenced(volume.name, volume.fenced)
        if volume.closing or self._stop.is_set():
            raise Closed(f"volume {volume.name} closes")

    def _merge(self, volume: Volume, runs: list[ChunkRun]) -> int:
        started = clock.elapsed()
        level = min(MAX_LEVEL, 1 + max(ref.level for run in runs for ref in run.refs))

        def put(area: bytearray, entries: list[PackEntry]) -> BuiltPack:
            self._check(volume)
            return put_pack(
                lambda key, body: self._put(volume, key, body),
                volume.prefix,
                volume.id,
                area,
                entries,
                level,
            )

        def before_read(nbytes: int) -> None:
            self._check(volume)
            self._pace.spend(nbytes)

        merger = Merger(
            self._store,
            put,
            pack_bytes=self._settings.pack_bytes,
            level=self._settings.compression_level,
            before_read=before_read,
        )
        try:
            merged = merger.merge(runs)
        except CorruptObject as error:
            log.error("volume %s: %d chunks are not compacted: %s", volume.name, len(runs), error)
            return 0
        if clock.elapsed() - started > self._settings.gc_grace / 2:
            raise StoreError("compaction took too long", key=volume.name, op="commit", temporary=True)
        for pack in merged.packs:
            self._meta.add_index(pack.ref, pack.index, pack.tail)
        change = Change(replaces=tuple(merged.replaces))
        self._uploader.retry(volume, lambda: volume.committer.commit(self._puts, change), started)
        counters = self._uploader.counters
        with counters.lock:
            counters.compacted_packs += len(merged.packs)
            counters.compacted_bytes += merged.nbytes
        return merged.nbytes

    def _put(self, volume: Volume, key: str, body: list[Buffer]) -> None:
        self._uploader.retry(volume, lambda: self._puts.put(key, body), clock.elapsed())
