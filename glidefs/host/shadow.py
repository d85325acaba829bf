"""Shadow verify, a debug option: the second source of each volume, with which the core compares every read.

csrc/shadow/shadow.c compares and keeps the second source up to date. Here it begins: with what the log holds
when the volume is opened, read from the segments, and with what the store has then, read block by block
as reads need it, by offline/reader.py. Neither goes through the maps, the block cache or the engine's
reader, and the root stays the one of the open, so later uploads and compaction are verified too.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

from glidefs.core.check import Closed
from glidefs.core.engine import Engine
from glidefs.core.shadow import ShadowDifference, ShadowEnded, ShadowFile, ShadowFill, ShadowItem
from glidefs.core.volume import VolumeConfig
from glidefs.errors import CorruptObject, GlideError, StoreError
from glidefs.formats.manifest import Root
from glidefs.formats.pack import SECTOR
from glidefs.host.shadow_report import Reporter
from glidefs.offline.reader import BlockReader
from glidefs.store.resilient import ResilientStore
from glidefs.volume.logs import copy_log
from glidefs.volume.settings import HostSettings

if TYPE_CHECKING:
    from glidefs.volume.volume import Volume

log = logging.getLogger(__name__)

THREADS = 4
AWAY = 10.0
"""Seconds without a request after one that the store did not answer: reads go on uncompared."""


class ShadowVerifier:
    """Makes second sources in ``directory``, answers what the core asks of them and logs what it finds.

    ``find`` gives the volume of a cookie. Its threads wait for the store only.
    """

    def __init__(
        self,
        engine: Engine,
        store: ResilientStore,
        settings: HostSettings,
        directory: Path,
        find: Callable[[int], Volume | None],
    ) -> None:
        self._engine = engine
        self._settings = settings
        self._directory = directory
        self._find = find
        self._store = store.view("background", settings.store_patience)
        self._reporter = Reporter(engine.cache, self._store, settings.cache_scope)
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self._away_until = 0.0
        self._sources: dict[int, BlockReader] = {}

    def start(self) -> None:
        """Start the threads."""
        log.warning("shadow verify is on: every read waits until it was compared (%s)", self._directory)
        for i in range(THREADS):
            thread = threading.Thread(target=self._serve, name=f"glide-shadow-{i}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def close(self) -> None:
        """Stop and join the threads; reads that ask afterwards go on uncompared after a while."""
        self._stop.set()
        self._engine.wake()
        for thread in self._threads:
            thread.join()

    # -- a volume begins -------------------------------------------------------------------------

    @contextlib.contextmanager
    def source(self, volume: Volume, root: Root, config: VolumeConfig) -> Iterator[ShadowFile | None]:
        """The second source of a volume that is about to be opened; None: it is not compared."""
        with contextlib.ExitStack() as stack:
            shadow = self._begin(stack, volume.name, config)
            if shadow is not None:
                self._sources[volume.cookie] = BlockReader(self._store, volume.prefix, root)
            yield shadow

    def _begin(self, stack: contextlib.ExitStack, name: str, config: VolumeConfig) -> ShadowFile | None:
        try:
            file = stack.enter_context(_unnamed_file(self._directory))
            after = config.committed_seq
            extents = copy_log(Path(config.log_dir), config.volume_id, config.log_id, file, after=after)
            file.flush()
        except (OSError, GlideError) as error:
            log.error("volume %s: its reads are not compared, no second source: %s", name, error)
            return None
        known = [(extent.offset // SECTOR, extent.length // SECTOR) for extent in extents]
        return ShadowFile(file.fileno(), known)

    def forget(self, volume: Volume) -> None:
        """The volume was closed."""
        self._sources.pop(volume.cookie, None)

    # -- what the core asks and tells ------------------------------------------------------------

    def _serve(self) -> None:
        while not self._stop.is_set():
            try:
                item = self._engine.shadow_next(self._settings.poll_ms)
                if item is not None:
                    self._handle(item)
            except Closed:
                return
            except BaseException:
                log.exception("shadow verify: an item could not be handled")
                self._stop.wait(0.1)

    def _handle(self, item: ShadowItem) -> None:
        volume = self._find(item.volume)
        source = self._sources.get(item.volume)
        if volume is None or source is None:
            return  # closed meanwhile
        if isinstance(item, ShadowFill):
            data = self._read(volume, source, item)
            with contextlib.suppress(Closed):
                volume.core.shadow_fill(item.block, item.count, data)
        elif isinstance(item, ShadowDifference):
            # One message of its own each: the daemon holds back what repeats.
            log.error(f"volume {volume.name}: SHADOW DIFFERENCE: {self._reporter.text(volume, item)}")
        elif isinstance(item, ShadowEnded):
            log.error(
                "volume %s: its reads are not compared any more, the second source in %s failed: %s",
                volume.name,
                self._directory,
                OSError(item.errno, "").strerror or item.errno,
            )

    def _read(self, volume: Volume, reader: BlockReader, item: ShadowFill) -> bytearray | None:
        """What the store had at open; None if it cannot be had now."""
        if time.monotonic() < self._away_until:
            return None
        try:
            return reader.read(item.block, item.count)
        except StoreError as error:
            if error.temporary:
                self._away_until = time.monotonic() + AWAY
            why: GlideError = error
        except CorruptObject as error:
            why = error
        log.warning(
            "volume %s: blocks %d+%d are not compared, the store does not have them as they were at open: %s",
            volume.name,
            item.block,
            item.count,
            why,
        )
        return None


def _unnamed_file(directory: Path) -> IO[bytes]:
    return tempfile.TemporaryFile(dir=directory)
