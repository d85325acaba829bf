"""Which store answers: the id in it decides whether anything is believed, put or deleted."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from glidefs.errors import NotFound, StoreError, StoreUnavailable, Throttled
from glidefs.formats import identity
from glidefs.formats.identity import StoreIdentity
from glidefs.store import open_store
from glidefs.store.base import Object, ObjectStore
from glidefs.store.memory import MemoryStore
from glidefs.store.resilient import ResilientStore
from glidefs.store.which import STORE_KEY, WhichStore


def host(inner: ObjectStore, expected: str | None = None) -> tuple[ResilientStore, list[str]]:
    """A host's store, and the ids that it was bound to."""
    bound: list[str] = []
    store = ResilientStore(inner, deadline=0.2, probe_every=0.05)
    store.identity = WhichStore(expected, bound.append)
    return store, bound


def id_in(inner: ObjectStore) -> str:
    return identity.decode(STORE_KEY, inner.get(STORE_KEY).data, StoreIdentity).id


def test_the_first_write_gives_a_store_its_id() -> None:
    memory = MemoryStore()
    store, bound = host(memory)
    with pytest.raises(NotFound):
        store.get("p/x")
    assert memory.requests["put"] == 0, "a read leaves nothing in a store that nobody used"
    store.put("p/x", b"x")
    assert bound == [id_in(memory)]
    again, rebound = host(memory, bound[0])
    assert again.get("p/x").data == b"x"
    assert rebound == []


def test_two_hosts_agree_on_the_id() -> None:
    memory, bounds = MemoryStore(), []
    hosts = [host(memory) for _ in range(8)]
    threads = [threading.Thread(target=store.put, args=(f"p/{i}", b"")) for i, (store, _) in enumerate(hosts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    bounds = [bound for _, bound in hosts]
    assert bounds == [[id_in(memory)]] * len(hosts)


@pytest.mark.parametrize("other", ["empty", "another", "damaged"])
def test_another_store_is_an_outage_and_takes_nothing(other: str) -> None:
    """! Else a bucket that is not the one that is meant fences every volume, for it has none of them."""
    memory = MemoryStore()
    if other == "another":
        host(memory)[0].put("q/x", b"")
    if other == "damaged":
        memory.put(STORE_KEY, b"{}")
    before = {info.key: info.etag for info in memory.list("")}
    store, bound = host(memory, identity.new_id())
    for request in (
        lambda: store.get("p/x"),
        lambda: store.head("p/x"),
        lambda: store.get_range("p/x", 0, 1),
        lambda: store.get_suffix("p/x", 1),
        lambda: list(store.list("p/")),
        lambda: store.list_dirs("p/"),
        lambda: store.put("p/x", b"x"),
        lambda: store.put("p/x", b"x", if_none_match=True),
        lambda: store.delete("q/x"),
    ):
        with pytest.raises(StoreUnavailable, match="store"):
            request()
    assert {info.key: info.etag for info in memory.list("")} == before
    assert bound == []


def test_a_store_that_is_swapped_in_use_is_noticed_before_an_absence_is_believed() -> None:
    memory = MemoryStore()
    store, _ = host(memory)
    store.put("p/x", b"x")
    for info in list(memory.list("")):
        memory.delete(info.key)
    with pytest.raises(StoreUnavailable, match=r"has no store\.json"):
        store.get("p/x")
    assert store.answers()  # or the next one may only wait
    with pytest.raises(StoreUnavailable, match=r"has no store\.json"):
        store.list_dirs("p/")
    with pytest.raises(StoreUnavailable, match=r"has no store\.json"):
        store.put("p/y", b"y")
    assert list(memory.list("")) == []


def refuses_all(store: ResilientStore) -> None:
    for request in (lambda: store.get("p/x"), lambda: store.put("p/y", b"y"), lambda: store.delete("p/x")):
        with pytest.raises(StoreUnavailable):
            request()


def test_a_directory_is_made_only_when_it_is_asked_for(tmp_path: Path) -> None:
    """! A mount point without its disk is an empty directory, or none; it must not become a new store."""
    root = tmp_path / "store"
    store, _ = host(open_store(root.as_uri()))
    with pytest.raises(StoreUnavailable, match="mounted"):
        store.put("p/x", b"x")
    assert not root.exists()
    first, bound = host(open_store(root.as_uri(), create=True))
    first.put("p/x", b"x")
    root.rename(tmp_path / "unmounted")
    root.mkdir()
    for mine in (first, host(open_store(root.as_uri()), bound[0])[0]):
        refuses_all(mine)
    assert list(root.iterdir()) == []
    root.rmdir()
    (tmp_path / "unmounted").rename(root)
    assert first.view("read", deadline=20).get("p/x").data == b"x"


class Asked(MemoryStore):
    """Counts who is asked what, and fails as it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: Counter[str] = Counter()
        self.trouble: Callable[[], StoreError] | None = None
        self.before: Callable[[], None] = lambda: None

    def get(self, key: str) -> Object:
        self.asked[key] += 1
        if key == STORE_KEY:
            self.before()
        elif self.trouble is not None:
            raise self.trouble()
        return super().get(key)


def ready() -> tuple[Asked, ResilientStore]:
    """A store that was used, and whose id was asked for."""
    memory = Asked()
    store, _ = host(memory)
    store.put("p/x", b"x")
    memory.asked.clear()
    return memory, store


def test_throttling_is_no_reason_to_ask_which_store_it_is() -> None:
    memory, store = ready()
    memory.trouble = lambda: Throttled("HTTP 503 SlowDown")
    for _ in range(5):
        with pytest.raises(StoreError):
            store.get("p/x")
    assert memory.asked["p/x"] >= 5
    assert memory.asked[STORE_KEY] == 0


def test_a_storm_asks_once_in_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """40 callers, each of whose requests is reset now and then: not one request more for each reset."""
    memory, store = ready()
    monkeypatch.setattr("glidefs.store.which.BETWEEN", 0.05)
    turns = itertools.count()

    def reset() -> StoreError | None:
        return StoreUnavailable("connection reset") if next(turns) % 10 == 0 else None

    began = time.monotonic()

    def caller() -> None:
        for _ in range(20):
            assert store.identity is not None
            store.identity.ensure(memory, writes=False)
            if (error := reset()) is not None:
                store.identity.doubt(error)

    with ThreadPoolExecutor(40) as pool:
        for future in [pool.submit(caller) for _ in range(40)]:
            future.result()
    took = time.monotonic() - began
    assert next(turns) >= 800
    assert 1 <= memory.asked[STORE_KEY] <= 1 + took / 0.05


def test_data_that_is_proven_does_not_wait_for_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    memory, store = ready()
    monkeypatch.setattr("glidefs.store.which.BETWEEN", 60.0)
    assert store.identity is not None
    store.identity.doubt(StoreUnavailable("connection reset"))
    assert bytes(store.get_range("p/x", 0, 1)) == b"x"
    assert memory.asked[STORE_KEY] == 0
    assert not store.identity.verified
    monkeypatch.setattr("glidefs.store.which.BETWEEN", 0.25)
    store.get("p/x")  # a root, for one, is not
    assert memory.asked[STORE_KEY] == 1


def test_absences_at_one_time_are_believed_by_one_answer() -> None:
    """Those that came while it was asked ask once more, all together."""
    memory, store = ready()
    gate, waiting = threading.Event(), threading.Event()

    def hold() -> None:
        waiting.set()
        assert gate.wait(20)

    memory.before = hold

    def absent(number: int) -> None:
        with pytest.raises(NotFound):
            store.get(f"p/absent{number}")

    with ThreadPoolExecutor(16) as pool:
        futures = [pool.submit(absent, 0)]
        assert waiting.wait(20)
        futures += [pool.submit(absent, number) for number in range(1, 16)]
        until = time.monotonic() + 20
        while sum(memory.asked[f"p/absent{number}"] for number in range(16)) < 16:
            assert time.monotonic() < until
            time.sleep(0.005)
        gate.set()
        for future in futures:
            future.result()
    assert 2 <= memory.asked[STORE_KEY] <= 3
