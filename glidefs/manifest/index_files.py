"""Pack indices on the local disk: a restart while the store is away still finds what is in the block cache.

``{directory}/{pack id}`` is the end of a pack as the store has it, index and trailer, and is checked like
that. The files are hints: written without fsync, read as absent when damaged, and the least recently
used go first once all of them exceed the limit, or when the disk is short of inodes or of room.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections import OrderedDict
from pathlib import Path

from glidefs.errors import CorruptObject
from glidefs.formats import reserve
from glidefs.formats.manifest import PackRef
from glidefs.formats.pack import PackIndex, decode_index

log = logging.getLogger(__name__)


class IndexFiles:
    """At most ``limit`` bytes of indices in ``directory``. ``_lock`` guards the table of sizes."""

    def __init__(self, directory: Path, limit: int) -> None:
        self._directory = directory
        self._limit = limit
        self._lock = threading.Lock()
        self._sizes: OrderedDict[str, int] | None = None  # least recently used first
        self._used = 0

    def get(self, key: str, ref: PackRef) -> PackIndex | None:
        """The index of the pack ``ref`` with store key ``key``, if a good copy is here."""
        path = self._directory / ref.id.hex()
        try:
            tail = path.read_bytes()
        except OSError:
            return None
        try:
            index = decode_index(key, tail, ref.size, ref.id)
        except CorruptObject as error:
            log.warning("%s: %s; the store has it", path, error)
            self._forget(path.name)
            return None
        with self._lock:
            sizes = self._table()
            if path.name in sizes:
                sizes.move_to_end(path.name)
        return index

    def put(self, ref: PackRef, tail: bytes) -> None:
        """Keep the last bytes of a pack. What fails is only logged."""
        name = ref.id.hex()
        path = self._directory / name
        fresh = path.with_name(f".{name}.{threading.get_ident()}")
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            if not reserve.has_files(self._directory) and not self.give_way(1):
                return
            fresh.write_bytes(tail)
            fresh.rename(path)
        except OSError as error:
            log.debug("%s: %s", path, error)
            with contextlib.suppress(OSError):
                fresh.unlink()  # of a full disk
            return
        with self._lock:
            sizes = self._table()
            self._used += len(tail) - sizes.pop(name, 0)
            sizes[name] = len(tail)
            excess: list[str] = []
            while self._used > self._limit and len(sizes) > 1:
                excess.append(self._drop_oldest(sizes))
        for name in excess:
            self._unlink(name)

    def give_way(self, count: int = 0) -> bool:
        """Remove the ``count`` least recently used files, or half of all. False: there are none."""
        with self._lock:
            sizes = self._table()
            oldest = [
                self._drop_oldest(sizes) for _ in range(min(count or (len(sizes) + 1) // 2, len(sizes)))
            ]
        for name in oldest:
            self._unlink(name)
        return bool(oldest)

    def _drop_oldest(self, sizes: OrderedDict[str, int]) -> str:
        name, size = sizes.popitem(last=False)
        self._used -= size
        return name

    def forget(self, ref: PackRef) -> None:
        """Keep no copy of this index."""
        self._forget(ref.id.hex())

    def _forget(self, name: str) -> None:
        with self._lock:
            self._used -= self._table().pop(name, 0)
        self._unlink(name)

    def _unlink(self, name: str) -> None:
        with contextlib.suppress(OSError):
            (self._directory / name).unlink()

    def _table(self) -> OrderedDict[str, int]:
        """The files of earlier processes are taken in at the first use, the oldest first."""
        if self._sizes is None:
            found: list[tuple[float, str, int]] = []
            with contextlib.suppress(OSError), os.scandir(self._directory) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        self._unlink(entry.name)  # of a process that died
                        continue
                    with contextlib.suppress(OSError):
                        stat = entry.stat(follow_symlinks=False)
                        found.append((stat.st_mtime, entry.name, stat.st_size))
            self._sizes = OrderedDict((name, size) for _, name, size in sorted(found))
            self._used = sum(self._sizes.values())
        return self._sizes
