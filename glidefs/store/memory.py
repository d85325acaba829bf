"""A store in this process's memory, for tests, with the faults that tests inject.

Faults are set on the store and act on the requests that follow: an outage, a delay, errors for the
next requests, and requests that are applied but whose answer is lost (the case behind every
ambiguous conditional put).
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque

from glidefs.errors import CorruptObject, NotFound, PreconditionFailed, StoreError, StoreUnavailable
from glidefs.store.base import (
    LIST_PAGE,
    Body,
    Keys,
    ListPage,
    Object,
    ObjectInfo,
    ObjectStore,
    check_condition,
    check_key,
    check_list_prefix,
    check_range,
    join_body,
)


class MemoryStore(ObjectStore):
    """Objects in a dictionary. ``requests`` counts calls by operation, also those that failed."""

    def __init__(self, url: str = "memory://") -> None:
        self.url = url
        self.requests: Counter[str] = Counter()
        self.latency = 0.0
        """Seconds that every request takes."""
        self.list_limit = LIST_PAGE
        # Guards all of the state below.
        self._lock = threading.Lock()
        self._objects: dict[str, tuple[bytes, ObjectInfo]] = {}
        self._generation = 0
        self._down = False
        self._failures: dict[str, deque[StoreError]] = {}
        self._lost: Counter[str] = Counter()

    def set_down(self, down: bool) -> None:
        """Begin or end an outage: while down every request raises StoreUnavailable."""
        self._down = down

    def fail_next(self, op: str, *errors: StoreError) -> None:
        """The next requests of ``op`` raise these errors, one each, without being applied."""
        with self._lock:
            self._failures.setdefault(op, deque()).extend(errors)

    def lose_answers(self, op: str, count: int = 1) -> None:
        """The next ``count`` requests of ``op`` are applied, and then raise StoreUnavailable."""
        with self._lock:
            self._lost[op] += count

    def _enter(self, op: str, key: str) -> None:
        with self._lock:
            self.requests[op] += 1
            failures = self._failures.get(op)
            failure = failures.popleft() if failures else None
        if self.latency:
            time.sleep(self.latency)
        if failure is not None:
            raise failure
        if self._down:
            raise StoreUnavailable("the store is down", key=key, op=op)

    def _leave(self, op: str, key: str) -> None:
        if not self._lost[op]:
            return
        with self._lock:
            if not self._lost[op]:
                return
            self._lost[op] -= 1
        raise StoreUnavailable("the answer was lost", key=key, op=op)

    def _find(self, key: str, op: str) -> tuple[bytes, ObjectInfo]:
        self._enter(op, check_key(key, op))
        with self._lock:
            found = self._objects.get(key)
        if found is None:
            raise NotFound(key=key, op=op)
        self._leave(op, key)
        return found

    def get(self, key: str) -> Object:
        data, info = self._find(key, "get")
        return Object(data, info.etag)

    def get_range(self, key: str, offset: int, length: int, into: memoryview | None = None) -> bytes:
        check_range(key, offset, length)
        data, _ = self._find(key, "get_range")
        if offset + length > len(data):
            raise CorruptObject(key, len(data), "the object ends before the range that was asked for")
        return data[offset : offset + length]

    def get_suffix(self, key: str, length: int) -> tuple[bytes, int]:
        check_range(key, 0, length)
        data, _ = self._find(key, "get_suffix")
        return data[-length:], len(data)

    def head(self, key: str) -> ObjectInfo:
        return self._find(key, "head")[1]

    def put(self, key: str, data: Body, *, if_match: str | None = None, if_none_match: bool = False) -> str:
        check_condition(key, if_match, if_none_match)
        body = join_body(data)
        self._enter("put", check_key(key, "put"))
        with self._lock:
            old = self._objects.get(key)
            if (if_none_match and old) or (if_match is not None and (not old or old[1].etag != if_match)):
                raise PreconditionFailed(key=key, op="put")
            self._generation += 1
            etag = f'"{self._generation:x}"'
            self._objects[key] = (body, ObjectInfo(key, len(body), etag, time.time()))
        self._leave("put", key)
        return etag

    def delete(self, key: str) -> None:
        self._enter("delete", check_key(key, "delete"))
        with self._lock:
            self._objects.pop(key, None)
        self._leave("delete", key)

    def list_page(self, prefix: str, token: str = "") -> ListPage:
        self._enter("list", check_list_prefix(prefix))
        with self._lock:
            keys = sorted(key for key in self._objects if key.startswith(prefix) and key > token)
            infos = tuple(self._objects[key][1] for key in keys[: self.list_limit])
        self._leave("list", prefix)
        return ListPage(infos, infos[-1].key if len(keys) > len(infos) else "")

    def list_dirs(self, prefix: str) -> Keys:
        self._enter("list_dirs", check_list_prefix(prefix, "list_dirs"))
        with self._lock:
            keys = list(self._objects)
        rests = (key[len(prefix) :] for key in keys if key.startswith(prefix))
        self._leave("list_dirs", prefix)
        return sorted({prefix + rest.split("/", 1)[0] + "/" for rest in rests if "/" in rest})


_registry: dict[str, MemoryStore] = {}
_registry_lock = threading.Lock()


def shared_memory_store(name: str) -> MemoryStore:
    """The store of that name in this process: one object, whoever asks."""
    with _registry_lock:
        store = _registry.get(name)
        if store is None:
            store = _registry[name] = MemoryStore(f"memory://{name}")
        return store


def forget_memory_stores() -> None:
    """Drop all shared stores (between tests)."""
    with _registry_lock:
        _registry.clear()
