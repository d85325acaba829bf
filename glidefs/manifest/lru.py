"""A bounded cache of immutable objects whose loads are shared by whoever waits for the same one."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


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
