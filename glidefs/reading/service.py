"""The threads that answer faults, and those that read ahead.

One thread takes faults, many at a time, plans them and hands to the core what it can carry
(:mod:`glidefs.reading.carry`); the others answer what may have to wait for something. Which volume is next,
:mod:`glidefs.reading.shares` says.

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
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from glidefs.core.carry import NO_BLOCK, AbsentBlock, Carried, News
from glidefs.core.check import Closed
from glidefs.core.engine import Engine, Fault
from glidefs.core.volume import holes_error, install_error, install_retry
from glidefs.errors import GlideError, StoreError
from glidefs.formats.pack import BLOCK, CHUNK_BLOCKS
from glidefs.reading.ahead import Pace, ReadAhead, Window, runs_of
from glidefs.reading.carry import Carrier, Request
from glidefs.reading.changed import Changes
from glidefs.reading.reader import Reader, Runs
from glidefs.reading.shares import Shares
from glidefs.reading.slow import Of, SlowReads, Turn, again, noting
from glidefs.store.resilient import ResilientStore, StoreView
from glidefs.tracing.spans import Sink, Stages
from glidefs.volume.settings import HostSettings

if TYPE_CHECKING:
    from glidefs.volume.volume import Volume

log = logging.getLogger(__name__)

PREFETCH_QUEUE = 256
_ANY_ORDER = (1 << 64) - 1
"""Of faults that are planned once more: nothing that is on its way is known to answer them."""
_MANY = 8
_LINGER = 48
_LINGER_US = (250, 2000)
"""Where at least _MANY blocks are on their way, what comes within this part of the time that they take is
handled together: at least and at most so many microseconds."""
_STORE_PAUSE = 0.2
_LOUD_EVERY = 10.0


class FaultService:
    """Serves the faults of an engine until :meth:`close`.

    ``find`` gives the volume of a cookie. ``busy`` counts guest faults in service; compaction
    looks at it. Guest reads have their own lane of the store, prefetch runs in the background's.
    ``sink`` gets spans of slow reads.
    """

    def __init__(
        self,
        engine: Engine,
        store: ResilientStore,
        settings: HostSettings,
        find: Callable[[int], Volume | None],
        sink: Sink | None = None,
    ) -> None:
        self._engine = engine
        self._settings = settings
        self._find = find
        self._stop = threading.Event()
        self._news = News(engine)
        self._threads: list[threading.Thread] = []
        self._reads = store.view("read", settings.store_patience)
        self._background = store.view("background", settings.store_patience)
        self._helpers = ThreadPoolExecutor(settings.fetch_threads, "glide-fetch")
        self._queue: queue.Queue[Callable[[], None]] = queue.Queue(PREFETCH_QUEUE)
        self.reader = Reader(engine.cache, settings, self._helpers)
        self.reader.flights.tell = self._again
        self.changes = Changes(self._helpers)
        self.carrier = Carrier(engine, settings, self.reader.flights, self.reader.chunk_holes)
        self._spans = None if sink is None else SlowReads(sink, settings.slow_read, find)
        if self._spans is not None:
            self.carrier.waited = self._spans.waited
        # Of the thread that takes them only.
        self._faults: Shares[tuple[AbsentBlock, bool]] = Shares(settings.carried_blocks)
        self._redo: deque[_Redo] = deque()
        self._took_us = 0.0  # of the same thread: what a task takes, and how long to wait for more of them
        self._linger_us = _LINGER_US[0]
        self._slow_changed = threading.Condition()  # guards the next; idle threads wait on it
        self._slow: Shares[_Slow] = Shares(settings.reader_threads)
        self._lock = threading.Lock()  # guards what is below
        self._ahead: dict[int, ReadAhead] = {}
        self._pace = Pace()
        self._ahead_bytes = 0
        self.fetches = 0
        """Guest faults that the store was asked for."""
        self.busy = 0
        self.last_fault = float("-inf")
        self._last_loud = float("-inf")

    def start(self) -> None:
        """Start the threads."""
        self._spawn("glide-faults", self._take_faults)
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
        with self._slow_changed:
            self._slow_changed.notify_all()
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

    # -- guest faults: the thread that takes them --------------------------------------------------

    def _take_faults(self) -> None:
        try:
            self._dispatch()
        finally:
            self.carrier.close()  # nobody hears any more of what is on its way: who waits fetches it

    def _dispatch(self) -> None:
        while not self._stop.is_set():
            try:
                many = self._faults.total >= _MANY or self._ahead_bytes
                linger = self._linger_us if many else 0
                faults, questions, carried = self._news.next(self._settings.poll_ms, linger)
            except Closed:
                return
            except GlideError as error:
                log.error("faults cannot be taken: %s", error)
                self._stop.wait(1.0)
                continue
            for fault in questions:
                noted = self._spans is not None and not fault.ticket
                self._queue_slow(_Slow(fault, True, Stages("queue") if noted else None))
            windows = self._take(faults)
            self._begin_all()  # before what needs no haste: requests on their way cost no time of ours
            if carried:
                self._guarded(partial(self._landed, carried))
            while self._redo:
                again = self._redo.popleft()
                for waiter in again.waiters:
                    self._faults.put(waiter.volume, (waiter, again.prepared))
            self._begin_all()
            for volume, window in windows:
                self._guarded(partial(self.prefetch_window, volume, window))

    def _begin_all(self) -> None:
        while self._faults and (turn := self._faults.take()) is not None:
            self._guarded(partial(self._begin, *turn))

    def _guarded(self, task: Callable[[], None]) -> None:
        try:
            task()
        except Closed:
            pass
        except BaseException:
            log.exception("a fault could not be answered")

    def _again(self, waiters: Iterable[AbsentBlock]) -> None:
        """Blocks that were waited for are in the cache now, or to be fetched once more."""
        self._redo.append(_Redo(list(waiters) if self._spans is None else again(waiters), False))
        self._news.poke()

    def _take(self, faults: Iterable[AbsentBlock]) -> list[tuple[Volume, Window]]:
        """New faults: let them wait for their turn. What is to be read ahead because of them."""
        windows: list[tuple[Volume, Window]] = []
        by_volume: dict[int, list[int]] = {}
        if self._spans is not None:
            stages = Stages("queue")
            faults = [noting(fault, stages) for fault in faults]
        for fault in faults:
            self._faults.put(fault.volume, (fault, False))
            by_volume.setdefault(fault.volume, []).append(fault.block)
        for cookie, blocks in by_volume.items():
            volume = self._find(cookie)
            if volume is None:
                continue
            try:
                for first, count in runs_of(blocks, self._settings.fault_blocks):
                    windows += [(volume, window) for window in self._read_ahead(volume, first, count)]
            except BaseException:
                log.exception("volume %s: nothing is read ahead", volume.name)
        return windows

    def _begin(self, cookie: int, faults: list[tuple[AbsentBlock, bool]]) -> None:
        """The turn of some blocks: the core carries them, or a thread that may wait answers them."""
        volume = self._find(cookie)
        if volume is None:
            return  # closed meanwhile: the core has answered its requests
        blocks = sorted({fault.block for fault, _ in faults})
        stamp = min(fault.stamp for fault, _ in faults)
        prepared = any(prepared for _, prepared in faults)
        turn = None
        try:
            waiting = {fault.block: fault for fault in sorted(fault for fault, _ in faults)}
            if self._spans is not None:
                turn = Turn(waiting)
            request = Request(volume, self._reads, stamp, NO_BLOCK, True, turn)
            blocks, asked = self.carrier.carry(request, blocks, waiting)
            self._faults.enter(cookie, asked)
            with self._lock:
                self.fetches += asked
                self.busy += asked
        except Closed:
            return
        except BaseException:
            log.exception("volume %s: %d blocks cannot be planned", volume.name, len(blocks))
        self._serve_later(volume, blocks, stamp, prepared, turn.of if turn else None)
        if self._spans is not None and turn is not None:
            self._spans.at_once(volume.name, turn, blocks)

    def _landed(self, carried: list[Carried]) -> None:
        """Tasks of the core ended."""
        served = 0
        landed = self.carrier.landed(carried)
        for task, one in landed:
            volume, count = task.request.volume, len(task.blocks)
            if not task.request.guest:
                with self._lock:
                    self._ahead_bytes -= count * BLOCK
                    if not one.err:
                        self._pace.landed(count * BLOCK, one.ns / 1e9)
                continue
            served += count
            self._took_us += (one.ns / 1000 - self._took_us) / 16
            self._faults.leave(volume.cookie, count)
            if one.err:
                name = errno.errorcode.get(-one.err, one.err)
                log.debug("volume %s: %d blocks did not come: %s", volume.name, count, name)
                turn = task.request.turn
                stages = partial(turn.landed, one) if turn else None
                self._serve_later(volume, list(task.blocks), task.request.stamp, True, stages)
        if served:
            self._linger_us = int(min(max(self._took_us / _LINGER, _LINGER_US[0]), _LINGER_US[1]))
            with self._lock:
                self.busy -= served
                self.last_fault = time.monotonic()
        if self._spans is not None:
            self._spans.carried(landed)

    # -- guest faults: the threads that may wait -----------------------------------------------------

    def _serve_later(
        self, volume: Volume, blocks: list[int], stamp: int, prepared: bool, of: Of | None
    ) -> None:
        for first, count in runs_of(blocks, self._settings.fault_blocks):
            stages = of(range(first, first + count)) if of is not None else None
            if stages is not None:
                stages.enter("queue")
            self._queue_slow(_Slow(Fault(volume.cookie, first, stamp, count), prepared, stages))

    def _queue_slow(self, slow: _Slow) -> None:
        with self._slow_changed:
            self._slow.put(slow.fault.volume, slow)
            self._slow_changed.notify()

    def _serve(self) -> None:
        while True:
            with self._slow_changed:
                while (turn := self._slow.take(1)) is None:
                    if self._stop.is_set():
                        return
                    self._slow_changed.wait(self._settings.poll_ms / 1000)
                cookie, (slow,) = turn
                self._slow.enter(cookie)
            with self._lock:
                self.busy += 1
            try:
                if not self._stop.is_set():
                    self._serve_slow(slow)
            except BaseException:
                log.exception("a fault could not be answered")
            finally:
                with self._slow_changed:
                    self._slow.leave(cookie)
                    self._slow_changed.notify()
                with self._lock:
                    self.busy -= 1
                    self.last_fault = time.monotonic()

    def _serve_slow(self, slow: _Slow) -> None:
        """Find out what the core needs to carry the blocks; where that is not all, fetch them here."""
        fault = slow.fault
        volume = self._find(fault.volume)
        if volume is None:
            return
        blocks = range(fault.block, fault.block + fault.count)
        stages = slow.stages
        if stages is not None:
            stages.enter("plan")
        if not slow.prepared and self._is_prepared(volume, self._reads, blocks):
            if stages is not None:
                stages.enter("queue")
            waiters = [AbsentBlock(fault.volume, block, fault.stamp, _ANY_ORDER, stages) for block in blocks]
            self._redo.append(_Redo(waiters, True))
            self._news.poke()
            return
        self._resolve(volume, fault, stages)
        if stages is not None and self._spans is not None:
            self._spans.served(volume.name, fault, stages)

    def _is_prepared(self, volume: Volume, store: StoreView, blocks: range) -> bool:
        """Load and find out what the core needs. False: it cannot carry these."""
        try:
            self.reader.prepare(volume, store, blocks.start, len(blocks))
            return self.carrier.prepare(volume, store, blocks)
        except GlideError as error:
            log.debug("volume %s: block %d: %s", volume.name, blocks.start, error)
        except Exception:  # to fetch them here answers them in any case
            log.exception("volume %s: block %d cannot be prepared", volume.name, blocks.start)
        return False

    def answer(self, fault: Fault) -> None:
        """Serve one fault on this thread. Raises nothing that its waiters should not see as an answer."""
        volume = self._find(fault.volume)
        if volume is None:
            return
        if not fault.chunks and not fault.ticket:
            for window in self._read_ahead(volume, fault.block, fault.count):
                self.prefetch_window(volume, window)
        self._resolve(volume, fault)

    def _resolve(self, volume: Volume, fault: Fault, stages: Stages | None = None) -> None:
        try:
            if fault.ticket:
                self.changes.answer(volume, self._reads, fault)
                return
            if fault.chunks:
                chunk = fault.block // CHUNK_BLOCKS
                self.reader.resolve_holes(volume, self._reads, chunk, fault.chunks, fault.stamp)
                return
            if self.reader.resolve(volume, self._reads, fault.block, fault.count, fault.stamp, stages=stages):
                with self._lock:
                    self.fetches += 1
        except Closed:
            return
        except StoreError as error:
            # Not an answer that guests should see: their requests wait until the store is back.
            if stages is not None:
                stages.give_up(error)
                stages.enter("pause")
            self._say(volume, error)
            self._stop.wait(_STORE_PAUSE)
            self._finish(volume, fault, retry=True)
        except BaseException as error:
            if stages is not None:
                stages.give_up(error)
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
        err = 0 if retry else errno.EIO
        with contextlib.suppress(Closed):
            if fault.ticket:
                volume.core.install_changed(fault.ticket, None, err)
            elif fault.chunks:
                volume.core.install_holes(fault.stamp, [holes_error(fault.block // CHUNK_BLOCKS, err)])
            else:
                volume.core.install(fault.stamp, [answer])

    # -- read-ahead ------------------------------------------------------------------------------

    def _read_ahead(self, volume: Volume, first: int, count: int) -> list[Window]:
        """The pieces to read ahead after a fault."""
        recorder = volume.on_fault
        if recorder is not None:
            recorder(first, count)
        # What is read ahead is not touched by a fault: a profile would miss it.
        limit = 0 if recorder is not None else self._settings.read_ahead_bytes // BLOCK
        if not limit:
            return []
        limit = max(1, min(limit, self._engine.config.cache_bytes // BLOCK // 4))
        end = -(-volume.size // BLOCK)
        piece = self._settings.fetch_bytes // BLOCK
        with self._lock:
            ahead = self._ahead.get(volume.cookie)
            if ahead is None:
                ahead = self._ahead[volume.cookie] = ReadAhead()
            goal = self._pace.goal() // BLOCK
            room = (self._settings.ahead_bytes - self._ahead_bytes) // BLOCK
            return ahead.on_fault(first, count, min(limit, room), end, piece=piece, goal=goal)

    def forget(self, volume: Volume) -> None:
        """The volume was closed."""
        with self._lock:
            self._ahead.pop(volume.cookie, None)

    def prefetch_window(self, volume: Volume, window: Window) -> None:
        """Fetch a piece in the background: the core carries it, or a thread for prefetch fetches it."""
        blocks = range(window.first, window.first + window.count)
        rest = self._carry_ahead(volume, blocks, window.marker)
        for first, count in runs_of(rest, self._settings.fetch_bytes // BLOCK):
            if not self.submit(partial(self._prefetch_slow, volume, first, count, window.marker)):
                return

    def _carry_ahead(self, volume: Volume, blocks: Sequence[int], marker: int) -> list[int]:
        """Let the core carry what it can of blocks for which nobody waits. The others."""
        request = Request(volume, self._background, volume.core.stamp(), marker, False)
        rest, asked = self.carrier.carry(request, blocks)
        with self._lock:
            self._ahead_bytes += asked * BLOCK
        return rest

    def _prefetch_slow(self, volume: Volume, first: int, count: int, marker: int) -> None:
        """A piece that the core could not carry at once. Raises Closed, StoreError."""
        rest: list[int] = list(range(first, first + count))
        if self._is_prepared(volume, self._background, range(first, first + count)):
            rest = self._carry_ahead(volume, rest, marker)
        for start, length in runs_of(rest, count):
            self.prefetch(volume, start, length, marker=marker)

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


class _Slow(NamedTuple):
    """A run of blocks, or a question about zeros or changes, for a thread that may wait.

    ``prepared``: the core cannot carry it all the same.
    """

    fault: Fault
    prepared: bool
    stages: Stages | None


class _Redo(NamedTuple):
    """Blocks to plan once more."""

    waiters: list[AbsentBlock]
    prepared: bool
