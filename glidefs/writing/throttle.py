"""Slows writers down before the logs are full, so that they never stop all at once.

Below ``SOFT`` of the log limit writers go as fast as they can. From there on they may append at a multiple
of the rate at which uploads make log space free, which falls as the logs fill: it is that rate itself at
``EVEN``, so logs that are written faster than they are uploaded settle there. LSM trees do the
same with their compaction debt (RocksDB, "Write Stalls").

How fast uploads are is known from the first commit on; until then a modest rate is assumed. While nothing is
uploaded, in an outage of the store, the log is there to be filled: writers keep their speed and wait when it
is full.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from glidefs.core.check import Closed
from glidefs.core.engine import Engine
from glidefs.core.figures import OPS, infos, stats

if TYPE_CHECKING:
    from glidefs.volume.volume import Volume
    from glidefs.writing.retire import Retirer
    from glidefs.writing.upload import Life

log = logging.getLogger(__name__)

SOFT = 0.4
"""Part of the log limit that may be dirty before writers are slowed down, and uploads hurry."""
FILLING = SOFT / 2
"""Part of it from which on full segments are given to the disk."""
EVEN = 0.65
"""Part of it at which they are as slow as uploads."""
STEEP = 4.0
"""Twofold for each quarter of the way from SOFT to EVEN."""
WINDOW = 8.0
"""Seconds over which the rate of uploads is measured: several commits."""
OUTAGE = 3 * WINDOW
"""Seconds without a commit after which nothing is known of it."""
ASSUMED = 100 << 20
"""Bytes per second that uploads are taken to make free until a commit says it, in :data:`OUTAGE` at most."""
LEAST = 8 << 20
"""Bytes per second that writers get in any case."""
_WRITE = OPS.index("write")
STEP = 0.1
"""Seconds between two looks while somebody writes."""
IDLE = 1.0


def allowed(dirty: int, limit: int, drained: float) -> int:
    """Bytes per second that writers may append, 0 for any number; ``dirty`` of ``limit`` bytes are in use.

    ``drained``: bytes per second that became committed lately.
    """
    part = dirty / limit
    if part <= SOFT or drained <= 0:
        return 0
    way = (part - SOFT) / (EVEN - SOFT)
    return max(LEAST, int(drained * 2.0 ** (STEEP * (1.0 - way))))


class DrainRate:
    """How fast dirty bytes become committed: from totals, taken whenever something was committed.

    Between commits the totals tell nothing: what was written is counted a moment later than what is dirty.
    """

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()
        self._commits = 0

    def note(self, now: float, written: int, dirty: int, commits: int) -> float:
        """Bytes per second over :data:`WINDOW`; :data:`ASSUMED` before the first commit, 0 if none comes.

        ``written``: bytes since some start. ``commits``: a number that each commit changes.
        """
        if not self._seen or commits != self._commits:
            self._commits = commits
            if self._seen and now - self._seen[-1][0] >= OUTAGE:  # the first one after it
                self._seen.clear()
            self._seen.append((now, written - dirty))
        while len(self._seen) > 2 and now - self._seen[1][0] >= WINDOW:
            self._seen.popleft()
        (began, before), (last, committed) = self._seen[0], self._seen[-1]
        if now - last >= OUTAGE:
            return 0.0
        if last <= began:
            return ASSUMED
        # Up to the last commit; beyond it once the next one is late.
        took = max(last - began, (now - began) * (len(self._seen) - 1) / len(self._seen))
        return max(0.0, (committed - before) / took)

    def clear(self) -> None:
        """Begin anew."""
        self._seen.clear()


class Throttle:
    """The thread that sets the pace of an engine's writers, and retires in small steps while logs fill."""

    def __init__(
        self,
        engine: Engine,
        retirer: Retirer,
        writers: Callable[[], Sequence[Volume]],
        life: Life,
        away: Callable[[], bool],
    ) -> None:
        """``away``: whether the store is. ``life`` is told whether the logs fill."""
        self._engine = engine
        self._life = life
        self._away = away
        self._retirer = retirer
        self._writers = writers
        self._rate = DrainRate()
        self._written = 0
        self._known: dict[int, int] = {}
        self._pace = 0
        self.filling = False
        """Whether more is dirty than a short burst leaves."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="glide-pace", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """Join it."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        pause = IDLE
        while not self._stop.wait(pause):
            try:
                pause = STEP if self.step(time.monotonic()) else IDLE
            except Closed:
                return
            except Exception:
                log.exception("writers are not slowed down for now")
                pause = IDLE

    @property
    def active(self) -> bool:
        """Whether writers are slowed down: other background work should leave the CPU to uploads."""
        return self._pace > 0

    def step(self, now: float) -> bool:
        """Look once; whether anything is dirty. ``now`` is a time of ``time.monotonic()``."""
        written, dirty, commits = self._totals()
        limit = self._engine.stats().log_limit
        self.filling = dirty > limit * FILLING
        self._life.crowded = dirty > limit * SOFT
        pace = 0
        if self._life.crowded and not self._away():  # uploads go as fast as they can
            pace = allowed(dirty, limit, self._rate.note(now, written, dirty, commits))
        else:
            self._rate.clear()
        if pace or self._pace:
            self._engine.pace(pace)
        self._pace = pace
        if dirty:
            self._retirer.make_room()
        return dirty > 0

    def _totals(self) -> tuple[int, int, int]:
        """Bytes written while it was looked, dirty now, and commits, of all volumes that may have any."""
        volumes = self._writers()
        cores = [volume.core for volume in volumes]
        states = [info for info in infos(cores) if info is not None]
        dirty, commits = sum(info.dirty_bytes for info in states), sum(info.committed_seq for info in states)
        counters = zip(volumes, stats(cores), strict=True)
        seen = {volume.cookie: found.bytes[_WRITE] for volume, found in counters if found is not None}
        # One that comes, or comes back, counts from here on.
        self._written += sum(now - self._known.get(cookie, now) for cookie, now in seen.items())
        self._known = seen
        return self._written, dirty, commits
