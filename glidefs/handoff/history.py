"""Outcomes of past handoffs, passed on from process to process."""

from __future__ import annotations

import bisect
import threading
import time

from msgspec import Struct
from msgspec.structs import replace

OUTCOMES = ("succeeded", "aborted", "revived", "predecessor-died")
"""Taken over; called off before the cut-over; taken back after it; crash recovery in the successor."""
BOUNDS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
"""Upper bounds of the buckets of the stall, in seconds."""


KEPT = 32
"""Handoffs that are remembered one by one."""


class PastHandoff(Struct, frozen=True):
    """One handoff: when it ended (unix seconds), its outcome, and in seconds how long guests waited."""

    at: float
    outcome: str
    stall_seconds: float | None = None


class Totals(Struct, frozen=True):
    """Counts by outcome, in the order of OUTCOMES; stalls by bucket, the last without bound; their sum.

    ``recent``: the last ones, oldest first. A process of a version without them passes none on.
    """

    outcomes: tuple[int, ...] = (0,) * len(OUTCOMES)
    buckets: tuple[int, ...] = (0,) * (len(BOUNDS) + 1)
    stall_seconds: float = 0.0
    recent: tuple[PastHandoff, ...] = ()


class History:
    """Thread-safe."""

    def __init__(self, totals: Totals | None = None) -> None:
        self._lock = threading.Lock()
        self._totals = totals or Totals()

    @property
    def totals(self) -> Totals:
        """The figures now."""
        with self._lock:
            return self._totals

    def add(self, outcome: str, stall: float | None = None) -> None:
        """One more handoff; ``stall`` in seconds if guests waited."""
        with self._lock:
            outcomes = list(self._totals.outcomes)
            outcomes[OUTCOMES.index(outcome)] += 1
            recent = (*self._totals.recent, PastHandoff(time.time(), outcome, stall))[-KEPT:]
            self._totals = replace(self._totals, outcomes=tuple(outcomes), recent=recent)
            if stall is not None:
                buckets = list(self._totals.buckets)
                buckets[bisect.bisect_left(BOUNDS, stall)] += 1
                self._totals = replace(
                    self._totals, buckets=tuple(buckets), stall_seconds=self._totals.stall_seconds + stall
                )
