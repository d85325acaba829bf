"""A store whose clock and whose requests a test controls, and the objects that gc looks at."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future
from typing import Any

import msgspec
from stored_roots import put_root

from glidefs import names
from glidefs.formats.blessing import PutPack, encode_blessing, make_blessing
from glidefs.formats.manifest import (
    PAGE_BYTES,
    PackRef,
    Page,
    Root,
    decode_root,
    encode_page,
    page_count,
    page_id,
)
from glidefs.formats.pack import TRAILER_SIZE
from glidefs.gc.run import GcResult, collect
from glidefs.store.base import Body, ListPage, ObjectStore
from glidefs.store.memory import MemoryStore

PREFIX = "p"
HOUR = 3600.0
GRACE = 24 * HOUR
GIB = 1 << 30
START = 1_700_000_000.0


class ClockStore(MemoryStore):
    """A memory store with a clock of its own. ``hook(op, key)`` is called before each request."""

    def __init__(self) -> None:
        super().__init__()
        self.now = START
        self.hook: Callable[[str, str], None] = lambda op, key: None
        self.after_list: Callable[[str], None] = lambda prefix: None

    def _enter(self, op: str, key: str) -> None:
        hook = self.hook
        hook(op, key)
        super()._enter(op, key)

    def put(self, key: str, data: Body, *, if_match: str | None = None, if_none_match: bool = False) -> str:
        before = self.etag_of(key)
        try:
            return super().put(key, data, if_match=if_match, if_none_match=if_none_match)
        finally:
            with self._lock:
                body, info = self._objects.get(key, (b"", None))
                # New, also where its answer was lost: stamped by the machine's clock.
                if info is not None and info.etag == f'"{self._generation:x}"' and info.etag != before:
                    self._objects[key] = (body, msgspec.structs.replace(info, last_modified=self.now))

    def list_page(self, prefix: str, token: str = "") -> ListPage:
        page = super().list_page(prefix, token)
        self.after_list(prefix)
        return page

    def key_set(self, below: str = "") -> set[str]:
        """The keys there are, without a request."""
        with self._lock:
            return {key for key in self._objects if key.startswith(below)}

    def data(self, key: str) -> bytes:
        """An object's bytes, without a request."""
        with self._lock:
            return self._objects[key][0]

    def etag_of(self, key: str) -> str | None:
        """The ETag of an object that there is, without a request."""
        with self._lock:
            found = self._objects.get(key)
        return found[1].etag if found else None

    def snapshot(self) -> dict[str, str]:
        """Every key with its ETag."""
        with self._lock:
            return {key: info.etag for key, (_, info) in self._objects.items()}


class InlinePool(Executor):
    """Does the work at once, so that requests come in one order."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)
        return future


_count = itertools.count()


def new_id() -> bytes:
    """Ids in no order, but the same in each run of a test."""
    return hashlib.blake2b(next(_count).to_bytes(8), digest_size=16).digest()


def restart_ids() -> None:
    global _count
    _count = itertools.count()


def put_pack(store: ObjectStore, size: int = 100) -> bytes:
    """A pack of any bytes; gc does not look into one."""
    id_ = new_id()
    store.put(names.pack_key(PREFIX, id_.hex()), bytes(size))
    return id_


def page_of(packs: Iterable[bytes]) -> Page:
    refs = tuple(PackRef(id_, 100, TRAILER_SIZE + 12) for id_ in packs)
    return Page(refs, {0: tuple(range(len(refs)))} if refs else {})


def put_page(store: ObjectStore, packs: Iterable[bytes]) -> bytes:
    data = encode_page(page_of(packs), new_id(), new_id())
    id_ = page_id(data)
    store.put(names.page_key(PREFIX, id_.hex()), data)
    return id_


def inline_root(name: str, packs: Iterable[bytes], **fields: object) -> Root:
    root = Root(volume_id=new_id(), name=name, size=GIB, page_ids=(b"",), inline_page=page_of(packs))
    return msgspec.structs.replace(root, **fields)


def paged_root(name: str, pages: Iterable[bytes], **fields: object) -> Root:
    size = 4 * PAGE_BYTES
    ids = tuple(pages)
    root = Root(
        volume_id=new_id(), name=name, size=size, page_ids=ids + (b"",) * (page_count(size) - len(ids))
    )
    return msgspec.structs.replace(root, **fields)


def put_volume(store: ObjectStore, name: str, packs: Iterable[bytes]) -> str:
    key = names.manifest_key(PREFIX, name)
    put_root(store, key, inline_root(name, packs))
    return key


def put_base(store: ObjectStore, name: str, packs: Iterable[bytes], removed_at: int = 0) -> str:
    key = names.base_manifest_key(PREFIX, name)
    put_root(store, key, inline_root(name, packs, removed_at=removed_at))
    return key


def remove_base(store: ClockStore, name: str) -> None:
    key = names.base_manifest_key(PREFIX, name)
    root = decode_root(key, store.data(key))
    put_root(store, key, msgspec.structs.replace(root, removed_at=int(store.now)))


def put_checkpoint(store: ClockStore, base: str, packs: Iterable[bytes]) -> str:
    """A checkpoint of packs that were just put; its key."""
    now = int(store.now)
    key = names.blessing_key(PREFIX, base)
    put = [PutPack(PackRef(id_, 100, TRAILER_SIZE + 12), now) for id_ in packs]
    store.put(key, encode_blessing(make_blessing(now, put, now), key))
    return key


def has_pack(store: ClockStore, id_: bytes) -> bool:
    return names.pack_key(PREFIX, id_.hex()) in store.key_set()


def has_page(store: ClockStore, id_: bytes) -> bool:
    return names.page_key(PREFIX, id_.hex()) in store.key_set()


def run(store: ObjectStore, *, grace: float = GRACE, **options: object) -> GcResult:
    return collect(store, PREFIX, grace=grace, **options)  # type: ignore[arg-type]


def run_twice(store: ClockStore, **options: object) -> GcResult:
    """Two runs a grace apart, of what is there now; the second one's result."""
    store.now += GRACE
    run(store, **options)
    store.now += GRACE
    return run(store, **options)


def check_sums(result: GcResult) -> None:
    """What GcResult promises of its numbers."""
    for field in ("objects", "bytes"):
        value = {name: getattr(getattr(result, name), field) for name in ("listed", "marked", "unreferenced")}
        value |= {
            name: getattr(getattr(result, name), field) for name in ("waiting", "due", "deleted", "left")
        }
        assert value["listed"] == value["marked"] + value["unreferenced"]
        assert value["unreferenced"] == value["waiting"] + value["due"]
        assert value["due"] == value["deleted"] + value["left"]
        assert min(value.values()) >= 0


def flipped(data: bytes) -> bytes:
    """The same with a bit of the last byte changed."""
    return data[:-1] + bytes([data[-1] ^ 1])
