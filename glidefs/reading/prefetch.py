"""Prefetches hot sets for new forks, in the background.

Blocks go in windows, in first-touch order from window to window; inside a window they are sorted, so
that neighbours in a pack share a request. The requests run in the lane of background reads, on
threads of their own: a guest's fault never waits for one of these threads.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING

from glidefs.core.check import Closed
from glidefs.errors import GlideError
from glidefs.formats.pack import BLOCK
from glidefs.reading.service import FaultService
from glidefs.volume.settings import HostSettings

if TYPE_CHECKING:
    from glidefs.volume.volume import Volume

log = logging.getLogger(__name__)

WINDOW = 64
"""Blocks that are looked up and fetched together."""


def windows(blocks: Iterable[int], end: int) -> Iterator[list[tuple[int, int]]]:
    """Runs (first block, count) of each window of ``blocks`` below ``end``, ascending in a window."""
    inside = (block for block in blocks if block < end)
    while window := sorted(set(islice(inside, WINDOW))):
        runs: list[tuple[int, int]] = []
        for block in window:
            if runs and block == sum(runs[-1]):
                runs[-1] = (runs[-1][0], runs[-1][1] + 1)
            else:
                runs.append((block, 1))
        yield runs


class Prefetcher:
    """Prefetches for ``hot_volumes`` forks at a time; the others queue."""

    def __init__(self, faults: FaultService, settings: HostSettings) -> None:
        self._faults = faults
        self._limit = settings.hot_set_bytes // BLOCK
        self._stopping = False
        self._volumes = ThreadPoolExecutor(settings.hot_volumes, "glide-hot")
        self._helpers = ThreadPoolExecutor(settings.hot_threads, "glide-hot-fetch")

    def close(self) -> None:
        """End what runs and drop what waits."""
        self._stopping = True
        self._volumes.shutdown(cancel_futures=True)
        self._helpers.shutdown(cancel_futures=True)

    def start(self, volume: Volume, blocks: Callable[[], Iterable[int]]) -> None:
        """Prefetch what ``blocks`` returns, which is asked on the background thread. Ends with the volume."""
        if not self._stopping:
            self._volumes.submit(self._quietly, volume, blocks)

    def _quietly(self, volume: Volume, blocks: Callable[[], Iterable[int]]) -> None:
        try:
            self.run(volume, blocks())
        except Closed:
            pass
        except GlideError as error:
            log.info("volume %s: its hot set is not prefetched: %s", volume.name, error)
        except BaseException:
            log.exception("volume %s: the prefetch of its hot set failed", volume.name)

    def run(
        self,
        volume: Volume,
        blocks: Iterable[int],
        *,
        max_bytes: int | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> int:
        """Prefetch on the calling thread; returns how many blocks were tried.

        Ends early when ``cancelled`` or the volume closes. Blocks that are damaged or that the store
        does not give stay absent: the guest that needs one will say so. Raises Closed.
        """
        limit = self._limit if max_bytes is None else max_bytes // BLOCK
        tried = 0
        for runs in windows(islice(blocks, limit), -(-volume.size // BLOCK)):
            if cancelled() or volume.closing or self._stopping or volume.profiling:
                break
            try:
                self._faults.prefetch_runs(volume, runs, self._helpers)
            except Closed:
                raise
            except GlideError as error:
                log.info("volume %s: prefetch: %s", volume.name, error)
            tried += sum(count for _, count in runs)
        return tried
