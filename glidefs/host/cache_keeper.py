"""Syncs the block cache in the background, and reports a failing disk once.

While the disk fails the core serves blocks from the store without the cache; it tries the disk again by
itself (``csrc/cache/cache_sync.c``), so all that is left to do here is to sync, and to tell people.
"""

from __future__ import annotations

import logging
import os
import threading
import time

from glidefs.core.check import Closed
from glidefs.core.engine import Engine
from glidefs.formats.reserve import Reserve

log = logging.getLogger(__name__)

EVERY = 3.0
"""Seconds between two syncs."""


class CacheKeeper:
    """One thread, until :meth:`close`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._stop = threading.Event()
        self._failed_at: float | None = None
        self.reserve: Reserve | None = None
        """Made again when there is room for it."""
        self._thread = threading.Thread(target=self._run, name="glide-cache", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """Stop and join it."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def look(self) -> None:
        """Sync once, and say what changed. Raises Closed."""
        error = self._engine.cache.sync()
        if self.reserve is not None:
            self.reserve.renew()
        where = self._engine.config.cache_dir
        if error and self._failed_at is None:
            self._failed_at = time.monotonic()
            log.error(
                "block cache in %s: the disk fails (%s); reads bypass it and go to the store until it works "
                "again: look at the disk",
                where,
                os.strerror(error),
            )
        elif not error and self._failed_at is not None:
            seconds = time.monotonic() - self._failed_at
            self._failed_at = None
            log.warning("block cache in %s: the disk works again after %.0f s", where, seconds)

    def _run(self) -> None:
        while not self._stop.wait(EVERY):
            try:
                self.look()
            except Closed:
                return
