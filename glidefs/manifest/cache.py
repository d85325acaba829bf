"""Caches of manifest pages and pack indices, for the whole host: in memory, and indices on the local disk
too.

All of it is immutable and named by its content, so every fork shares it. Index files let a restart find
what is in the block cache while the store is away: ``{directory}/{pack id}`` is the end of a pack as the
store has it, index and trailer, and is checked like that. They are hints: written without fsync, read as
absent when damaged, and the least recently used go first once all of them exceed the limit, or when the
disk is short of inodes or of room.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from pathlib import Path
from typing import Generic, TypeVar

from glidefs.errors import CorruptObject
from glidefs.formats import reserve
from glidefs.formats.atomic import read_file, write_file_atomic
from glidefs.formats.manifest import MAX_DOCUMENT, PackRef, Page, decode_page
from glidefs.formats.pack import PackIndex, decode_index
from glidefs.names import pack_key, page_key
from glidefs.store.base import ObjectStore
from glidefs.store.checked import fetch_checked

log = logging.getLogger(__name__)

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

_INDEX_OVERHEAD = 256


class LoadingCache(Generic[K, V]):
    """Least recently used goes first once the costs exceed ``capacity``. Failed loads are not kept.

    ``_lock`` guards the tables and is not held while loading.
    """

    def __init__(self, capacity: int, cost: Callable[[V], int]) -> None:
        self._capacity = capacity
        self._cost = cost
        self._lock = threading.Lock()
        self._values: OrderedDict[K, V] = OrderedDict()
        self._loads: dict[K, Future[V]] = {}
        self._used = 0
        self.hits = self.misses = self.evictions = 0
        """Answers without a load (a shared one counts), loads begun, values that made room."""

    @property
    def used(self) -> int:
        """The sum of the costs of what is kept."""
        return self._used

    def __len__(self) -> int:
        return len(self._values)

    def peek(self, key: K) -> V | None:
        """What is kept under ``key``, without loading."""
        with self._lock:
            value = self._values.get(key)
            if value is not None:
                self._values.move_to_end(key)
            return value

    def get(self, key: K, load: Callable[[], V]) -> V:
        """What is kept under ``key``, else the result of ``load``, which runs once for all callers."""
        with self._lock:
            value = self._values.get(key)
            if value is not None:
                self._values.move_to_end(key)
                self.hits += 1
                return value
            future = self._loads.get(key)
            mine = future is None
            if future is None:
                self.misses += 1
                future = self._loads[key] = Future()
            else:
                self.hits += 1
        if not mine:
            return future.result()
        try:
            value = load()
        except BaseException as error:
            with self._lock:
                del self._loads[key]
            future.set_exception(error)
            raise
        with self._lock:
            self._put(key, value)
            del self._loads[key]
        future.set_result(value)
        return value

    def put(self, key: K, value: V) -> None:
        """Keep ``value``."""
        with self._lock:
            self._put(key, value)

    def discard(self, key: K) -> None:
        """Forget ``key``. A load under way is not stopped; its value is kept."""
        with self._lock:
            old = self._values.pop(key, None)
            if old is not None:
                self._used -= self._cost(old)

    def keys(self) -> list[K]:
        """What is kept, least recently used first."""
        with self._lock:
            return list(self._values)

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._values.clear()
            self._used = 0

    def _put(self, key: K, value: V) -> None:
        old = self._values.pop(key, None)
        if old is not None:
            self._used -= self._cost(old)
        self._values[key] = value
        self._used += self._cost(value)
        while self._used > self._capacity and len(self._values) > 1:
            _, gone = self._values.popitem(last=False)
            self._used -= self._cost(gone)
            self.evictions += 1


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
            tail = read_file(path, ref.index_length)
            index = decode_index(key, tail, ref.size, ref.id)
        except OSError:
            return None
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


class MetaCache:
    """Pages and pack indices of the host, by id; ``files`` keeps copies of indices on the local disk."""

    def __init__(self, index_bytes: int, pages: int, files: IndexFiles | None = None) -> None:
        self._files = files
        self.indices: LoadingCache[bytes, PackIndex] = LoadingCache(
            index_bytes, lambda index: index.nbytes + _INDEX_OVERHEAD
        )
        self.pages: LoadingCache[bytes, Page] = LoadingCache(pages, lambda _: 1)

    def index(self, store: ObjectStore, prefix: str, ref: PackRef) -> PackIndex:
        """The index of a pack. Raises CorruptObject, NotFound, StoreError."""
        key = pack_key(prefix, ref.id.hex())
        return self.indices.get(
            ref.id, lambda: fetch_checked(store, key, lambda: self._load_index(store, prefix, ref))
        )

    def forget_index(self, ref: PackRef) -> None:
        """Keep no copy of the index of a pack, here or on the disk."""
        self.indices.discard(ref.id)
        if self._files is not None:
            self._files.forget(ref)

    def add_index(self, ref: PackRef, index: PackIndex, tail: bytes) -> None:
        """Keep the index of a pack that was just put; ``tail`` holds the pack's last bytes."""
        self.indices.put(ref.id, index)
        if self._files is not None:
            self._files.put(ref, tail)

    def page(self, store: ObjectStore, prefix: str, page_id: bytes, local: Path | None = None) -> Page:
        """A manifest page, from the copy in directory ``local`` if it is there."""
        key = page_key(prefix, page_id.hex())
        return self.pages.get(
            page_id, lambda: fetch_checked(store, key, lambda: _load_page(store, prefix, page_id, local))
        )

    def forget_page(self, page_id: bytes, local: Path | None) -> None:
        """Keep no copy of a page, here or in directory ``local``."""
        self.pages.discard(page_id)
        if local is not None:
            with contextlib.suppress(OSError):
                (local / page_id.hex()).unlink()

    def _load_index(self, store: ObjectStore, prefix: str, ref: PackRef) -> PackIndex:
        key = pack_key(prefix, ref.id.hex())
        kept = self._files.get(key, ref) if self._files is not None else None
        if kept is not None:
            return kept
        tail, size = store.get_suffix(key, ref.index_length)
        if size != ref.size:
            raise CorruptObject(key, size, f"the pack has {size} bytes, its manifest says {ref.size}")
        index = decode_index(key, tail, size, ref.id)
        if self._files is not None:
            self._files.put(ref, bytes(tail))
        return index


def _load_page(store: ObjectStore, prefix: str, page_id: bytes, local: Path | None) -> Page:
    name = page_id.hex()
    if local is not None:
        path = local / name
        try:
            return decode_page(str(path), read_file(path, MAX_DOCUMENT), page_id)
        except (OSError, CorruptObject):
            pass  # the store has it
    key = page_key(prefix, name)
    data = store.get(key).data
    page = decode_page(key, data, page_id)
    if local is not None and local.parent.exists():
        with contextlib.suppress(OSError):  # a copy for a start while the store is away
            local.mkdir(exist_ok=True)
            write_file_atomic(local / name, data)
    return page
