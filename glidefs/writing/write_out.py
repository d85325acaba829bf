"""What follows a full log segment, on a thread of its own so that the worker waits for none of it.

The file of a segment to come is made, with its blocks: else appends would wait for the file system again
and again while the kernel writes back what came before. And once logs fill, full segments are given to the
disk as they come, not all at once when the first sync asks for them. A guest that never flushes leaves its
log to the kernel, which begins to write it when a tenth of the memory is dirty; the first upload syncs what
it sends, and would wait for all of that. Databases do the same with their logs (RocksDB's
``wal_bytes_per_sync``, PostgreSQL's ``wal_writer_flush_after``). A burst that ends before is faster without
the disk.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from glidefs.core.priority import lower_priority
from glidefs.core.write_out import write_out
from glidefs.errors import GlideError
from glidefs.volume.log_damage import segment_path

if TYPE_CHECKING:
    from glidefs.volume.volume import Volume

log = logging.getLogger(__name__)


class WriteOut:
    """One thread. What it does not get to, the worker or a sync does. ``due``: whether logs fill."""

    def __init__(self, nice: int, due: Callable[[], bool]) -> None:
        self._nice = nice
        self._due = due
        self._sealed: queue.SimpleQueue[tuple[Volume, int] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="glide-write-out", daemon=True)
        self._stopping = False

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """Join it; what is queued is left."""
        self._stopping = True
        self._sealed.put(None)
        if self._thread.ident is not None:
            self._thread.join()

    def note(self, volume: Volume, segment: int) -> None:
        """The segment of that number is full."""
        self._sealed.put((volume, segment))

    def _run(self) -> None:
        lower_priority(self._nice)
        while (full := self._sealed.get()) is not None and not self._stopping:
            volume, segment = full
            try:
                volume.core.prepare()
                if self._due():
                    write_out(segment_path(volume.log_dir, segment))
            except (OSError, GlideError) as error:  # it may be gone; what is wrong with the disk a sync says
                log.debug("segment %d of %s: %s", segment, volume.name, error)
