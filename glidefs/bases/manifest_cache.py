"""Shared frozen manifests and hot sets of bases, so that nothing about a base is fetched twice.

A base never changes after bless. So what a fork needs of it is kept by name, and a hit is the same
object again: no copy, no parse, no request. One instance holds manifests, another hot sets.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Generic, TypeVar

import msgspec

from glidefs.manifest.lru import LoadingCache

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
