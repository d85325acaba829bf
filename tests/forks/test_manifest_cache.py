"""The caches of bases: shared objects, shared loads, a bound, and the warm-up."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
from fork_rig import PREFIX, CountingStore, Node, delayed
from stored_roots import owner_of, put_root
from waiting import wait_for

from glidefs.bases.manifest_cache import BaseLibrary, ManifestCache
from glidefs.bases.stored import base_root
from glidefs.errors import NotFound, StoreUnavailable
from glidefs.manifest import lease
from glidefs.names import base_manifest_key
from glidefs.store.resilient import ResilientStore

MakeNode = Callable[..., Node]


def put_bases(memory: CountingStore, count: int, prefix: str = PREFIX) -> list[str]:
    names = [f"base{i:03}" for i in range(count)]
    for name in names:
        root = base_root(lease.empty_root(name, 1 << 20, owner_of("n")), name)
        put_root(memory, base_manifest_key(prefix, name), root)
    memory.gets.clear()
    return names


@pytest.fixture
def library(memory: CountingStore) -> BaseLibrary:
    return BaseLibrary(ResilientStore(memory), grace=86400.0, stopping=threading.Event())


def test_a_hit_is_the_same_object(library: BaseLibrary, memory: CountingStore) -> None:
    put_bases(memory, 1)
    first = library.get(PREFIX, "base000")
    assert library.get(PREFIX, "base000") is first
    assert memory.gets == [f"{PREFIX}/bases/base000/manifest"]
    stats = library.manifests.stats()
    assert (stats.hits, stats.misses, stats.loads, stats.entries) == (1, 1, 1, 1)


def test_the_least_recently_used_goes_first(library: BaseLibrary, memory: CountingStore) -> None:
    names = put_bases(memory, 65)
    for name in names[:64]:
        library.get(PREFIX, name)
    library.get(PREFIX, names[0])
    library.get(PREFIX, names[64])
    assert library.manifests.peek(PREFIX, names[1]) is None
    assert library.manifests.peek(PREFIX, names[0]) is not None
    assert library.manifests.stats().evictions == 1
    assert len(library.manifests.names()) == 64


def test_a_failed_load_is_not_kept_and_goes_to_all_who_wait() -> None:
    calls: list[str] = []
    gate = threading.Event()

    def load(prefix: str, base: str) -> str:
        calls.append(base)
        gate.wait(60)
        if len(calls) == 1:
            raise NotFound("no", key=base, op="get")
        return base

    cache = ManifestCache(load)
    results: list[object] = []

    def ask() -> None:
        try:
            results.append(cache.get("p", "b"))
        except NotFound as error:
            results.append(error)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    wait_for(lambda: cache.stats().hits == 7, "all wait")
    gate.set()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert all(isinstance(result, NotFound) for result in results)
    assert cache.get("p", "b") == "b"
    assert cache.stats().failures == 1


def test_prefixes_do_not_mix(library: BaseLibrary, memory: CountingStore) -> None:
    put_bases(memory, 1)
    put_bases(memory, 1, "other")
    assert library.get(PREFIX, "base000").root != library.get("other", "base000").root


def test_warming_up_fills_what_room_there_is(library: BaseLibrary, memory: CountingStore) -> None:
    names = put_bases(memory, 100)
    for name in names[:10]:
        library.get(PREFIX, name)
    memory.gets.clear()
    with delayed(memory, 0.01):
        assert library.warm([PREFIX, PREFIX]) == 54
    manifests = [key for key in memory.gets if key.endswith("/manifest")]
    assert len(manifests) == len(set(manifests)) == 54
    assert 1 < memory.most <= 8
    assert all(library.manifests.peek(PREFIX, name) for name in names[:10])
    assert library.manifests.stats().evictions == 0


def test_an_error_does_not_stop_the_warm_up(
    library: BaseLibrary, memory: CountingStore, caplog: pytest.LogCaptureFixture
) -> None:
    names = put_bases(memory, 20)
    for name in names[3:6]:
        memory.put(base_manifest_key(PREFIX, name), b"rubbish")
    assert library.warm([PREFIX]) == 17
    assert len([r for r in caplog.records if "were not loaded beforehand" in r.message]) == 1
    assert caplog.records[-1].message.startswith("3 bases")


def test_a_store_that_is_down_does_not_stop_the_start(
    make_node: MakeNode, memory: CountingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = make_node()
    memory.set_down(True)
    node.bases._background = node.store.view("background", 60.0)
    monkeypatch.setattr("glidefs.exports.roots.STORE_PATIENCE", 60.0)
    began = time.monotonic()
    node.router.start()
    assert node.router.wait_tried(30)
    assert time.monotonic() - began < 30.0


def test_a_base_that_was_made_again_is_found_out(memory: CountingStore) -> None:
    library = BaseLibrary(ResilientStore(memory), grace=0.0, stopping=threading.Event())
    put_bases(memory, 1)
    old = library.get(PREFIX, "base000")
    put_bases(memory, 1)  # another content under the same name, after its removal was collected
    new = library.get(PREFIX, "base000")
    assert new.manifest_hash != old.manifest_hash
    memory.fail_next("head", *[StoreUnavailable("no", key="", op="head")])
    assert library.get(PREFIX, "base000") is not old
