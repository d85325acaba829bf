"""Decides when committed segments free their disk space: late, because they are a read cache at no cost.

A segment goes when all that it held was written again since, or when the logs of the host near their limit,
or the maps that say what is in them. Where it is the logs, segments are thinned first: they keep what is the
newest of its kind, and give back the space of the rest. Then the oldest of all volumes goes first, one at a
time, and leaves what it can in the block cache (:mod:`glidefs.writing.demote`) unless writers are about to
wait. Only what the durable local manifest includes may go (:meth:`Volume.retirable`), in order.
"""

from __future__ import annotations

import contextlib
import heapq
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from glidefs.core.check import Closed
from glidefs.core.engine import Engine
from glidefs.core.figures import VolumeInfo, infos
from glidefs.errors import GlideError
from glidefs.volume.settings import HostSettings
from glidefs.writing.demote import Demoter

if TYPE_CHECKING:
    from glidefs.volume.volume import Volume

log = logging.getLogger(__name__)


_THIN_ENOUGH = 32 << 20
"""Bytes that a volume whose writers wait must get by thinning; else its committed segments go."""
_THIN_SECONDS = 0.3
"""For the segments of all volumes together, at a time: whoever retires has writers to look after."""
_LEAST_KEPT = 1 / 6
"""Part of the mark at which segments go that what is committed may take, whatever the rest is: where that is
not committed, only uploads make room, and what is warm would go for nothing."""


@contextlib.contextmanager
def _logged(volume: Volume) -> Iterator[None]:
    """Log why segments of this volume cannot be retired. A volume that was closed has none to retire."""
    try:
        yield
    except Closed:
        pass
    except GlideError as error:
        log.warning("volume %s: segments cannot be retired: %s", volume.name, error)


class Retirer:
    """Keeps the logs of a host below their mark. ``_lock`` guards the set of volumes that have a log."""

    def __init__(self, engine: Engine, settings: HostSettings, demoter: Demoter) -> None:
        self._engine = engine
        self._demoter = demoter
        self._settings = settings
        self._mark = settings.retire_fraction
        self._lock = threading.Lock()
        self._running = threading.Lock()
        self._pauses = 0  # guarded by `_lock`
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

    def pause(self, deadline: float) -> bool:
        """Retire nothing until :meth:`resume`. Waits for what is under way; false if it did not end.

        ``deadline`` is a time of ``time.monotonic()``.
        """
        with self._lock:
            self._pauses += 1
        ended = self._running.acquire(timeout=max(0.0, deadline - time.monotonic()))
        if ended:
            self._running.release()
        return ended

    def resume(self) -> None:
        """Undo a :meth:`pause`."""
        with self._lock:
            self._pauses -= 1

    def squeeze(self, volume: Volume) -> None:
        """Writers of this volume wait: what it may give back goes until they can go on, then what all keep
        too much of.
        """
        with _logged(volume):
            # Who waits below the mark waits for the disk or the maps, not for the logs' limit.
            for_disk = volume.core.info().parked > 0 and not self._logs_too_much(self._mark)
            freed = self._thin(volume, lambda freed: freed >= _THIN_ENOUGH)
            info = volume.core.info()
            worth_it = self._too_much() and self._worth_it(info.log_bytes - info.dirty_bytes)
            if freed < _THIN_ENOUGH and (for_disk or worth_it):
                volume.retire_committed()
        with self._running:
            self._give_back()

    def run(self, volume: Volume) -> None:
        """Retire what ``volume`` keeps for nothing, and of any volume while all keep too much."""
        info = volume.core.info()
        upto = min(volume.retirable(), info.committed_seq)
        if keep := self._settings.retire_segments:
            upto = min(upto, max(info.dead_seq, upto - keep))
        else:
            upto = min(upto, info.dead_seq)
        if 0 < info.first_seq <= upto:
            volume.core.retire(upto)
        self.make_room()

    def make_room(self) -> None:
        """Retire what all keep too much of, unless somebody does so now."""
        if self._too_much() and self._running.acquire(blocking=False):
            try:
                self._give_back()
            finally:
                self._running.release()

    def _too_much(self, fraction: float | None = None) -> bool:
        """Whether logs or maps are beyond a part of their limits; None: where segments begin to go."""
        fraction = self._mark if fraction is None else fraction
        return self._logs_too_much(fraction) or self._maps_too_much(fraction)

    def _log_bytes(self) -> int:
        stats = self._engine.stats()
        return stats.log_bytes - stats.log_spare_bytes

    def _logs_too_much(self, fraction: float) -> bool:
        return self._log_bytes() > self._engine.stats().log_limit * fraction

    def _maps_too_much(self, fraction: float) -> bool:
        stats = self._engine.stats()
        return stats.map_bytes > stats.map_budget * fraction

    def _worth_it(self, kept: int) -> bool:
        """Whether it is for the ``kept`` bytes of committed segments that logs are full, or maps are."""
        least = self._engine.stats().log_limit * self._mark * _LEAST_KEPT
        return kept > least or self._maps_too_much(self._mark)

    def _give_back(self) -> None:
        """Retire segment by segment, the oldest of all volumes first, while they keep too much.

        The caller holds ``_running``.
        """
        oldest: list[tuple[int, int, int, Volume]] = []
        watched = self.watched() if self._too_much() and not self._pauses else []
        fat: list[tuple[int, int, Volume]] = []
        dirty = 0
        for volume, info in zip(watched, infos([volume.core for volume in watched]), strict=True):
            self._offer(oldest, volume, info)
            if info is not None:
                dirty += info.dirty_bytes
                if info.log_bytes - info.dirty_bytes > self._engine.config.segment_bytes:
                    fat.append((info.oldest_ns, volume.cookie, volume))
        near = (1 + self._mark) / 2
        by_maps = not self._logs_too_much(self._mark)  # no thinning makes these smaller
        thin = by_maps or self._thin_all([volume for _, _, volume in sorted(fat)])
        while oldest and self._too_much() and self._worth_it(self._log_bytes() - dirty) and not self._pauses:
            if not (thin or self._too_much(near)):
                break  # it goes on from here the next time
            _, _, first, volume = heapq.heappop(oldest)
            with _logged(volume):
                if not self._too_much(near):
                    self._demoter.demote(volume, first)
                volume.core.retire(first)
                info = volume.core.info()
                if info.first_seq > first:
                    self._offer(oldest, volume, info)

    def _thin_all(self, volumes: Sequence[Volume]) -> bool:
        """Thin segments of these while logs are beyond the mark and time is left; whether all are thin."""
        until = time.monotonic() + _THIN_SECONDS
        whole = True

        def enough(_: int) -> bool:
            nonlocal whole
            whole = time.monotonic() <= until and self._logs_too_much(self._mark)
            return not whole

        for volume in volumes:
            with _logged(volume):
                self._thin(volume, enough)
        return whole

    def _thin(self, volume: Volume, enough: Callable[[int], bool]) -> int:
        """Thin segments, the oldest first, until so many bytes are enough; how many. Raises CoreError."""
        info, freed = volume.core.info(), 0
        for seq in range(info.first_seq, min(volume.retirable(), info.committed_seq) + 1):
            if not seq or self._pauses or enough(freed):
                break
            freed += volume.core.thin(seq)
        return freed

    @staticmethod
    def _offer(oldest: list[tuple[int, int, int, Volume]], volume: Volume, info: VolumeInfo | None) -> None:
        """Enter the oldest segment of a volume, if it may go."""
        if info is not None and 0 < info.first_seq <= min(volume.retirable(), info.committed_seq):
            heapq.heappush(oldest, (info.oldest_ns, volume.cookie, info.first_seq, volume))
