"""One thread looks at the counters of all exports every ten seconds, and keeps an hour of what they did.

Memory: an export that nobody uses has no ring. One that did something in the last hour has a ring (5.8 KB)
and its counters at the last two looks (2 KB each). A volume that was not there at the look before began at
zero.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from glidefs.core.brief import IDLE, Brief, briefs
from glidefs.core.check import Closed
from glidefs.core.figures import VolumeInfo, infos
from glidefs.core.volume import CoreVolume
from glidefs.live.rates import NOTHING, Rates, rates
from glidefs.live.ring import LENGTH, STEP, Ring, Sample, zeros

log = logging.getLogger(__name__)

LEAST = 1.0
"""Seconds: a rate is never of less."""
FORGOTTEN = 60.0
"""Seconds after which the look of somebody who asked is given up."""

Key = tuple[str, str]
"""Name and volume id of an export: another volume of that name has another history."""
Volumes = Callable[[], dict[Key, CoreVolume]]


class Look(NamedTuple):
    """The counters of all exports at ``at``, of ``time.monotonic()``."""

    at: float
    of: dict[Key, Brief]


class Now(NamedTuple):
    """What exports did in the last ``seconds``; one that is not here did nothing."""

    seconds: float
    rates: dict[Key, Rates]
    drained: dict[Key, float]
    """Log bytes per second that the store got."""


class Sampler:
    """``_lock`` guards the looks and the rings. ``volumes()`` says what to look at.

    ``also()`` is called with each sample.
    """

    def __init__(
        self,
        volumes: Volumes,
        also: Callable[[], object] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._volumes = volumes
        self._also = also
        self._clock = clock
        self._lock = threading.Lock()
        self._rings: dict[Key, Ring] = {}
        self._tick = Look(clock(), {})
        self._asked: Look | None = None
        self._began = clock()
        self._number = -1
        self._dirty: dict[Key, int] = {}
        self._asked_dirty: dict[Key, int] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    # -- the thread --------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the thread, once."""
        if self._thread is None:
            self._began = self._clock()
            self._thread = threading.Thread(target=self._run, name="live", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Join it."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            volumes = self._volumes()
            with self._lock:
                self._tick, self._dirty = self._look(volumes, self._tick)
        except Closed:
            pass  # a stop that came at once
        while not self._stop.wait(STEP - (self._clock() - self._began) % STEP):
            try:
                self.sample()
                self._also()
            except Closed:
                continue  # a failed handoff opens everything again
            except Exception:
                log.exception("a sample of what exports do is missing")

    def sample(self) -> None:
        """Look once: the sample that belongs to this time, and none for those that were missed."""
        volumes = self._volumes()
        with self._lock:
            number = round((self._clock() - self._began) / STEP) - 1
            if number <= self._number:
                return  # woken early: a sample of no time says nothing
            look, dirty = self._look(volumes, self._tick)
            seconds = look.at - self._tick.at
            for missed in range(max(self._number + 1, number - LENGTH), number):
                for ring in self._rings.values():
                    ring.miss(missed)
            for key in self._rings.keys() - look.of.keys():
                del self._rings[key]
            for key, after in look.of.items():
                self._put(key, number, rates(self._tick.of.get(key, IDLE), after, seconds), dirty[key])
            self._number, self._tick, self._dirty = number, look, dirty
            if self._asked is not None and look.at - self._asked.at > FORGOTTEN:
                self._asked, self._asked_dirty = None, {}

    def _put(self, key: Key, number: int, did: Rates, dirty: int) -> None:
        ring = self._rings.get(key)
        if did is NOTHING and not dirty:
            if ring is not None:
                ring.put(number, None)
                if number - ring.busy_at >= LENGTH:
                    del self._rings[key]
            return
        if ring is None:
            ring = self._rings[key] = Ring(number)
        ring.put(number, _sample(did, dirty))

    def _look(self, volumes: dict[Key, CoreVolume], before: Look) -> tuple[Look, dict[Key, int]]:
        """All counters now, and dirty bytes. Those that did not change are the same objects as before."""
        cores = list(volumes.values())
        at = self._clock()
        found: dict[Key, Brief] = {}
        dirty: dict[Key, int] = {}
        told: list[VolumeInfo | None] = infos(cores)
        for key, brief, info in zip(volumes, briefs(cores), told, strict=True):
            if brief is None or info is None:
                continue
            known = before.of.get(key)
            found[key] = known if known is not None and known.numbers == brief.numbers else brief
            dirty[key] = info.dirty_bytes
        return Look(at, found), dirty

    # -- questions -----------------------------------------------------------------------------------

    def now(self) -> Now:
        """What exports do now: since the last look that is at least LEAST old. Raises Closed."""
        volumes = self._volumes()
        with self._lock:
            at = self._clock()
            looks = [(self._tick, self._dirty)]
            if self._asked is not None:
                looks.append((self._asked, self._asked_dirty))
            usable = [look for look in looks if at - look[0].at >= LEAST]
            before, dirty_before = max(usable or looks[:1], key=lambda look: look[0].at)
            look, dirty = self._look(volumes, before)
            seconds = look.at - before.at
            found, drained = {}, {}
            for key, after in look.of.items():
                if (did := rates(before.of.get(key, IDLE), after, seconds)) is not NOTHING:
                    found[key] = did
                gone = dirty_before.get(key, 0) - dirty[key] + did.write_bytes * seconds
                if gone > 0 and seconds > 0:
                    drained[key] = gone / seconds
            if self._asked is None or at - self._asked.at >= LEAST:
                self._asked, self._asked_dirty = look, dirty
            return Now(seconds, found, drained)

    def history(self, key: Key) -> tuple[float, dict[str, list[float | None]]]:
        """Seconds since the newest sample, and up to an hour of samples, oldest first."""
        with self._lock:
            last = self._number
            first = max(0, last - LENGTH + 1)
            ring = self._rings.get(key)
            series = zeros(first, last) if ring is None else ring.series(first, last)
            return self._clock() - self._tick.at, series


def _sample(did: Rates, dirty: int) -> Sample:
    return (
        did.read_iops,
        did.write_iops,
        did.read_bytes,
        did.write_bytes,
        did.read_p99 or 0.0,
        did.write_p99 or 0.0,
        float(dirty),
        did.store_reads,
    )
