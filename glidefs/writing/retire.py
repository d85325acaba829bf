"""Decides when committed segments free their disk space: late, because they are a read cache at no cost.

Only what the durable local manifest includes may go (:meth:`Volume.retirable`), oldest first.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

from glidefs.core.check import Closed
from glidefs.core.engine import Engine
from glidefs.errors import GlideError
from glidefs.volume.settings import HostSettings

if TYPE_CHECKING:
    from glidefs.volume.volume import Volume

log = logging.getLogger(__name__)


class Retirer:
    """Keeps the logs of a host below their mark. ``_lock`` guards the set of volumes that have a log."""

    def __init__(self, engine: Engine, settings: HostSettings) -> None:
        self._engine = engine
        self._settings = settings
        self._lock = threading.Lock()
        self._running = threading.Lock()
        self._volumes: dict[int, Volume] = {}

    def watch(self, volume: Volume) -> None:
        """The volume has a log."""
        with self._lock:
            self._volumes[volume.cookie] = volume

    def forget(self, volume: Volume) -> None:
        """The volume closes."""
        with self._lock:
            self._volumes.pop(volume.cookie, None)

    def watched(self) -> list[Volume]:
        """Volumes that have, or had, a log."""
        with self._lock:
            return list(self._volumes.values())

    def squeeze(self, volume: Volume) -> None:
        """Give back all that this volume may; and all that the others may while the log is nearly full."""
        volume.retire_committed()
        config = self._engine.config
        stats = self._engine.stats()
        if stats.log_bytes > self._mark(config.log_limit) or stats.map_bytes > self._mark(stats.map_budget):
            for other in self.watched():
                self._guarded(other)

    def run(self, volume: Volume) -> None:
        """Retire what ``volume`` has too much of, and of any while the log is over its mark."""
        keep = self._settings.retire_segments
        info = volume.core.info()
        upto = min(volume.retirable(), info.committed_seq)
        if info.first_seq and upto - info.first_seq + 1 > keep:
            volume.core.retire(upto - keep)
        over = self._engine.stats().log_bytes - self._mark(self._engine.config.log_limit)
        if over > 0 and self._running.acquire(blocking=False):
            try:
                self._give_back(over)
            finally:
                self._running.release()

    def _mark(self, limit: int) -> int:
        return int(limit * self._settings.retire_fraction)

    @staticmethod
    def _guarded(volume: Volume) -> None:
        try:
            volume.retire_committed()
        except Closed:
            pass
        except GlideError as error:
            log.warning("volume %s: segments cannot be retired: %s", volume.name, error)

    def _give_back(self, over: int) -> None:
        """Retire segments until ``over`` bytes are free; the volume that keeps most gives first."""
        spare: list[tuple[int, int, Volume]] = []
        for i, volume in enumerate(self.watched()):
            if kept := self._kept(volume):
                spare.append((kept, i, volume))
        while over > 0 and spare:
            spare.sort()
            kept, i, volume = spare.pop()
            try:
                volume.core.retire(volume.core.info().first_seq)
            except Closed:
                continue
            left = self._kept(volume)
            over -= max(0, kept - left)
            if 0 < left < kept:
                spare.append((left, i, volume))

    @staticmethod
    def _kept(volume: Volume) -> int:
        """Bytes of committed segments that may go."""
        try:
            info = volume.core.info()
        except Closed:
            return 0
        may_go = 0 < info.first_seq <= min(volume.retirable(), info.committed_seq)
        return max(0, info.log_bytes - info.dirty_bytes) if may_go else 0
