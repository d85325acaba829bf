"""A store that fails: the fault layer between any object store and the patient one of the product.

Which request fails, and how, is drawn from a random source, so the same requests in the same order meet the
same faults. Time is the caller's: a latency is told to a clock that the caller gives, which need not be a
real one.

| fault | what the caller sees | what the store did |
|---|---|---|
| error | StoreUnavailable | nothing |
| throttled | Throttled | nothing |
| denied | AccessDenied, which nobody retries at once | nothing |
| conflict | Conflict, of a conditional put | nothing |
| lost | StoreUnavailable, of a put or delete | all of it |
| late | StoreUnavailable, of a put or delete | nothing yet; all of it some seconds later, if it still may |
| slow | nothing, or a time-out if the body took longer than clients wait | a put that timed out was applied |
| truncated | StoreUnavailable, some of the body was received (or sent) | nothing |
| stale | a listing without some of the newest objects, and with some that were deleted lately | |
| down | StoreUnavailable for as long as an outage lasts | nothing |
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeVar

import msgspec

from glidefs.errors import AccessDenied, Conflict, NotFound, StoreUnavailable, Throttled
from glidefs.store.base import Body, Buffer, Keys, ListPage, Object, ObjectInfo, ObjectStore, join_body

T = TypeVar("T")

KINDS = ("error", "throttled", "denied", "conflict", "lost", "late", "slow", "truncated", "stale")
BODIES = ("get", "get_range", "get_suffix", "put")
LISTS = ("list", "list_dirs")
CLIENT_TIMEOUT = 10.0
"""Seconds after which a client gives a body up."""


class Crash(BaseException):
    """The process ends here. Whatever runs on the way out of it did not happen."""


class Timer(Protocol):
    """The clock that latencies are told to; `now` in seconds."""

    now: float

    def sleep(self, seconds: float) -> None: ...


class FaultPlan(msgspec.Struct, kw_only=True):
    """Probabilities by kind for each request that the kind fits, and seconds.

    ``latency``: of every request at most. ``slow``: of a slow body at most. ``lag``: how long a listing
    may be stale, and a late request late. ``down_until``: the end of the outage that there is, if any.
    """

    rates: dict[str, float] = {}
    latency: float = 0.02
    slow: float = 20.0
    lag: float = 5.0
    down_until: float = 0.0


class Recent(NamedTuple):
    """A change of the last seconds: what listings may not show yet. ``info`` is that of a deleted object."""

    when: float
    key: str
    info: ObjectInfo | None


class Latecomer(NamedTuple):
    """A request whose answer never came, and that takes effect at ``due``."""

    due: float
    apply: Callable[[], object]


class Backlog:
    """What the stores over one inner store share: recent changes, and requests that are late."""

    def __init__(self, clock: Timer) -> None:
        self.clock = clock
        self.recent: list[Recent] = []
        self.late: list[Latecomer] = []

    def note(self, key: str, info: ObjectInfo | None, lag: float) -> None:
        now = self.clock.now
        self.recent = [change for change in self.recent if change.when > now - lag]
        self.recent.append(Recent(now, key, info))

    def catch_up(self) -> None:
        """Apply what is due by now."""
        due = [one for one in self.late if one.due <= self.clock.now]
        self.late = [one for one in self.late if one.due > self.clock.now]
        for one in sorted(due, key=lambda one: one.due):
            one.apply()


def _no_hook(op: str, key: str) -> None:
    return


class FaultyStore(ObjectStore):
    """``inner``, seen over a network and through a client that both fail as ``plan`` says.

    ``before`` and ``after`` are called around what a request does to the inner store, also where the
    answer is lost; both may raise. ``told(op, key, outcome)`` hears of each request, ``sent(key, body)`` of
    each put before it. ``counts`` are the faults by kind.
    """

    def __init__(
        self,
        inner: ObjectStore,
        clock: Timer,
        rng: random.Random,
        plan: FaultPlan,
        backlog: Backlog | None = None,
    ) -> None:
        self.inner = inner
        self.url = inner.url
        self.plan = plan
        self.counts: Counter[str] = Counter()
        self.before: Callable[[str, str], None] = _no_hook
        self.after: Callable[[str, str], None] = _no_hook
        self.told: Callable[[str, str, str], None] = lambda op, key, outcome: None
        self.sent: Callable[[str, bytes], None] = lambda key, body: None
        self._clock = clock
        self._rng = rng
        self._last = ""
        self._backlog = backlog if backlog is not None else Backlog(clock)

    # -- one request ---------------------------------------------------------------------------------

    def _request(
        self,
        op: str,
        key: str,
        apply: Callable[[], T],
        *,
        conditional: bool = False,
        torn: Callable[[], None] = lambda: None,
    ) -> T:
        """``apply`` does it; ``torn`` leaves what a body that ends early leaves."""
        self._clock.sleep(self._rng.uniform(0, self.plan.latency))
        self._backlog.catch_up()
        self.before(op, key)
        if self._clock.now < self.plan.down_until:
            raise self._failure("down", op, key, StoreUnavailable("the store is down", key=key, op=op))
        kind = self._last = self._draw(op, key, conditional)
        if kind == "error":
            raise self._failure(kind, op, key, StoreUnavailable("an internal error", key=key, op=op))
        if kind == "throttled":
            raise self._failure(kind, op, key, Throttled(key=key, op=op))
        if kind == "denied":
            raise self._failure(kind, op, key, AccessDenied(key=key, op=op))
        if kind == "conflict":
            raise self._failure(kind, op, key, Conflict(key=key, op=op))
        if kind == "truncated":
            torn()
            raise self._failure(kind, op, key, StoreUnavailable("the connection ended", key=key, op=op))
        if kind == "late":
            due = self._clock.now + self._rng.uniform(0, self.plan.lag)
            self._backlog.late.append(Latecomer(due, lambda: _whatever(apply)))
            raise self._failure(kind, op, key, StoreUnavailable("no answer", key=key, op=op))
        return self._answer(kind, op, key, apply, torn)

    def _answer(self, kind: str, op: str, key: str, apply: Callable[[], T], torn: Callable[[], None]) -> T:
        """The request gets through; its answer may not."""
        took = self._rng.uniform(0, self.plan.slow) if kind == "slow" else 0.0
        if took > CLIENT_TIMEOUT and op != "put":
            self._clock.sleep(CLIENT_TIMEOUT)
            torn()
            raise self._failure(kind, op, key, StoreUnavailable("timed out", key=key, op=op))
        try:
            result = apply()
        except Exception as error:
            self.told(op, key, type(error).__name__)
            raise
        self._clock.sleep(took)
        self.after(op, key)
        if kind == "lost" or took > CLIENT_TIMEOUT:
            raise self._failure(kind, op, key, StoreUnavailable("the answer was lost", key=key, op=op))
        if kind:
            self.counts[kind] += 1
        self.told(op, key, kind or "ok")
        return result

    def _failure(self, kind: str, op: str, key: str, error: Exception) -> Exception:
        self.counts[kind] += 1
        self.told(op, key, kind)
        return error

    def _draw(self, op: str, key: str, conditional: bool) -> str:
        """The kind of fault that this request meets, empty for none."""
        at = self._rng.random()
        for kind in KINDS:
            rate = self.plan.rates.get(kind, 0.0)
            if rate and self._fits(kind, op, key, conditional):
                at -= rate
                if at < 0:
                    return kind
        return ""

    @staticmethod
    def _fits(kind: str, op: str, key: str, conditional: bool) -> bool:
        match kind:
            case "conflict":
                return conditional
            case "lost":
                return op in ("put", "delete")
            case "late":
                # What is replaced without a condition, or deleted and put again, is not safe from a late
                # request, whatever its client does.
                return op in ("put", "delete") and ("/packs/" in key or "/pages/" in key or conditional)
            case "slow" | "truncated":
                return op in BODIES
            case "stale":
                return op in LISTS
        return True

    # -- the protocol --------------------------------------------------------------------------------

    def get(self, key: str) -> Object:
        return self._request("get", key, lambda: self.inner.get(key))

    def get_range(self, key: str, offset: int, length: int, into: memoryview | None = None) -> Buffer:
        def torn() -> None:
            """The caller's buffer is not what it was."""
            if into is not None:
                into[: length // 2] = b"\xa5" * (length // 2)

        return self._request(
            "get_range", key, lambda: self.inner.get_range(key, offset, length, into), torn=torn
        )

    def get_suffix(self, key: str, length: int) -> tuple[bytes, int]:
        return self._request("get_suffix", key, lambda: self.inner.get_suffix(key, length))

    def head(self, key: str) -> ObjectInfo:
        return self._request("head", key, lambda: self.inner.head(key))

    def put(self, key: str, data: Body, *, if_match: str | None = None, if_none_match: bool = False) -> str:
        # A late one has its bytes, whatever the caller does to its buffers meanwhile.
        body = join_body(data)
        self.sent(key, body)

        def apply() -> str:
            fresh = self._info(key) is None
            etag = self.inner.put(key, body, if_match=if_match, if_none_match=if_none_match)
            if fresh:
                self._backlog.note(key, None, self.plan.lag)
            return etag

        # A first put is none that may come late: who was told of no success may have given the name up.
        return self._request("put", key, apply, conditional=if_match is not None)

    def delete(self, key: str) -> None:
        def apply() -> None:
            info = self._info(key)
            self.inner.delete(key)
            if info is not None:
                self._backlog.note(key, info, self.plan.lag)

        self._request("delete", key, apply)

    def _info(self, key: str) -> ObjectInfo | None:
        try:
            return self.inner.head(key)
        except NotFound:
            return None

    # -- listings ------------------------------------------------------------------------------------

    def list_page(self, prefix: str, token: str = "") -> ListPage:
        page = self._request("list", prefix, lambda: self.inner.list_page(prefix, token))
        if self._last != "stale":
            return page
        hidden, shown = self._staleness(prefix)
        infos = [info for info in page.infos if info.key not in hidden]
        last = page.infos[-1].key if page.next_token else "\U0010ffff"
        infos += [info for info in shown if token < info.key <= last]
        return ListPage(tuple(infos), page.next_token)

    def list_dirs(self, prefix: str) -> Keys:
        dirs = self._request("list_dirs", prefix, lambda: self.inner.list_dirs(prefix))
        if self._last != "stale":
            return dirs
        hidden, shown = self._staleness(prefix)
        left = [info.key for info in self.inner.list(prefix) if info.key not in hidden]
        left += [info.key for info in shown]
        rests = [key.removeprefix(prefix) for key in left]
        return sorted({f"{prefix}{rest.split('/', 1)[0]}/" for rest in rests if "/" in rest})

    def _staleness(self, prefix: str) -> tuple[set[str], list[ObjectInfo]]:
        """What a stale listing does not show yet, and what it shows still."""
        hidden: set[str] = set()
        shown: dict[str, ObjectInfo] = {}
        for change in self._backlog.recent:
            if change.key.startswith(prefix) and change.when > self._clock.now - self.plan.lag:
                if self._rng.random() < 0.5:
                    continue
                if change.info is None:
                    hidden.add(change.key)
                elif self._info(change.key) is None:
                    shown[change.key] = change.info
        return hidden, list(shown.values())


def _whatever(apply: Callable[[], object]) -> None:
    """A request that nobody hears the answer of."""
    try:
        apply()
    except Exception:
        return
