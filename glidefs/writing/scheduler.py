"""Schedules uploads: one heap of due times for the host, and a few threads that serve it.

A volume is due by age, by the amount of sealed log, by a drain or a store flush, and at once when its
writers wait for log space or map memory. A volume that is clean is in no table here, so a thousand
idle exports cost nothing.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from glidefs.core import heap
from glidefs.core.check import Closed
from glidefs.core.engine import Engine, Event, EventKind
from glidefs.core.priority import lower_priority
from glidefs.errors import Fenced, GlideError, StoreError, StoreWentBack
from glidefs.volume.log_damage import segment_path
from glidefs.volume.settings import HostSettings
from glidefs.writing.disk_use import disk_use
from glidefs.writing.pace import Burst
from glidefs.writing.retire import Retirer
from glidefs.writing.upload import Paused, Uploader

if TYPE_CHECKING:
    from glidefs.volume.volume import Volume

log = logging.getLogger(__name__)

EventHandler = Callable[[Event], None]
MAX_BACKOFF = 30.0
_SOON = 0.05
_LOUD_EVERY = 10.0
_FULL_EVERY = 60.0
_COMMIT_PART = 16
"""Of the log limit, for one commit."""
_FEW_SEGMENTS = 4
"""Of one commit that should end soon."""


class _Job:
    """A volume that has something to do. Guarded by the scheduler's condition."""

    __slots__ = ("again", "busy", "due", "failures", "seal", "thread", "urgent", "volume")

    def __init__(self, volume: Volume) -> None:
        self.volume = volume
        self.due = float("inf")
        self.seal = False
        self.urgent = False
        self.busy = False
        self.thread = 0
        self.again = False
        self.failures = 0


class Scheduler:
    """``_wake`` guards the jobs and the heap."""

    def __init__(
        self,
        engine: Engine,
        uploader: Uploader,
        settings: HostSettings,
        find: Callable[[int], Volume | None],
        retirer: Retirer,
    ) -> None:
        self._engine = engine
        self._uploader = uploader
        self._settings = settings
        self._find = find
        self._retirer = retirer
        self._wake = threading.Condition()
        self._jobs: dict[int, _Job] = {}
        self._heap: list[tuple[float, int, _Job]] = []
        self._order = itertools.count()
        self._threads: list[threading.Thread] = []
        self.life = uploader.life
        self._last_loud = float("-inf")
        self._last_lost = float("-inf")
        self._last_full = float("-inf")
        self.on_event: list[EventHandler] = []
        self.on_commit: Callable[[Volume, frozenset[int]], None] = lambda volume, chunks: None
        self.on_sealed: Callable[[Volume, int], None] = lambda volume, segment: None

    @property
    def _patience(self) -> float:
        """Seconds after which a write is uploaded, whatever else goes on."""
        return min(self._settings.sync_interval, self._settings.max_dirty_age)

    def start(self) -> None:
        """Start the threads."""
        names = [("glide-events", self._events)]
        names += [(f"glide-upload-{i}", self._work) for i in range(self._settings.uploaders)]
        for name, target in names:
            thread = threading.Thread(target=target, name=name, daemon=True)
            thread.start()
            self._threads.append(thread)

    def stop(self) -> None:
        """Start no more jobs, end those that wait for the store."""
        with self._wake:
            self.life.stopping = True
            self._wake.notify_all()

    def close(self) -> None:
        """Stop and join the threads. What is not uploaded stays in the logs."""
        self.stop()
        self._engine.wake()
        for thread in self._threads:
            thread.join()

    # -- requests --------------------------------------------------------------------------------

    def request(
        self, volume: Volume, *, delay: float = 0.0, seal: bool = False, urgent: bool = False
    ) -> None:
        """Look at a volume in ``delay`` seconds at the latest.

        ``seal`` closes its active segment first; ``urgent`` also gives committed log space back.
        """
        with self._wake:
            job = self._jobs.get(volume.cookie)
            if job is None:
                job = self._jobs[volume.cookie] = _Job(volume)
            job.seal |= seal
            job.urgent |= urgent
            job.again = job.again or (job.busy and delay == 0.0)
            if seal or urgent:
                job.failures = 0
            self._push(job, time.monotonic() + delay)

    def _push(self, job: _Job, due: float) -> None:
        if due < job.due:
            job.due = due
            heapq.heappush(self._heap, (due, next(self._order), job))
            if not self.life.pauses:  # else `resume` wakes them
                self._wake.notify_all()

    def writers(self) -> list[Volume]:
        """Volumes that may have something to upload."""
        with self._wake:
            return [job.volume for job in self._jobs.values()]

    def forget(self, volume: Volume) -> None:
        """The volume closes: wait for its job, if one runs, and start no more."""
        with self._wake:
            job = self._jobs.pop(volume.cookie, None)
            # A callback of the job itself may close its volume.
            while job is not None and job.busy and job.thread != threading.get_ident():
                self._wake.wait(0.5)

    def pause(self, deadline: float) -> bool:
        """Start no jobs until :meth:`resume`. Waits for those under way; false if they did not end.

        ``deadline`` is a time of ``time.monotonic()``.
        """
        with self._wake:
            self.life.pauses += 1
            self.life.give_up_at = time.monotonic() + (deadline - time.monotonic()) / 2
            while any(job.busy for job in self._jobs.values()):
                if time.monotonic() >= deadline:
                    return False
                self._wake.wait(0.2)
            return True

    def resume(self) -> None:
        """Undo a :meth:`pause`."""
        with self._wake:
            self.life.pauses -= 1
            self._wake.notify_all()

    # -- workers ---------------------------------------------------------------------------------

    def _work(self) -> None:
        lower_priority(self._settings.nice)
        while (taken := self._take()) is not None:
            job, seal, urgent = taken
            delay: float | None = self._settings.backoff
            try:
                delay = self._run(job, seal, urgent)
            except BaseException:
                log.exception("volume %s: the upload failed", job.volume.name)
            finally:
                self._done(job, delay)
            if delay is None:
                self._uploader.bodies.drop()  # all of it is uploaded
                heap.trim()

    def _take(self) -> tuple[_Job, bool, bool] | None:
        with self._wake:
            while not self.life.stopping:
                timeout = None
                if self._heap and not self.life.pauses:
                    due, _, job = self._heap[0]
                    timeout = due - time.monotonic()
                    if due != job.due or job.busy or self._jobs.get(job.volume.cookie) is not job:
                        heapq.heappop(self._heap)  # replaced by an earlier one, or closed
                        continue
                    if timeout <= 0:
                        heapq.heappop(self._heap)
                        seal, urgent = job.seal, job.urgent
                        job.due, job.busy, job.again = float("inf"), True, False
                        job.thread = threading.get_ident()
                        job.seal = job.urgent = False
                        return job, seal, urgent
                self._wake.wait(timeout)
            return None

    def _done(self, job: _Job, delay: float | None) -> None:
        with self._wake:
            job.busy = False
            current = self._jobs.get(job.volume.cookie) is job
            now = time.monotonic()
            if current and job.again:
                job.due = float("inf")
                self._push(job, now)
            elif current and delay is not None:
                # A request that came while the job ran was not taken off the heap as its entry was skipped.
                due, job.due = min(now + delay, job.due), float("inf")
                self._push(job, due)
            elif current and job.due != float("inf"):
                due, job.due = job.due, float("inf")
                self._push(job, due)
            elif current:
                del self._jobs[job.volume.cookie]
            self._wake.notify_all()

    def _run(self, job: _Job, seal: bool, urgent: bool) -> float | None:
        """Do what is due for a volume; seconds until it must be looked at again, None for never."""
        volume = job.volume
        if volume.fenced or volume.closing:
            return None
        try:
            if volume.read_only:
                self._uploader.poll(volume)
                return None
            volume.committer.save_again()
            if urgent:
                self._retirer.squeeze(volume)
            if volume.went_back is not None:
                self._uploader.poll(volume)
            self._upload(volume, seal, urgent)
            job.failures = 0
            volume.last_error, volume.went_back = "", None
            self._retirer.run(volume)
            return self._next_look(volume)
        except Fenced as error:
            volume.fence(error.why)
            return None
        except Closed:
            return None
        except GlideError as error:
            job.seal |= seal  # what was asked for is still due
            job.urgent |= urgent
            if isinstance(error, Paused):
                return 0.0
            job.failures += 1
            volume.last_error = str(error)
            if isinstance(error, StoreWentBack):
                volume.went_back = error
            self._say(volume, error)
            if isinstance(error, StoreError) and error.temporary:
                return self._settings.backoff
            return min(self._settings.backoff * 2.0**job.failures, MAX_BACKOFF)

    def _upload(self, volume: Volume, seal: bool, urgent: bool) -> None:
        size = volume.size
        # A caller that asks for a seal waits for the upload; an upload by age must be done.
        burst = None if seal or urgent else Burst(volume, self._patience, lambda: self.life.hurried)
        if not seal:
            info = volume.core.info()
            seal = info.dirty_age >= self._patience
            backlog = info.dirty_bytes - info.active_bytes
            if not (
                seal or backlog >= self.batch_bytes() or volume.root_lags or not volume.committer.published
            ):
                asks = info.dirty_bytes or not volume.committer.confirmed
                if asks and self._unseen_for(volume) >= self._settings.poll_interval:
                    self._uploader.poll(volume)
                return
        sealed = volume.core.seal() if seal else volume.core.info().sealed_seq
        # The larger of both: a root may be larger than what its segments say, never smaller.
        size = max(size, volume.size)
        while True:
            few = urgent or (burst is not None and burst.lasts())
            most = _FEW_SEGMENTS if few else self._most_segments()
            last = min(sealed, volume.done_segment + most)
            # A smaller size goes with the zeroes that a shrink logged first, never before them.
            whole = seal and last >= sealed
            committed = size if whole else max(size, volume.root.size)
            done = self._uploader.upload(volume, max(last, volume.done_segment), committed, burst)
            if urgent:
                self._retirer.squeeze(volume)
            if done.packs:
                self.on_commit(volume, done.chunks)
            if volume.done_segment >= sealed:
                return
            if self.life.pauses:
                raise Paused(f"volume {volume.name}: uploads pause")

    def _most_segments(self) -> int:
        """Of one commit: a small part of what the logs may take, as their space comes back by commits."""
        config = self._engine.config
        part = config.log_limit // _COMMIT_PART // config.segment_bytes
        return max(1, min(self._settings.batch_segments, part))

    def batch_bytes(self) -> int:
        """Sealed log that makes a volume due: enough for full packs, a part of what the log may take."""
        config = self._engine.config
        return max(config.segment_bytes, min(self._settings.batch_bytes, config.log_limit // 8))

    @staticmethod
    def _unseen_for(volume: Volume) -> float:
        return time.monotonic() - volume.committer.last_contact

    def _next_look(self, volume: Volume) -> float | None:
        info = volume.core.info()
        if volume.committer.copy_lags:
            return self._settings.backoff
        if not info.dirty_bytes:
            return None if volume.committer.confirmed else _SOON
        until_due = self._patience - info.dirty_age
        until_poll = self._settings.poll_interval - self._unseen_for(volume)
        return max(_SOON, min(until_due, until_poll))

    def _say(self, volume: Volume, error: GlideError) -> None:
        now = time.monotonic()
        if now - self._last_loud >= _LOUD_EVERY:
            self._last_loud = now
            log.warning("volume %s: not uploaded yet: %s", volume.name, error)

    # -- events ----------------------------------------------------------------------------------

    def _events(self) -> None:
        while not self.life.stopping:
            try:
                events = self._engine.events_next(self._settings.poll_ms)
            except Closed:
                return
            except GlideError as error:
                log.error("events cannot be taken: %s", error)
                time.sleep(1.0)
                continue
            for event in events:
                try:
                    self._handle(event)
                except Closed:
                    pass
                except BaseException:
                    log.exception("event %s of volume %d", event.kind, event.volume)

    def _handle(self, event: Event) -> None:
        if event.kind in (EventKind.CONN_CLOSED, EventKind.UBLK_DOWN, EventKind.VHOST_DOWN):
            for handler in self.on_event:
                handler(event)
            return
        volume = self._find(event.volume)
        if volume is None or volume.read_only:
            return
        if event.kind == EventKind.FIRST_DIRTY:
            self._retirer.watch(volume)
            settings = self._settings
            delay = min(settings.sync_interval, settings.max_dirty_age, settings.poll_interval)
            self.request(volume, delay=delay)
        elif event.kind == EventKind.SEALED:
            self.on_sealed(volume, event.a)
            info = volume.core.info()
            if info.dirty_bytes - info.active_bytes >= self.batch_bytes():
                self.request(volume)
        elif event.kind in (EventKind.LOG_FULL, EventKind.MAP_FULL):
            if event.kind == EventKind.LOG_FULL and event.a:
                self._say_full(volume)
            self._full(volume)
        elif event.kind == EventKind.STORE_FLUSH:
            self.request(volume, seal=True)
        elif event.kind == EventKind.SYNC_FAILED:
            log.error("volume %s: fdatasync of segment %d failed (errno %d)", volume.name, event.a, event.b)
            self.request(volume, seal=True)
        elif event.kind == EventKind.DISK_ERROR:
            log.error("volume %s: the write log cannot be written (errno %d)", volume.name, event.a)
            self._full(volume)  # where the disk is full, committed segments make room
        elif event.kind == EventKind.READ_LOST:
            self._say_lost(volume, event)

    def _say_full(self, volume: Volume) -> None:
        """The disk has no room for the log: whose bytes are there."""
        now = time.monotonic()
        if now - self._last_full < _FULL_EVERY:
            return
        self._last_full = now
        log.warning("volume %s: writers wait for uploads: %s", volume.name, disk_use(self._engine, volume))

    def _say_lost(self, volume: Volume, event: Event) -> None:
        now = time.monotonic()
        if now - self._last_lost < _LOUD_EVERY:
            return
        self._last_lost = now
        what = os.strerror(event.b) if event.b else "other data than was written"
        if event.a <= volume.root.last_segment:
            then = "the store has it, reads go there: look at the disk"
        else:
            then = "it was not uploaded, reads of it fail: write it again, or go back to a snapshot"
        path = segment_path(volume.log_dir, event.a)
        log.error("volume %s: the disk lost a part of log segment %s (%s); %s", volume.name, path, what, then)

    def _full(self, volume: Volume) -> None:
        """Writers wait: this volume first, and every other whose log could make room."""
        self.request(volume, seal=True, urgent=True)
        for other in self._retirer.watched():
            if other is not volume:
                self.request(other, seal=True, urgent=True)
