"""The patient store: retries, parking, lanes, ambiguity. Timings are short, deadlines generous."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
from waiting import wait_for

from glidefs.errors import (
    AccessDenied,
    Conflict,
    CorruptObject,
    NoSuchBucket,
    NotFound,
    PreconditionFailed,
    StoreError,
    StoreRefused,
    StoreUnavailable,
    StoreUnsupported,
    Throttled,
)
from glidefs.store.base import Object
from glidefs.store.breaker import Breaker
from glidefs.store.memory import MemoryStore
from glidefs.store.resilient import ResilientStore
from glidefs.store.state import StoreState, Waits, waiting


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
    assert 0.8 < time.monotonic() - started < 15
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
        breaker = store.breaker_of("get_range")
        wait_for(lambda: store.metrics().down_seconds > 1.0 and breaker._delay == 1.0)
        began, before = time.monotonic(), inner.requests["get_range"]
        time.sleep(1.5)
        probes = inner.requests["get_range"] - before
        assert probes <= 1 + 2 * (time.monotonic() - began)
        assert not any(call.done() for call in calls)
        probe = breaker._next_probe
        inner.set_down(False)
        back = time.monotonic()
        assert probe - back <= 1.0
        assert all(call.result(20) == b"0123" for call in calls)
        assert time.monotonic() - back < 8.0  # two, where nothing else keeps this process waiting
    assert store.metrics().breaker == "closed"
    assert store.metrics().waiting == 0


def test_a_hanging_probe_does_not_hide_the_return(inner: MemoryStore) -> None:
    """Where packets vanish a probe hangs until its timeout; the next one must not wait for it."""
    breaker = Breaker(threshold=1, probe_every=0.2)
    breaker.leave(False, ok=False)
    assert breaker.enter(time.monotonic() + 30, lambda: False)
    assert breaker.state == "half-open"
    started = time.monotonic()
    assert breaker.enter(time.monotonic() + 30, lambda: False), "a second probe beside the first"
    assert time.monotonic() - started < 10
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
            assert isinstance(call.exception(20), StoreUnavailable)
        assert time.monotonic() - started < 10


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


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def fail_until_open(store: ResilientStore, *calls: Callable[[], object]) -> None:
    for call in calls:
        for _ in range(6):
            with pytest.raises(StoreUnavailable):
                call()


def test_away_and_back_are_said_once_each(inner: MemoryStore, caplog: pytest.LogCaptureFixture) -> None:
    store = ResilientStore(inner, deadline=0.05)
    store.news_after = 0.0
    assert store.state == StoreState()
    inner.set_down(True)
    before = time.time()
    fail_until_open(store, lambda: store.get("k"), lambda: store.put("x", b""))
    state = store.state
    assert state.away
    assert before <= state.since <= time.time()
    assert "the store is down" in state.reason
    inner.set_down(False)
    wait_for(lambda: succeeds(lambda: store.get("k")))
    wait_for(lambda: succeeds(lambda: store.put("x", b"")))
    assert not store.state.away
    said = messages(caplog)
    assert [text.split(";")[0] for text in said if "away" in text] == ["the store is away"]
    assert len([text for text in said if text.startswith("the store is back after")]) == 1


def test_a_store_that_is_away_for_moments_is_no_news(
    inner: MemoryStore, caplog: pytest.LogCaptureFixture
) -> None:
    store = ResilientStore(inner, deadline=0.05, probe_every=0.05)
    store.news_after = 20  # no machine is so slow
    for _ in range(5):
        inner.set_down(True)
        fail_until_open(store, lambda: store.get("k"))
        assert store.state.away
        inner.set_down(False)
        wait_for(lambda: succeeds(lambda: store.get("k")))
    assert not [text for text in messages(caplog) if "away" in text or "back" in text]
    store.news_after = 0.5
    inner.set_down(True)
    wait_for(lambda: not succeeds(lambda: store.get("k")) and any("away" in one for one in messages(caplog)))
    fail_until_open(store, lambda: store.get("k"))
    assert [text.split(";")[0] for text in messages(caplog) if "away" in text] == ["the store is away"]


def succeeds(call: Callable[[], object]) -> bool:
    try:
        call()
    except StoreUnavailable:
        return False
    return True


@pytest.mark.parametrize("lane", ["read", "upload", "background"])
def test_whichever_request_works_first_tells_that_the_store_is_back(inner: MemoryStore, lane: str) -> None:
    """Nobody asks in the other direction any more: what was known of it must not outlive the outage."""
    store = ResilientStore(inner, deadline=0.05)
    inner.set_down(True)
    fail_until_open(store, lambda: store.get("k"), lambda: store.put("x", b""))
    inner.set_down(False)
    view = store.view(lane, deadline=0.05)  # type: ignore[arg-type]
    use = (lambda: view.put("y", b"")) if lane == "upload" else (lambda: view.get("k"))
    wait_for(lambda: succeeds(use) and not store.state.away)
    assert store.metrics().breaker == "closed"


def test_who_stops_asks_the_store_anew(inner: MemoryStore) -> None:
    store = ResilientStore(inner, deadline=0.05)
    inner.set_down(True)
    fail_until_open(store, lambda: store.put("x", b""))
    assert not store.answers(0.1)
    assert store.state.away
    inner.set_down(False)
    assert store.answers(5)
    assert not store.state.away
    store.put("x", b"")


def test_a_store_that_takes_no_writes_stays_away_while_reads_work(
    inner: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glidefs.store.breaker._QUIET", 60.0)  # the writer may be slow
    inner.fail_next("put", *[StoreUnavailable("no space left") for _ in range(10_000)])
    store = ResilientStore(inner, probe_every=0.05)
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            with suppress(StoreUnavailable):
                store.view("upload", deadline=0.1).put("x", b"")

    writer = threading.Thread(target=write)
    writer.start()
    try:
        wait_for(lambda: store.state.away)
        since = store.state.since
        until = time.monotonic() + 1.0
        while time.monotonic() < until:
            store.get("k")
            assert store.state.since == since
        assert "no space left" in store.state.reason
    finally:
        stop.set()
        writer.join()


def test_what_waits_long_is_said_once_over_its_calls(
    inner: MemoryStore, caplog: pytest.LogCaptureFixture
) -> None:
    store = ResilientStore(inner, probe_every=0.05)
    store.waits = Waits(loud_after=0.3)
    inner.set_down(True)
    view = store.view("read", deadline=0.1)  # each call ends long before

    def lines() -> list[str]:
        return [text for text in messages(caplog) if text.startswith("get of k")]

    wait_for(lambda: not succeeds(lambda: view.get("k")) and lines())
    for _ in range(5):
        assert not succeeds(lambda: view.get("k"))
    assert store.state.longest_wait >= 0.3
    assert "the store is down" in store.state.wait_reason
    inner.set_down(False)
    wait_for(lambda: succeeds(lambda: view.get("k")))
    said = lines()
    assert len(said) == 2, said
    assert "(read) waits for the store" in said[0]
    assert "the store is down" in said[0]
    assert "goes on after" in said[1]
    assert store.state.longest_wait == 0


def test_a_call_that_only_waits_says_so(inner: MemoryStore, caplog: pytest.LogCaptureFixture) -> None:
    """Without an attempt of its own: parked behind the probes of others, or for a place in its lane."""
    store = ResilientStore(inner, reads=1)
    store.waits = Waits(loud_after=0.2)
    gate = threading.Event()
    real = inner.get

    def slow(key: str) -> Object:
        gate.wait(20)
        return real(key)

    inner.get = slow  # type: ignore[method-assign]
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(store.get, "k") for _ in range(2)]
        wait_for(lambda: any("may make are under way" in text for text in messages(caplog)))
        gate.set()
        assert all(call.result(10).data for call in calls)
    wait_for(lambda: any("goes on after" in text for text in messages(caplog)))


def test_packs_that_are_put_under_new_names_are_one_wait() -> None:
    assert waiting("upload", "put", "p/packs/aa/aa01") == waiting("upload", "put", "p/packs/bb/bb02")
    assert waiting("upload", "put", "p/volumes/a/manifest") != waiting(
        "upload", "put", "p/volumes/b/manifest"
    )
    assert waiting("read", "get_range", "p/packs/aa/1") != waiting("read", "get_range", "p/packs/aa/2")


@pytest.mark.parametrize(
    "error", [AccessDenied(), NoSuchBucket(), StoreUnsupported(), StoreRefused("HTTP 400")], ids=str
)
def test_a_daemon_waits_for_a_store_that_refuses(inner: MemoryStore, error: StoreError) -> None:
    store = ResilientStore(inner)
    store.patient = True
    inner.fail_next("get", error)
    assert store.get("k").data == b"0123456789"
