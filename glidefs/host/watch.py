"""Idle volumes learn that they were taken over or removed: their roots are compared with the store's.

A volume with dirty data polls its own root (see ``scheduler.py``). One without asks nothing, so one thread of
the host asks for all of those, twice per ``sync_interval``. Where many volumes of a prefix are served here
one listing answers for up to a thousand of them; where a listing would be mostly of others' objects, each
root is asked for by itself, spread over the time and never faster than ``HEADS_PER_SECOND``. What is seen
here is a hint: a root that looks different is then read by the volume's own job, which decides.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable

from glidefs.errors import NotFound, StoreError
from glidefs.manifest import lease
from glidefs.names import manifest_key
from glidefs.store.base import ObjectStore
from glidefs.volume.volume import Volume

log = logging.getLogger(__name__)

HEADS_PER_SECOND = 50.0
LONG_LISTING = 3600.0
"""Seconds for which a prefix whose listing was too long is not listed again."""


class Watch:
    """``volumes`` are those that are open; ``doubt`` makes one look at its root itself.

    ``paused``: nobody may ask now. ``interval``: seconds within which a change is to be noticed.
    """

    def __init__(
        self,
        store: ObjectStore,
        *,
        interval: float,
        volumes: Callable[[], Iterable[Volume]],
        doubt: Callable[[Volume], None],
        paused: Callable[[], bool],
    ) -> None:
        self._store = store
        self._period = interval / 2
        self._volumes = volumes
        self._doubt = doubt
        self._paused = paused
        self._long: dict[str, float] = {}
        """Prefixes whose listing was too long, and until when they are not listed."""
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread."""
        self._thread = threading.Thread(target=self._run, name="glide-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop and join it."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._period / 4):
            try:
                self.look()
            except StoreError as error:
                log.debug("roots of idle volumes cannot be compared now: %s", error)
            except Exception:
                log.exception("roots of idle volumes could not be compared; going on")

    def look(self) -> None:
        """Compare what was not compared for half of the interval. Raises StoreError."""
        by_prefix: defaultdict[str, list[Volume]] = defaultdict(list)
        oldest = time.monotonic() - self._period
        for volume in self._volumes():
            if _is_idle(volume) and volume.committer.last_contact <= oldest:
                by_prefix[volume.prefix].append(volume)
        pause = max(1 / HEADS_PER_SECOND, self._period / 2 / max(1, sum(map(len, by_prefix.values()))))
        for prefix, due in by_prefix.items():
            if not self._list(prefix, len(due)):
                self._ask(due, pause)

    def _list(self, prefix: str, due: int) -> bool:
        """Compare all volumes of a prefix with a listing; false where that is not worth it."""
        if due < lease.WORTH_A_PAGE or self._long.get(prefix, 0.0) > time.monotonic():
            return False
        began = time.monotonic()
        etags = lease.list_etags(self._store, prefix, due, self._gone)
        if etags is None:
            if not self._gone():
                self._long[prefix] = time.monotonic() + LONG_LISTING
            return self._gone()
        if not self._gone():
            for volume in self._volumes():
                if volume.prefix == prefix and _is_idle(volume):
                    self._compare(volume, etags.get(manifest_key(prefix, volume.name)), began)
        return True

    def _ask(self, due: list[Volume], pause: float) -> None:
        for volume in due:
            if self._gone():
                return
            began = time.monotonic()
            try:
                etag: str | None = self._store.head(manifest_key(volume.prefix, volume.name)).etag
            except NotFound:
                etag = None
            self._compare(volume, etag, began)
            self._stop.wait(pause)

    def _compare(self, volume: Volume, etag: str | None, began: float) -> None:
        if not volume.committer.saw(etag, began):
            self._doubt(volume)

    def _gone(self) -> bool:
        return self._stop.is_set() or self._paused()


def _is_idle(volume: Volume) -> bool:
    """Whether it has a root in the store that nobody else here asks for."""
    committer = volume.committer
    return not volume.fenced and not volume.closing and committer.published and committer.confirmed
