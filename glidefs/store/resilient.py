"""The wrapper that makes a store patient: retries, a breaker, and lanes that do not block each other.

A temporary error (the error says whether it is) is retried with exponential backoff and full jitter (as in
Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog) until the deadline of the call. When the
store is down the breaker parks calls; see :mod:`glidefs.store.breaker`. Reads and writes have a breaker each,
because a full disk or a missing permission stops only writes, and guest reads must not wait for those.

Each class of traffic has a *lane* with its own limit of concurrent requests, so guest reads never
queue behind uploads or prefetch. A request holds its place only while it runs, not while it
waits for a retry.

Whether the store is there is judged in one place for all lanes: the first request that works, whichever it
is, shows that it is back. The log has a line when it goes away, one when it is back, and one for what waits
for long (:mod:`glidefs.store.state`). An absence is believed only from the store that is meant: where
``identity`` is set, it is asked which one it is: before the first request, again after each trouble, and
before an absence is believed (:mod:`glidefs.store.which`).

A put may be applied and its answer lost. Its retry then meets its own work, as PreconditionFailed: that error
leaves here with ``ambiguous`` set, and the committer must read the key to find out.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from typing import Final, Literal, TypeVar

import tenacity

from glidefs.errors import CorruptObject, NotFound, StoreError, Throttled
from glidefs.events import happened
from glidefs.store.base import (
    Body,
    Buffer,
    Keys,
    ListPage,
    Object,
    ObjectInfo,
    ObjectStore,
    Source,
    body_length,
)
from glidefs.store.breaker import Breaker
from glidefs.store.call import Call, Kind
from glidefs.store.counters import Counters, StoreMetrics
from glidefs.store.state import StoreState, Waits, waiting
from glidefs.store.which import WhichStore

log = logging.getLogger(__name__)

T = TypeVar("T")
Outcome = Literal["ok", "retry", "error"]
MetricsHook = Callable[[str, Outcome, float], None]

WRITES: Final = ("put", "delete")
PROVEN: Final = ("get_range", "get_suffix")
"""What they read, ids and hashes vouch for."""
MAX_BACKOFF: Final = 1.0
_FIRST_BACKOFF: Final = 0.05
_SLICE: Final = 0.25
NEWS_AFTER: Final = 2.0
_ANSWER: Final = 2.0
"""Seconds that the store has to say whether it is there."""


class StoreView(ObjectStore):
    """A store seen through one lane: same objects, own concurrency limit and deadline."""

    def __init__(
        self, owner: ResilientStore, kind: Kind, lane: threading.Semaphore, deadline: float | None
    ) -> None:
        self.url = owner.url
        self._owner = owner
        self._inner = owner.inner
        self._kind: Kind = kind
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

    def source(self, key: str) -> Source | None:
        """None also while each answer is to be looked at: after trouble, or if it may be another store."""
        owner = self._owner
        if not owner.breaker_of("get_range").is_closed:
            return None
        if owner.identity is not None and not owner.identity.verified:
            return None
        return self._inner.source(key)

    def prepare(self, key: str) -> None:
        self._inner.prepare(key)

    def carried(self, gets: int, got: int, seconds: float, *, failed: bool) -> None:
        """What came of requests to a source that this view named: ``gets`` were answered, ``got`` bytes.

        One that ``failed`` is asked of the store again, which then judges.
        """
        owner = self._owner
        started = time.monotonic() - seconds
        for i in range(gets):
            owner.counters.count("get_range", started, got=0 if i else got)
            owner.report("get_range", "ok", started)
        if failed:
            owner.counters.count("get_range", started, failed="a range was not to be had", again=True)
            owner.report("get_range", "retry", started)
        elif gets:
            owner.settle(owner.breaker_of("get_range"), False, True, "")

    def forget(self, key: str) -> None:
        self._inner.forget(key)

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
        call = Call(self._kind, op, key, until, sent)
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

    def _attempt(self, call: Call, request: Callable[[], T], size: Callable[[T], int] | None) -> T:
        owner = self._owner
        breaker = owner.breaker_of(call.op)
        probe = self._enter(call, breaker)
        started = time.monotonic()
        ok: bool | None = None
        reason = ""
        try:
            result = self._believed(call.op, request)
            ok = True
        except StoreError as error:
            if owner.patient and error.waits:
                error.temporary = True
            # Asking for patience is a sign of life, though none that all is well.
            ok = None if isinstance(error, Throttled) else not error.temporary
            again = owner.may_retry(error, call.until)
            reason = str(error)
            call.failed(error)
            if error.temporary:
                call.waits(owner.waits, reason)
            owner.counters.count(call.op, started, failed=reason, again=again)
            owner.report(call.op, "retry" if again else "error", started)
            raise
        except CorruptObject as error:
            ok = True  # the store answered
            owner.counters.count(call.op, started, failed=str(error))
            owner.report(call.op, "error", started)
            raise
        finally:
            if not probe:
                self._lane.release()
            owner.settle(breaker, probe, ok, reason)
            if ok and owner.waits.any:
                owner.waits.served(waiting(call.kind, call.op, call.key))
        owner.counters.count(call.op, started, got=size(result) if size else 0, sent=call.sent)
        owner.report(call.op, "ok", started)
        return result

    def _believed(self, op: str, request: Callable[[], T]) -> T:
        """The answer of the store that is meant; which it is is asked again before an absence is believed."""
        identity = self._owner.identity
        if identity is None:
            return request()
        identity.ensure(self._inner, writes=op in WRITES, proven=op in PROVEN)
        try:
            result = request()
        except NotFound:
            identity.check(self._inner)
            raise
        except StoreError as error:
            if error.temporary:
                identity.doubt(error)
            raise
        if result == [] or result == _EMPTY_PAGE:
            identity.check(self._inner)
        return result

    def _enter(self, call: Call, breaker: Breaker) -> bool:
        """Get past the breaker and into the lane; true for a probe, which takes no place in the lane.

        (Requests that hang may fill the lane, and a probe is what finds out that the store is back.)
        """
        if breaker.is_closed and self._lane.acquire(blocking=False):
            return False
        owner = self._owner
        owner.counters.wait(1)
        try:
            while True:
                if self._passed(call, breaker):
                    return True
                left = _SLICE if call.until is None else min(_SLICE, call.until - time.monotonic())
                if self._lane.acquire(timeout=max(left, 0.0)):
                    if breaker.is_closed:
                        return False
                    self._lane.release()
                elif owner.cancelled():
                    raise InterruptedError
                elif left <= 0:
                    raise TimeoutError
                else:
                    call.waits(owner.waits, f"all requests that {call.kind} may make are under way")
        except TimeoutError:
            raise call.gave_up(breaker) from call.last
        except InterruptedError:
            raise call.error("given up: the daemon is stopping") from call.last
        finally:
            owner.counters.wait(-1)

    def _passed(self, call: Call, breaker: Breaker) -> bool:
        """Wait for the breaker; true if the call is a probe. Raises TimeoutError, InterruptedError."""
        while True:
            try:
                return breaker.enter(call.look(), self._owner.cancelled)
            except TimeoutError:
                opened = breaker.opened()
                call.waits(self._owner.waits, opened[1] if opened else "")
                if call.is_over():
                    raise


_EMPTY_PAGE = ListPage(())


class ResilientStore(ObjectStore):
    """``inner``, made patient. Itself it reads through the lane of guest reads and writes through uploads.

    ``deadline``: seconds that a call may take with all retries, None for ever. ``reads``, ``writes``
    and ``background`` limit the requests in flight per lane. ``cancel``: an event or callable that
    makes waiting calls raise StoreUnavailable. ``on_metrics(op, outcome, seconds)`` is called after
    each attempt, on the caller's thread.

    ``patient`` is set by a daemon once the store was tried: from then on a store that refuses (no access, no
    bucket, a request that it does not know) is one that has trouble, and callers wait.
    ``identity`` knows which store is meant; None asks nobody.
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
        self.counters = Counters()
        self.waits = Waits()
        self.news_after = NEWS_AFTER
        """Seconds that the store is away before that is said."""
        self.patient = False
        self.identity: WhichStore | None = None
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
        # Guards what was said last; held while it is said, so that lines come in their order.
        self._saying = threading.Lock()
        self._said_away = 0.0
        self._reads = self.view("read")
        self._writes = self.view("upload")

    def view(self, kind: Kind, deadline: float | Literal["default"] | None = "default") -> StoreView:
        """The same store with the limits of ``kind``; ``deadline`` replaces the store's own."""
        return StoreView(self, kind, self._lanes[kind], self._deadline if deadline == "default" else deadline)

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
                seconds=dict(counters.seconds),
                last_error=counters.last_error,
                last_error_at=counters.last_error_at,
            )

    @property
    def is_new_directory(self) -> bool:
        """Whether it is a directory that no host has used yet, as far as this one knows."""
        return self.url.startswith("file:") and self.identity is not None and self.identity.expected is None

    @property
    def away(self) -> bool:
        """The same as ``state.away``, for whoever asks often."""
        return not (self._read_breaker.is_closed and self._write_breaker.is_closed)

    @property
    def state(self) -> StoreState:
        """Whether the store serves, by the requests of all lanes."""
        wait, why = self.waits.longest()
        opened = [found for b in (self._read_breaker, self._write_breaker) if (found := b.opened())]
        if not opened:
            return StoreState(longest_wait=wait, wait_reason=why)
        since, reason = min(opened)
        return StoreState(True, since, reason, wait, why)

    def answers(self, patience: float = _ANSWER) -> bool:
        """Ask the store now whether it answers, whatever is known. For a caller that is about to give it up.

        If so, whoever waits for it goes on.
        """
        if not self.away:
            return True
        until = time.monotonic() + patience
        while True:
            try:
                self.inner.list_page(".probe/")
            except StoreError as error:
                if time.monotonic() + _SLICE > until:
                    log.warning("the store does not answer: %s", error)
                    return False
                time.sleep(_SLICE)
                continue
            for breaker in (self._read_breaker, self._write_breaker):
                self.settle(breaker, False, True, "")
            return True

    # -- for the views -------------------------------------------------------------------------

    def breaker_of(self, op: str) -> Breaker:
        """The breaker that requests of ``op`` go through."""
        return self._write_breaker if op in WRITES else self._read_breaker

    def settle(self, breaker: Breaker, probe: bool, ok: bool | None, reason: str) -> None:
        """An attempt ended: tell both breakers, and say so if the store went away or is back."""
        changed = breaker.leave(probe, ok, reason)
        if ok:
            other = self._read_breaker if breaker is self._write_breaker else self._write_breaker
            if not other.is_closed:
                changed |= other.hear(hurry=changed)
        # A store that fails now and then is away for moments: that is no news, what lasts is.
        if changed or (ok is False and not self._said_away and breaker.open_for >= self.news_after):
            self._say()

    def _say(self) -> None:
        with self._saying:
            state = self.state
            lasts = max(self._read_breaker.open_for, self._write_breaker.open_for)
            if state.away and not self._said_away and lasts >= self.news_after:
                self._said_away = time.monotonic() - lasts
                happened("store-away", f"the store is away; what needs it waits: {state.reason}")
            elif not state.away and self._said_away:
                seconds = time.monotonic() - self._said_away
                self._said_away = 0.0
                happened("store-back", f"the store is back after {seconds:.1f} s", seconds=seconds)

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

    def source(self, key: str) -> Source | None:
        return self._reads.source(key)

    def prepare(self, key: str) -> None:
        self.inner.prepare(key)

    def forget(self, key: str) -> None:
        self.inner.forget(key)

    def close(self) -> None:
        self.inner.close()
