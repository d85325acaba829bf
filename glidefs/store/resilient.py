"""The wrapper that makes a store patient: retries, a breaker, and lanes that do not block each other.

A temporary error (the error says whether it is) is retried with exponential backoff and full jitter
(as in Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog) until the deadline of the
call. When the store is down the breaker parks calls; see :mod:`glidefs.store.breaker`. Reads and
writes have a breaker each, because a full disk or a missing permission stops writes alone, and
guest reads must not wait for those.

Each class of traffic has a *lane* with its own limit of concurrent requests, so guest reads never
queue behind uploads or prefetch. A request holds its place only while it runs, not while it
waits for a retry.

A put may be applied and its answer lost. Its retry then meets its own work, as PreconditionFailed: that
error leaves here with ``ambiguous`` set, and who commits must read the key to find out.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Final, Literal, TypeVar

import msgspec
import tenacity

from glidefs.errors import CorruptObject, StoreError, StoreUnavailable, Throttled
from glidefs.store.base import Body, Buffer, Keys, ListPage, Object, ObjectInfo, ObjectStore, body_length
from glidefs.store.breaker import Breaker

T = TypeVar("T")
Kind = Literal["read", "upload", "background"]
Outcome = Literal["ok", "retry", "error"]
MetricsHook = Callable[[str, Outcome, float], None]

MAX_BACKOFF: Final = 1.0
_FIRST_BACKOFF: Final = 0.05
_SLICE: Final = 0.25


class StoreMetrics(msgspec.Struct, frozen=True):
    """Counters since the start. The maps are by operation; bytes are payload; state is the worse one.

    ``errors`` counts failed attempts, ``retries`` those that were tried again, ``waiting`` the
    calls that hold no place and wait (for a place, a retry, or the store).
    """

    requests: Mapping[str, int]
    errors: Mapping[str, int]
    retries: Mapping[str, int]
    bytes_in: int
    bytes_out: int
    waiting: int
    breaker: str
    down_seconds: float


class _Counters:
    def __init__(self) -> None:
        # Guards the counters, for the time of an addition.
        self.lock = threading.Lock()
        self.requests: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.retries: Counter[str] = Counter()
        self.bytes_in = 0
        self.bytes_out = 0
        self.waiting = 0

    def count(self, op: str, *, failed: bool, again: bool = False, got: int = 0, sent: int = 0) -> None:
        with self.lock:
            self.requests[op] += 1
            self.errors[op] += failed
            self.retries[op] += again
            self.bytes_in += got
            self.bytes_out += sent

    def wait(self, change: int) -> None:
        with self.lock:
            self.waiting += change


class _Call:
    """One call of a lane: its deadline, and what became of its attempts."""

    __slots__ = ("key", "last", "op", "sent", "until")

    def __init__(self, op: str, key: str, until: float | None, sent: int) -> None:
        self.op = op
        self.key = key
        self.until = until
        self.sent = sent
        self.last: StoreError | None = None

    def failed(self, error: StoreError) -> None:
        """Note a failed attempt. A put without an answer may be done; so what follows it is ambiguous."""
        if self.op == "put" and (error.temporary or self.last is not None):
            error.ambiguous = True
        self.last = error

    def error(self, why: str) -> StoreUnavailable:
        """The error of a call that ended while it waited."""
        if self.last is not None:
            why = f"{why}; last error: {self.last.why}"
        return StoreUnavailable(
            why, key=self.key, op=self.op, ambiguous=self.last is not None and self.op == "put"
        )

    def gave_up(self, breaker: Breaker) -> StoreUnavailable:
        """The error of a call whose deadline passed."""
        if breaker.is_closed:
            return self.error("the deadline passed")
        return self.error(f"the deadline passed; the store has been down for {breaker.open_for:.0f} s")


class StoreView(ObjectStore):
    """A store seen through one lane: same objects, own concurrency limit and deadline."""

    def __init__(self, owner: ResilientStore, lane: threading.Semaphore, deadline: float | None) -> None:
        self.url = owner.url
        self._owner = owner
        self._inner = owner.inner
        self._lane = lane
        self._deadline = deadline

    def get(self, key: str) -> Object:
        return self._run("get", key, lambda: self._inner.get(key), lambda found: len(found.data))

    def get_range(self, key: str, offset: int, length: int, into: memoryview | None = None) -> Buffer:
        return self._run("get_range", key, lambda: self._inner.get_range(key, offset, length, into), len)

    def get_suffix(self, key: str, length: int) -> tuple[bytes, int]:
        return self._run(
            "get_suffix", key, lambda: self._inner.get_suffix(key, length), lambda found: len(found[0])
        )

    def head(self, key: str) -> ObjectInfo:
        return self._run("head", key, lambda: self._inner.head(key))

    def put(self, key: str, data: Body, *, if_match: str | None = None, if_none_match: bool = False) -> str:
        return self._run(
            "put",
            key,
            lambda: self._inner.put(key, data, if_match=if_match, if_none_match=if_none_match),
            sent=body_length(data),
        )

    def delete(self, key: str) -> None:
        self._run("delete", key, lambda: self._inner.delete(key))

    def list_page(self, prefix: str, token: str = "") -> ListPage:
        return self._run("list", prefix, lambda: self._inner.list_page(prefix, token))

    def list_dirs(self, prefix: str) -> Keys:
        return self._run("list_dirs", prefix, lambda: self._inner.list_dirs(prefix))

    # -- one call ------------------------------------------------------------------------------

    def _run(
        self,
        op: str,
        key: str,
        request: Callable[[], T],
        size: Callable[[T], int] | None = None,
        sent: int = 0,
    ) -> T:
        owner = self._owner
        until = None if self._deadline is None else time.monotonic() + self._deadline
        call = _Call(op, key, until, sent)
        try:
            return self._attempt(call, request, size)
        except StoreError as error:
            if not owner.may_retry(error, until):
                raise
        # Not before the first failure: building this costs as much as the rest of a call.
        owner.pause(random.uniform(0, _FIRST_BACKOFF), until)
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(lambda error: owner.may_retry(error, until)),
            wait=tenacity.wait_random_exponential(multiplier=_FIRST_BACKOFF, max=MAX_BACKOFF),
            sleep=lambda seconds: owner.pause(seconds, until),
            reraise=True,
        )
        result: T = retrying(self._attempt, call, request, size)
        return result

    def _attempt(self, call: _Call, request: Callable[[], T], size: Callable[[T], int] | None) -> T:
        owner = self._owner
        breaker = owner.breaker_of(call.op)
        probe = self._enter(call, breaker)
        started = time.monotonic()
        ok: bool | None = None
        try:
            result = request()
            ok = True
        except StoreError as error:
            # Asking for patience is a sign of life, though none that all is well.
            ok = None if isinstance(error, Throttled) else not error.temporary
            again = owner.may_retry(error, call.until)
            call.failed(error)
            owner.counters.count(call.op, failed=True, again=again)
            owner.report(call.op, "retry" if again else "error", started)
            raise
        except CorruptObject:
            ok = True  # the store answered
            owner.counters.count(call.op, failed=True)
            owner.report(call.op, "error", started)
            raise
        finally:
            if not probe:
                self._lane.release()
            breaker.leave(probe, ok)
        owner.counters.count(call.op, failed=False, got=size(result) if size else 0, sent=call.sent)
        owner.report(call.op, "ok", started)
        return result

    def _enter(self, call: _Call, breaker: Breaker) -> bool:
        """Get past the breaker and into the lane; true for a probe, which takes no place in the lane.

        (Requests that hang may fill the lane, and a probe is what finds out that the store is back.)
        """
        if breaker.is_closed and self._lane.acquire(blocking=False):
            return False
        owner = self._owner
        owner.counters.wait(1)
        try:
            while not breaker.enter(call.until, owner.cancelled):
                left = _SLICE if call.until is None else min(_SLICE, call.until - time.monotonic())
                if self._lane.acquire(timeout=max(left, 0.0)):
                    if breaker.is_closed:
                        return False
                    self._lane.release()
                elif owner.cancelled():
                    raise InterruptedError
                elif left <= 0:
                    raise TimeoutError
            return True
        except TimeoutError:
            raise call.gave_up(breaker) from call.last
        except InterruptedError:
            raise call.error("given up: the daemon is stopping") from call.last
        finally:
            owner.counters.wait(-1)


class ResilientStore(ObjectStore):
    """``inner``, made patient. Itself it reads through the lane of guest reads and writes through uploads.

    ``deadline``: seconds that a call may take with all retries, None for ever. ``reads``, ``writes``
    and ``background`` limit the requests in flight per lane. ``cancel``: an event or callable that
    makes waiting calls raise StoreUnavailable. ``on_metrics(op, outcome, seconds)`` is called after
    each attempt, on the caller's thread.
    """

    def __init__(
        self,
        inner: ObjectStore,
        *,
        deadline: float | None = None,
        reads: int = 32,
        writes: int = 8,
        background: int = 8,
        on_metrics: MetricsHook | None = None,
        cancel: threading.Event | Callable[[], bool] | None = None,
        probe_every: float = 1.0,
    ) -> None:
        self.inner = inner
        self.url = inner.url
        self.counters = _Counters()
        self._deadline = deadline
        self._on_metrics = on_metrics
        self._cancel_event = cancel if isinstance(cancel, threading.Event) else None
        self._cancel_call = cancel if callable(cancel) else None
        self._lanes: dict[Kind, threading.Semaphore] = {
            "read": threading.Semaphore(reads),
            "upload": threading.Semaphore(writes),
            "background": threading.Semaphore(background),
        }
        self._read_breaker = Breaker(probe_every=probe_every)
        self._write_breaker = Breaker(probe_every=probe_every)
        self._reads = self.view("read")
        self._writes = self.view("upload")

    def view(self, kind: Kind, deadline: float | Literal["default"] | None = "default") -> StoreView:
        """The same store with the limits of ``kind``; ``deadline`` replaces the store's own."""
        return StoreView(self, self._lanes[kind], self._deadline if deadline == "default" else deadline)

    def metrics(self) -> StoreMetrics:
        """A copy of the counters."""
        breakers = (self._read_breaker, self._write_breaker)
        worst = max(breakers, key=lambda breaker: breaker.open_for)
        counters = self.counters
        with counters.lock:
            return StoreMetrics(
                requests=dict(counters.requests),
                errors=dict(counters.errors),
                retries=dict(counters.retries),
                bytes_in=counters.bytes_in,
                bytes_out=counters.bytes_out,
                waiting=counters.waiting,
                breaker=worst.state,
                down_seconds=worst.open_for,
            )

    # -- for the views -------------------------------------------------------------------------

    def breaker_of(self, op: str) -> Breaker:
        """The breaker that requests of ``op`` go through."""
        return self._write_breaker if op in ("put", "delete") else self._read_breaker

    def cancelled(self) -> bool:
        """Have waiting calls been told to give up?"""
        if self._cancel_event is not None:
            return self._cancel_event.is_set()
        return self._cancel_call is not None and self._cancel_call()

    def may_retry(self, error: BaseException, until: float | None) -> bool:
        """Is the error temporary, and is there time left?"""
        if not (isinstance(error, StoreError) and error.temporary) or self.cancelled():
            return False
        return until is None or time.monotonic() < until

    def pause(self, seconds: float, until: float | None) -> None:
        """Sleep, no longer than ``until`` and only until cancelled."""
        end = time.monotonic() + seconds
        if until is not None:
            end = min(end, until)
        while (left := end - time.monotonic()) > 0 and not self.cancelled():
            if self._cancel_event is not None:
                self._cancel_event.wait(left)
            else:
                time.sleep(min(left, _SLICE))

    def report(self, op: str, outcome: Outcome, started: float) -> None:
        """Tell the hook of an attempt that began at ``started``."""
        if self._on_metrics is not None:
            self._on_metrics(op, outcome, time.monotonic() - started)

    # -- the protocol --------------------------------------------------------------------------

    def get(self, key: str) -> Object:
        return self._reads.get(key)

    def get_range(self, key: str, offset: int, length: int, into: memoryview | None = None) -> Buffer:
        return self._reads.get_range(key, offset, length, into)

    def get_suffix(self, key: str, length: int) -> tuple[bytes, int]:
        return self._reads.get_suffix(key, length)

    def head(self, key: str) -> ObjectInfo:
        return self._reads.head(key)

    def put(self, key: str, data: Body, *, if_match: str | None = None, if_none_match: bool = False) -> str:
        return self._writes.put(key, data, if_match=if_match, if_none_match=if_none_match)

    def delete(self, key: str) -> None:
        self._writes.delete(key)

    def list_page(self, prefix: str, token: str = "") -> ListPage:
        return self._reads.list_page(prefix, token)

    def list_dirs(self, prefix: str) -> Keys:
        return self._reads.list_dirs(prefix)

    def close(self) -> None:
        self.inner.close()
