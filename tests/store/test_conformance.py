"""What every store must do, run against all of them."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from glidefs.errors import Conflict, CorruptObject, NotFound, PreconditionFailed, StoreError
from glidefs.store.base import ObjectStore, dir_name
from glidefs.store.memory import MemoryStore
from glidefs.store.probe import probe_store

KEY = "p/volumes/vm-1/manifest"


def test_put_get_head_delete(store: ObjectStore) -> None:
    etag = store.put(KEY, b"hello")
    found = store.get(KEY)
    assert (found.data, found.etag) == (b"hello", etag)
    info = store.head(KEY)
    assert (info.key, info.size, info.etag) == (KEY, 5, etag)
    assert info.last_modified > 1.6e9
    assert store.put(KEY, b"other") != etag
    assert store.get(KEY).data == b"other"
    store.delete(KEY)
    store.delete(KEY)
    with pytest.raises(NotFound) as caught:
        store.get(KEY)
    assert caught.value.key == KEY
    assert not caught.value.temporary
    with pytest.raises(NotFound):
        store.head(KEY)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        bytearray(b"abc"),
        memoryview(b"abcd")[1:3],
        [b"one", memoryview(b"two"), bytearray(b""), b"3"],
        [],
    ],
    ids=["empty", "bytearray", "view", "parts", "no parts"],
)
def test_bodies(store: ObjectStore, body: object) -> None:
    parts = body if isinstance(body, list) else [body]
    store.put("k", body)  # type: ignore[arg-type]
    assert store.get("k").data == b"".join(bytes(part) for part in parts)


def test_large_body_in_parts(store: ObjectStore) -> None:
    parts = [os.urandom((1 << 20) + 17) for _ in range(5)]
    store.put("p/packs/aa/large", parts)
    whole = b"".join(parts)
    assert store.get("p/packs/aa/large").data == whole
    assert store.get_range("p/packs/aa/large", 3_000_000, 131072) == whole[3_000_000:3_131_072]


def test_ranges(store: ObjectStore) -> None:
    data = os.urandom(300_000)
    store.put("k", data)
    for offset, length in ((0, 1), (0, 300_000), (299_999, 1), (4096, 131072)):
        assert store.get_range("k", offset, length) == data[offset : offset + length]
    for length in (1, 1000, 300_000):
        assert store.get_suffix("k", length) == (data[-length:], 300_000)
    assert store.get_suffix("k", 999_999) == (data, 300_000)
    for missing in (lambda: store.get_range("none", 0, 1), lambda: store.get_suffix("none", 1)):
        with pytest.raises(NotFound):
            missing()


def test_range_beyond_the_end_is_damage_not_an_outage(store: ObjectStore) -> None:
    store.put("k", b"0123456789")
    for offset, length in ((5, 6), (9, 100), (10, 1), (1000, 5)):
        with pytest.raises(CorruptObject) as caught:
            store.get_range("k", offset, length)
        assert caught.value.key == "k"
    for offset, length in ((0, 0), (-1, 2), (0, -1)):
        with pytest.raises(StoreError):
            store.get_range("k", offset, length)


def test_suffix_of_an_empty_object(store: ObjectStore) -> None:
    store.put("k", b"")
    assert store.get_suffix("k", 10) == (b"", 0)


def test_conditional_puts(store: ObjectStore) -> None:
    first = store.put(KEY, b"1", if_none_match=True)
    with pytest.raises(PreconditionFailed) as caught:
        store.put(KEY, b"2", if_none_match=True)
    assert not caught.value.temporary
    assert not caught.value.ambiguous
    second = store.put(KEY, b"2", if_match=first)
    with pytest.raises(PreconditionFailed):
        store.put(KEY, b"3", if_match=first)
    assert store.get(KEY).data == b"2"
    assert store.get(KEY).etag == second
    store.delete(KEY)
    with pytest.raises(PreconditionFailed):
        store.put(KEY, b"3", if_match=second)
    with pytest.raises(NotFound):
        store.get(KEY)
    for contradiction in ({"if_match": "x", "if_none_match": True}, {"if_match": ""}):
        with pytest.raises(StoreError):
            store.put(KEY, b"3", **contradiction)  # type: ignore[arg-type]


def race(store: ObjectStore, attempt: object) -> int:
    """How many of eight simultaneous attempts win."""
    barrier = threading.Barrier(8)

    def run(i: int) -> bool:
        barrier.wait()
        while True:
            try:
                attempt(i)  # type: ignore[operator]
                return True
            except PreconditionFailed:
                return False
            except Conflict:
                continue

    with ThreadPoolExecutor(8) as pool:
        return sum(pool.map(run, range(8)))


def test_races_have_one_winner(store: ObjectStore, request: pytest.FixtureRequest) -> None:
    if "moto" in request.node.name:
        pytest.skip("moto checks conditions without a lock")
    # SeaweedFS queues them for a second or so each.
    for round_ in range(1 if "seaweedfs" in request.node.name else 5):
        key = f"k{round_}"
        assert race(store, lambda i, k=key: store.put(k, b"%d" % i, if_none_match=True)) == 1
        etag = store.head(key).etag
        assert race(store, lambda i, k=key, e=etag: store.put(k, b"new%d" % i, if_match=e)) == 1


def test_list(store: ObjectStore) -> None:
    keys = ["a", "p/a-b", "p/a/1", "p/a/2", "p/a0", "p/b/c/d", "pq/x", "z.z"]
    for key in reversed(keys):
        store.put(key, key.encode())
    for prefix in ("", "p/", "p", "p/a", "p/a/", "p/b/", "none/"):
        expected = sorted(key for key in keys if key.startswith(prefix))
        assert sorted(info.key for info in store.list(prefix)) == expected, prefix
    for start in [*keys, "", "p/", "p/a", "p/a/", "p/a/11", "p/z"]:
        expected = sorted(key for key in keys if key > start)
        assert sorted(info.key for info in store.list("", start_after=start)) == expected, start
    info = next(iter(store.list("p/b")))
    assert (info.size, info.etag) == (7, store.head("p/b/c/d").etag)


def test_list_in_pieces_misses_nothing(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that are the beginning of others, where providers differ in order."""
    keys = sorted(f"p/volumes/{name}/manifest" for name in ("a", "a-b", "a.b", "a0", "aa", "b"))
    for key in keys:
        store.put(key, b"x")
    for limit in (1, 2, 4, 6):
        for module in ("s3.store", "file"):
            monkeypatch.setattr(f"glidefs.store.{module}.LIST_PAGE", limit)
        if isinstance(store, MemoryStore):
            store.list_limit = limit
        assert sorted(info.key for info in store.list("p/")) == keys


def test_list_dirs(store: ObjectStore) -> None:
    for key in ("p/volumes/b/manifest", "p/volumes/a/manifest", "p/volumes/a/snapshots/1", "p/x", "q/y"):
        store.put(key, b"")
    assert store.list_dirs("") == ["p/", "q/"]
    assert store.list_dirs("p/volumes/") == ["p/volumes/a/", "p/volumes/b/"]
    assert [dir_name(path) for path in store.list_dirs("p/volumes/")] == ["a", "b"]
    assert store.list_dirs("none/") == []
    store.delete("p/volumes/b/manifest")
    assert set(store.list_dirs("p/volumes/")) - {"p/volumes/b/"} == {"p/volumes/a/"}
    if "s3" not in store.url:
        assert store.list_dirs("p/volumes/") == ["p/volumes/a/"]


def test_keys_cannot_escape(store: ObjectStore) -> None:
    for key in ("", "/etc/passwd", "../x", "a/../../x", "a//b", "a/./b", "a/", "x\0y", "a" * 2000):
        for request in (
            lambda k=key: store.get(k),
            lambda k=key: store.put(k, b""),
            lambda k=key: store.delete(k),
            lambda k=key: store.get_range(k, 0, 1),
        ):
            with pytest.raises(StoreError, match="legal key"):
                request()
    with pytest.raises(StoreError):
        list(store.list("../"))


def test_probe(store: ObjectStore) -> None:
    probe_store(store)
    probe_store(store, "p")
    assert list(store.list("")) == []


def test_concurrent_reads(store: ObjectStore) -> None:
    data = os.urandom(1 << 20)
    store.put("k", data)

    def read(i: int) -> bool:
        offset = i * 4099 % 900_000
        return store.get_range("k", offset, 65536) == data[offset : offset + 65536]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(80)))
