"""The patient store: retries, parking, lanes, ambiguity. Timings are short, deadlines generous."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from glidefs.errors import (
    AccessDenied,
    Conflict,
    CorruptObject,
    NoSuchBucket,
    NotFound,
    PreconditionFailed,
    StoreUnavailable,
    Throttled,
)
from glidefs.store.breaker import Breaker
from glidefs.store.memory import MemoryStore
from glidefs.store.resilient import ResilientStore


def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "condition did not come true"
        time.sleep(0.005)


@pytest.fixture
def inner() -> MemoryStore:
    store = MemoryStore("memory://inner")
    store.put("k", b"0123456789")
    store.requests.clear()
    return store


def test_temporary_errors_are_retried(inner: MemoryStore) -> None:
    events: list[tuple[str, str]] = []
    store = ResilientStore(inner, on_metrics=lambda op, outcome, seconds: events.append((op, outcome)))
    inner.fail_next("get", StoreUnavailable(), Throttled(), Conflict(), NoSuchBucket(temporary=True))
    assert store.get("k").data == b"0123456789"
    metrics = store.metrics()
    assert (metrics.requests["get"], metrics.errors["get"], metrics.retries["get"]) == (5, 4, 4)
    assert metrics.bytes_in == 10
    assert metrics.waiting == 0
    assert events == [("get", "retry")] * 4 + [("get", "ok")]


@pytest.mark.parametrize(
    "error",
    [AccessDenied(), NoSuchBucket(), CorruptObject("k", 0, "why"), NotFound(key="k"), PreconditionFailed()],
    ids=lambda error: type(error).__name__,
)
def test_lasting_errors_are_not(inner: MemoryStore, error: Exception) -> None:
    store = ResilientStore(inner)
    inner.fail_next("get", error)  # type: ignore[arg-type]
    with pytest.raises(type(error)) as caught:
        store.get("k")
    assert caught.value is error
    assert inner.requests["get"] == 1
    assert store.metrics().breaker == "closed"


def test_deadline(inner: MemoryStore) -> None:
    inner.set_down(True)
    store = ResilientStore(inner, deadline=0.3)
    started = time.monotonic()
    for request in (
        lambda: store.get("k"),
        lambda: store.put("x", b""),
        lambda: store.view("background").head("k"),
    ):
        with pytest.raises(StoreUnavailable) as caught:
            request()
        assert caught.value.temporary, "who asked may ask again later"
    assert 0.8 < time.monotonic() - started < 5
    with pytest.raises(StoreUnavailable):
        store.view("read", deadline=0).get("k")


def test_outage_parks_calls_and_ends_within_two_seconds(inner: MemoryStore) -> None:
    store = ResilientStore(inner, deadline=None, reads=4)
    inner.set_down(True)
    with ThreadPoolExecutor(24) as pool:
        calls = [pool.submit(store.get_range, "k", 0, 4) for _ in range(24)]
        wait_for(lambda: store.metrics().breaker != "closed")
        wait_for(lambda: store.metrics().waiting >= 23)
        # However many wait, the store sees about one probe a second.
        wait_for(lambda: store.metrics().down_seconds > 1.0)
        before = inner.requests["get_range"]
        time.sleep(1.5)
        assert inner.requests["get_range"] - before <= 4
        assert not any(call.done() for call in calls)
        inner.set_down(False)
        back = time.monotonic()
        assert all(call.result(10) == b"0123" for call in calls)
        assert time.monotonic() - back < 2.0
    assert store.metrics().breaker == "closed"
    assert store.metrics().waiting == 0


def test_a_hanging_probe_does_not_hide_the_return(inner: MemoryStore) -> None:
    """Where packets vanish a probe hangs until its timeout; the next one must not wait for it."""
    breaker = Breaker(threshold=1, probe_every=0.2)
    breaker.leave(False, ok=False)
    assert breaker.enter(time.monotonic() + 5, lambda: False)
    assert breaker.state == "half-open"
    started = time.monotonic()
    assert breaker.enter(time.monotonic() + 5, lambda: False), "a second probe beside the first"
    assert time.monotonic() - started < 1.0
    breaker.leave(True, ok=True)
    assert breaker.state == "closed"
    breaker.leave(True, ok=False)  # the hanging one fails at last: that says nothing about now


def test_cancel_frees_parked_calls(inner: MemoryStore) -> None:
    cancel = threading.Event()
    store = ResilientStore(inner, cancel=cancel)
    inner.set_down(True)
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(store.get, "k") for _ in range(4)]
        wait_for(lambda: store.metrics().breaker != "closed")
        cancel.set()
        started = time.monotonic()
        for call in calls:
            assert isinstance(call.exception(5), StoreUnavailable)
        assert time.monotonic() - started < 2


def test_reads_do_not_queue_behind_uploads(inner: MemoryStore) -> None:
    gate = threading.Event()
    real_put = inner.put

    def slow_put(key: str, data: bytes, **conditions: object) -> str:
        gate.wait(20)
        return real_put(key, data, **conditions)  # type: ignore[arg-type]

    inner.put = slow_put  # type: ignore[method-assign,assignment]
    store = ResilientStore(inner, writes=2, background=1)
    with ThreadPoolExecutor(8) as pool:
        uploads = [pool.submit(store.view("upload").put, f"u{i}", b"x") for i in range(6)]
        wait_for(lambda: store.metrics().waiting == 4)
        assert store.view("read", deadline=5).get_range("k", 0, 2) == b"01"
        assert store.view("background", deadline=5).get_range("k", 0, 2) == b"01"
        assert not any(upload.done() for upload in uploads)
        gate.set()
        for upload in uploads:
            upload.result(10)


def test_lane_limits(inner: MemoryStore) -> None:
    running, most = 0, 0
    lock = threading.Lock()
    real = inner.get_range

    def counted(key: str, offset: int, length: int, into: memoryview | None = None) -> bytes:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.01)
        with lock:
            running -= 1
        return real(key, offset, length, into)

    inner.get_range = counted  # type: ignore[method-assign]
    store = ResilientStore(inner, reads=3)
    with ThreadPoolExecutor(12) as pool:
        list(pool.map(lambda i: store.get_range("k", 0, 1), range(36)))
    assert most == 3


def test_writes_that_fail_do_not_stop_reads(inner: MemoryStore) -> None:
    inner.fail_next("put", *[StoreUnavailable("no space left") for _ in range(100)])
    store = ResilientStore(inner, deadline=0.5)
    with pytest.raises(StoreUnavailable):
        store.put("x", b"")
    for i in range(8):
        with pytest.raises(StoreUnavailable):
            store.view("upload", deadline=0.01).put(f"x{i}", b"")
    assert store.metrics().breaker != "closed"
    # Not even as a probe, or behind one: reads have a breaker of their own.
    assert store.breaker_of("get_range").is_closed
    assert store.view("read", deadline=0).get("k").data == b"0123456789"


def test_lost_answer_of_a_conditional_put_is_ambiguous(inner: MemoryStore) -> None:
    store = ResilientStore(inner)
    etag = inner.head("k").etag
    inner.lose_answers("put")
    with pytest.raises(PreconditionFailed) as caught:
        store.put("k", b"mine", if_match=etag)
    assert caught.value.ambiguous
    assert inner.get("k").data == b"mine"
    with pytest.raises(PreconditionFailed) as caught:
        store.put("k", b"other", if_match=etag)
    assert not caught.value.ambiguous, "an honest refusal"


def test_unanswered_put_says_that_it_may_be_done(inner: MemoryStore) -> None:
    inner.lose_answers("put")
    with pytest.raises(StoreUnavailable) as caught:
        ResilientStore(inner, deadline=0).put("k", b"mine", if_none_match=False)
    assert caught.value.ambiguous


def test_list_survives_failures_in_its_middle(inner: MemoryStore) -> None:
    for i in range(25):
        inner.put(f"p/{i:03}", b"")
    inner.list_limit = 4
    store = ResilientStore(inner)
    listing = store.list("p/")
    found = [next(listing).key for _ in range(6)]
    inner.fail_next("list", StoreUnavailable(), StoreUnavailable())
    found += [info.key for info in listing]
    assert found == [f"p/{i:03}" for i in range(25)]


def test_breaker_needs_a_run_of_failures() -> None:
    breaker = Breaker(threshold=3)
    for ok in (False, False, True, False, False, True, False, None, False):
        breaker.leave(False, ok)
        assert breaker.is_closed
    breaker.leave(False, ok=False)
    assert not breaker.is_closed
    with pytest.raises(TimeoutError):
        breaker.enter(time.monotonic(), lambda: False)
    with pytest.raises(InterruptedError):
        breaker.enter(None, lambda: True)
