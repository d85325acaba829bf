"""The threads that answer faults, and those that read ahead.

A thread here never dies of what it serves: whatever happens to a fault, the requests that wait for
its blocks are answered (resident, zero, look again, or an error), and the loop goes on.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

from glidefs.core.check import Closed
from glidefs.core.engine import Engine, Fault
from glidefs.core.volume import holes_error, install_error, install_retry
from glidefs.errors import GlideError, StoreError
from glidefs.formats.pack import BLOCK, CHUNK_BLOCKS
from glidefs.reading.ahead import ReadAhead, Window
from glidefs.reading.reader import Reader, Runs
from glidefs.store.resilient import ResilientStore
from glidefs.volume.settings import HostSettings

if TYPE_CHECKING:
    from glidefs.volume.volume import Volume

log = logging.getLogger(__name__)

PREFETCH_QUEUE = 256
_PIECES = 4
"""Requests that a window of read-ahead is fetched with, side by side: fewer and longer ones cost less."""
_LEAST_PIECE = 4
_STORE_PAUSE = 0.2
_LOUD_EVERY = 10.0


class FaultService:
    """Serves the faults of an engine until :meth:`close`.

    ``find`` gives the volume of a cookie. ``busy`` counts guest faults in service; compaction
    looks at it. Guest reads have their own lane of the store, prefetch runs in the background's.
    """

    def __init__(
        self,
        engine: Engine,
        store: ResilientStore,
        settings: HostSettings,
        find: Callable[[int], Volume | None],
    ) -> None:
        self._engine = engine
        self._settings = settings
        self._find = find
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self._reads = store.view("read", settings.store_patience)
        self._background = store.view("background", settings.store_patience)
        self._helpers = ThreadPoolExecutor(settings.fetch_threads, "glide-fetch")
        self._queue: queue.Queue[Callable[[], None]] = queue.Queue(PREFETCH_QUEUE)
        self.reader = Reader(engine.cache, settings, self._helpers)
        self._lock = threading.Lock()  # guards what is below
        self._ahead: dict[int, ReadAhead] = {}
        self.fetches = 0
        """Guest faults that the store was asked for."""
        self.busy = 0
        self.last_fault = float("-inf")
        self._last_loud = float("-inf")

    def start(self) -> None:
        """Start the threads."""
        for i in range(self._settings.reader_threads):
            self._spawn(f"glide-fault-{i}", self._serve)
        for i in range(self._settings.prefetch_threads):
            self._spawn(f"glide-prefetch-{i}", self._prefetch)

    def _spawn(self, name: str, target: Callable[[], None]) -> None:
        thread = threading.Thread(target=target, name=name, daemon=True)
        thread.start()
        self._threads.append(thread)

    def close(self) -> None:
        """Stop and join the threads; faults that come after are not answered."""
        self._stop.set()
        self._engine.wake()
        with contextlib.suppress(queue.Full):
            for _ in range(self._settings.prefetch_threads):
                self._queue.put_nowait(lambda: None)
        for thread in self._threads:
            thread.join()
        self._helpers.shutdown(cancel_futures=True)

    def quiet_for(self) -> float:
        """Seconds since a guest waited for a fault; 0 while one does."""
        with self._lock:
            return 0.0 if self.busy else time.monotonic() - self.last_fault

    # -- guest faults ----------------------------------------------------------------------------

    def _serve(self) -> None:
        while not self._stop.is_set():
            try:
                fault = self._engine.faults_next(self._settings.fault_blocks, self._settings.poll_ms)
            except Closed:
                return
            except GlideError as error:
                log.error("faults cannot be taken: %s", error)
                self._stop.wait(1.0)
                continue
            if fault is not None:
                with self._lock:
                    self.busy += 1
                try:
                    self.answer(fault)
                except BaseException:
                    log.exception("a fault could not be answered")
                finally:
                    with self._lock:
                        self.busy -= 1
                        self.last_fault = time.monotonic()

    def answer(self, fault: Fault) -> None:
        """Serve one fault. Raises nothing that its waiters should not see as an answer."""
        volume = self._find(fault.volume)
        if volume is None:
            return  # closed meanwhile: the core has answered its requests
        try:
            if fault.chunks:
                chunk = fault.block // CHUNK_BLOCKS
                self.reader.resolve_holes(volume, self._reads, chunk, fault.chunks, fault.stamp)
                return
            self._read_ahead(volume, fault)
            if self.reader.resolve(volume, self._reads, fault.block, fault.count, fault.stamp):
                with self._lock:
                    self.fetches += 1
        except Closed:
            return
        except StoreError as error:
            # Not an answer that guests should see: their requests wait until the store is back.
            self._say(volume, error)
            self._stop.wait(_STORE_PAUSE)
            self._finish(volume, fault, retry=True)
        except BaseException:
            log.exception("volume %s: blocks %d+%d", volume.name, fault.block, fault.count)
            self._finish(volume, fault, retry=False)

    def _say(self, volume: Volume, error: StoreError) -> None:
        now = time.monotonic()
        if not error.temporary and now - self._last_loud >= _LOUD_EVERY:
            self._last_loud = now
            log.warning("volume %s: reads wait, the store refuses them: %s", volume.name, error)

    def _finish(self, volume: Volume, fault: Fault, *, retry: bool) -> None:
        """Answer what a failed resolution left: blocks that are mapped by now are not affected."""
        answer = (
            install_retry(fault.block, fault.count)
            if retry
            else install_error(fault.block, fault.count, errno.EIO)
        )
        with contextlib.suppress(Closed):
            if fault.chunks:
                err = 0 if retry else errno.EIO
                volume.core.install_holes(fault.stamp, [holes_error(fault.block // CHUNK_BLOCKS, err)])
            else:
                volume.core.install(fault.stamp, [answer])

    # -- read-ahead ------------------------------------------------------------------------------

    def _read_ahead(self, volume: Volume, fault: Fault) -> None:
        recorder = volume.on_fault
        if recorder is not None:
            recorder(fault.block, fault.count)
        # What is read ahead is not touched by a fault: a profile would miss it.
        limit = 0 if recorder is not None else self._settings.read_ahead_bytes // BLOCK
        if limit:
            end = -(-volume.size // BLOCK)
            with self._lock:
                ahead = self._ahead.setdefault(volume.cookie, ReadAhead())
                window = ahead.on_fault(fault.block, fault.count, limit, end)
            if window is not None:
                self.prefetch_window(volume, window)

    def forget(self, volume: Volume) -> None:
        """The volume was closed."""
        with self._lock:
            self._ahead.pop(volume.cookie, None)

    def prefetch_window(self, volume: Volume, window: Window) -> None:
        """Fetch a window in the background, in pieces that are fetched in parallel."""
        piece = min(max(window.count // _PIECES, _LEAST_PIECE), self._settings.fetch_bytes // BLOCK)
        for first in range(window.first, window.first + window.count, piece):
            count = min(piece, window.first + window.count - first)
            if not self.submit(partial(self.prefetch, volume, first, count, marker=window.marker)):
                return

    def submit(self, task: Callable[[], None]) -> bool:
        """Run ``task`` on a prefetch thread; False (and not run) while too much is queued."""
        try:
            self._queue.put_nowait(task)
        except queue.Full:
            return False
        return True

    def prefetch(self, volume: Volume, first: int, count: int, *, marker: int = -1) -> None:
        """Make a run of blocks resident, in the lane of background reads. Raises Closed, StoreError."""
        stamp = volume.core.stamp()
        self.reader.resolve(volume, self._background, first, count, stamp, leave=marker)

    def prefetch_runs(self, volume: Volume, runs: Runs, helpers: Executor) -> None:
        """The same for several runs, whose requests ``helpers`` make. Raises Closed, GlideError."""
        stamp = volume.core.stamp()
        self.reader.resolve_runs(volume, self._background, runs, stamp, helpers)

    def _prefetch(self) -> None:
        while not self._stop.is_set():
            try:
                task = self._queue.get(timeout=self._settings.poll_ms / 1000)
            except queue.Empty:
                continue
            try:
                task()
            except (Closed, StoreError):
                pass  # only a guess; a guest that needs the block will say so
            except BaseException:
                log.exception("a prefetch failed")
