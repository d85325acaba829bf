"""The bases that this host forks from: manifests and hot sets, cached, loaded ahead and checked.

A base never changes, but it may be removed, and its packs are collected a grace period later. So a
host that forks from memory asks the store within a quarter of that period whether the base is still
there; one that cannot ask starts no more forks of it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

import msgspec

from glidefs import clock
from glidefs.bases.stored import StoredBase, read_base
from glidefs.errors import GlideError, NotFound, StoreError, UnknownExport
from glidefs.formats.hot_set import HotSet, decode_hot_set, encode_hot_set
from glidefs.manifest.cache import LoadingCache
from glidefs.names import base_manifest_key, bases_prefix, check_name, hot_set_key
from glidefs.store.base import ObjectStore, dir_name
from glidefs.store.checked import get_checked
from glidefs.store.resilient import ResilientStore

log = logging.getLogger(__name__)

PATIENCE = 30.0
"""Seconds that the store may take to give a base."""
WARM_THREADS = 8
MAX_PAUSE = 3600.0


CAPACITY = 64

T = TypeVar("T")


class CacheStats(msgspec.Struct, frozen=True, kw_only=True):
    """Counts since the start; ``load_seconds`` is the time that ``loads`` took together."""

    entries: int
    capacity: int
    hits: int
    misses: int
    evictions: int
    loads: int
    failures: int
    load_seconds: float


class ManifestCache(Generic[T]):
    """At most ``capacity`` values by (prefix, base); least recently used goes first.

    Concurrent callers for a name that is absent share one load. What a load raises goes to all of
    them and is not kept. Thread-safe.
    """

    def __init__(self, load: Callable[[str, str], T], capacity: int = CAPACITY) -> None:
        self.capacity = capacity
        self._load = load
        self._cache: LoadingCache[tuple[str, str], T] = LoadingCache(capacity, lambda _: 1)
        self._loads = 0
        self._failures = 0
        self._load_seconds = 0.0

    def get(self, prefix: str, base: str) -> T:
        """The value of a base: the kept one, else a loaded one. Raises what the load raises."""
        return self._cache.get((prefix, base), lambda: self._timed(prefix, base))

    def _timed(self, prefix: str, base: str) -> T:
        began = time.monotonic()
        try:
            value = self._load(prefix, base)
        except BaseException:
            self._failures += 1
            raise
        finally:
            # Several loads may end at once and lose a count: these are figures for people.
            self._loads += 1
            self._load_seconds += time.monotonic() - began
        return value

    def peek(self, prefix: str, base: str) -> T | None:
        """What is kept, without a load."""
        return self._cache.peek((prefix, base))

    def put(self, prefix: str, base: str, value: T) -> None:
        """Keep a value that was found out otherwise."""
        self._cache.put((prefix, base), value)

    def discard(self, prefix: str, base: str) -> None:
        """Forget a base."""
        self._cache.discard((prefix, base))

    def names(self) -> list[tuple[str, str]]:
        """(prefix, base) of what is kept, least recently used first."""
        return self._cache.keys()

    @property
    def room(self) -> int:
        """How many more values fit before one must go."""
        return max(0, self.capacity - len(self._cache))

    def stats(self) -> CacheStats:
        """Figures for metrics."""
        cache = self._cache
        return CacheStats(
            entries=len(cache),
            capacity=self.capacity,
            hits=cache.hits,
            misses=cache.misses,
            evictions=cache.evictions,
            loads=self._loads,
            failures=self._failures,
            load_seconds=self._load_seconds,
        )


class BaseLibrary:
    """Two caches, filled on demand and at the start. Thread-safe.

    ``_lock`` guards the times of the last checks; it is held for look-ups only. ``grace`` is the
    collector's, in seconds.
    """

    def __init__(
        self,
        store: ResilientStore,
        *,
        grace: float,
        stopping: threading.Event,
        capacity: int = CAPACITY,
    ) -> None:
        self._reads = store.view("read", PATIENCE)
        self._background = store.view("background", PATIENCE)
        self._uploads = store.view("upload", PATIENCE)
        self._grace = grace
        self._stopping = stopping
        self._lock = threading.Lock()
        self._checked: dict[tuple[str, str], float] = {}
        self._thread: threading.Thread | None = None
        self.manifests: ManifestCache[StoredBase] = ManifestCache(self._load, capacity)
        self.hot_sets: ManifestCache[HotSet] = ManifestCache(self._load_hot_set, capacity)

    # -- for forks -------------------------------------------------------------------------------

    def get(self, prefix: str, base: str) -> StoredBase:
        """The base to fork from; from memory alone if it was checked lately.

        Raises UnknownExport (also of a base that was removed), CorruptObject, StoreError.
        """
        found = self.manifests.get(prefix, check_name("base", base))
        if self._age(prefix, base) > self._grace / 4:
            found = self._check(self._reads, prefix, base, found)
        return found

    def hot_set(self, prefix: str, base: str) -> HotSet:
        """Its hot set; one without runs where it has none. Raises as :meth:`get`."""
        return self.hot_sets.get(prefix, check_name("base", base))

    def store_hot_set(self, prefix: str, base: str, hot_set: HotSet) -> None:
        """Put a hot set beside a base, over one that is there. Raises StoreError."""
        key = hot_set_key(prefix, base)
        self._uploads.put(key, encode_hot_set(hot_set, key))
        self.hot_sets.put(prefix, base, hot_set)

    def forget(self, prefix: str, base: str) -> None:
        """The base was removed."""
        self.manifests.discard(prefix, base)
        self.hot_sets.discard(prefix, base)

    def stats(self) -> dict[str, CacheStats]:
        """Figures of both caches, for metrics."""
        return {"manifest": self.manifests.stats(), "hot_set": self.hot_sets.stats()}

    # -- loads -----------------------------------------------------------------------------------

    def _load(self, prefix: str, base: str) -> StoredBase:
        began = clock.elapsed()
        found = read_base(self._reads, prefix, base)
        self._note(prefix, base, began)
        return found

    def _load_hot_set(self, prefix: str, base: str) -> HotSet:
        of = self.manifests.get(prefix, base)
        key = hot_set_key(prefix, base)
        try:
            hot_set, _ = get_checked(self._background, key, decode_hot_set)
        except NotFound:
            return HotSet(of.manifest_hash)
        if hot_set.manifest_hash != of.manifest_hash:
            log.warning("base %s: its hot set is of another manifest and is not used", base)
            return HotSet(of.manifest_hash)
        return hot_set

    def _note(self, prefix: str, base: str, when: float) -> None:
        with self._lock:
            self._checked[prefix, base] = when

    def _age(self, prefix: str, base: str) -> float:
        with self._lock:
            return clock.elapsed() - self._checked.get((prefix, base), float("-inf"))

    def _check(self, store: ObjectStore, prefix: str, base: str, known: StoredBase) -> StoredBase:
        """Ask whether the base is still the one that is kept. Raises UnknownExport, StoreError."""
        began = clock.elapsed()
        try:
            if store.head(base_manifest_key(prefix, base)).etag != known.etag:
                known = read_base(store, prefix, base)
                self.forget(prefix, base)
                self.manifests.put(prefix, base, known)
        except (NotFound, UnknownExport):
            self.forget(prefix, base)
            raise UnknownExport(base, "the base was removed; 'glidefs bases' shows what there is") from None
        empty = self.hot_sets.peek(prefix, base)
        if empty is not None and not empty.runs:
            self.hot_sets.discard(prefix, base)  # it may have been profiled since
        self._note(prefix, base, began)
        return known

    # -- in the background -------------------------------------------------------------------------

    def start(self, prefixes: Callable[[], Iterable[str]], exports_known: threading.Event) -> None:
        """Warm up once the exports of this host are known, then look after what is kept."""
        self._thread = threading.Thread(
            target=self._run, args=(prefixes, exports_known), name="bases", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Join the thread; ``stopping`` is set."""
        if self._thread is not None:
            self._thread.join()

    def _run(self, prefixes: Callable[[], Iterable[str]], exports_known: threading.Event) -> None:
        while not exports_known.wait(0.5):
            if self._stopping.is_set():
                return
        try:
            self.warm(prefixes())
            while not self._stopping.wait(min(self._grace / 16, MAX_PAUSE)):
                self.check_all()
        except Exception:
            log.exception("bases are no longer checked in the background; forks ask the store themselves")

    def warm(self, prefixes: Iterable[str]) -> int:
        """Load the bases of ``prefixes`` while there is room, eight at a time; returns how many."""
        known = set(self.manifests.names())
        found: list[tuple[str, str]] = []
        errors: list[str] = []
        for prefix in dict.fromkeys(prefixes):
            try:
                names = [dir_name(path) for path in self._background.list_dirs(bases_prefix(prefix))]
            except StoreError as error:
                errors.append(str(error))
                continue
            found += [(prefix, name) for name in names if (prefix, name) not in known]
        wanted = found[: self.manifests.room]
        with ThreadPoolExecutor(WARM_THREADS, "warm-bases") as pool:
            results = list(pool.map(self._warm, wanted))
        errors += [error for error in results if error]
        if errors:
            log.warning("%d bases were not loaded beforehand; one of them: %s", len(errors), errors[0])
        return len(wanted) - sum(map(bool, results))

    def _warm(self, name: tuple[str, str]) -> str:
        """Load one base; the reason why not, if so."""
        try:
            if not self._stopping.is_set():
                self.manifests.get(*name)
                self.hot_sets.get(*name)
        except UnknownExport:
            pass  # removed, or an empty directory that the provider still lists
        except GlideError as error:
            return str(error)
        return ""

    def check_all(self) -> None:
        """Ask for every base that was not checked for an eighth of the grace period."""
        errors: list[str] = []
        for prefix, base in self.manifests.names():
            known = self.manifests.peek(prefix, base)
            if known is None or self._age(prefix, base) < self._grace / 8 or self._stopping.is_set():
                continue
            try:
                self._check(self._background, prefix, base, known)
            except UnknownExport:
                log.info("base %s of prefix %s was removed", base, prefix)
            except GlideError as error:
                errors.append(str(error))
        if errors:
            log.warning("%d bases could not be checked; one of them: %s", len(errors), errors[0])
