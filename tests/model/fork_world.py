"""Two nodes with routers, their store, and the clock that store, nodes and collector go by.

The clock stands still unless a test advances it. What the store has is read here by the formats alone,
without anything of what serves volumes: `stored`.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fork_rig import PREFIX, Node, wait_for
from gc_rig import START, ClockStore, InlinePool
from history import SECTOR

import glidefs.clock
import glidefs.gc
import glidefs.images.bases
import glidefs.lineage
import glidefs.roots
import glidefs.volume.compactor
import glidefs.volume.lease
import glidefs.volume.pace
import glidefs.volume.uploader
from glidefs import names
from glidefs.formats.manifest import (
    EMPTY_PAGE,
    NO_ID,
    PAGE_CHUNKS,
    PackRef,
    Page,
    Root,
    decode_page,
    decode_root,
)
from glidefs.formats.pack import BLOCK, CHUNK_BLOCKS, PackEntry, PackIndex, decode_index, decode_payload
from glidefs.store.base import Body

GRACE = 1000.0
SECTORS = BLOCK // SECTOR
NODES = ("a", "b")
CLOCKED: tuple[Any, ...] = (
    glidefs.images.bases,
    glidefs.lineage,
    glidefs.roots,
    glidefs.volume.compactor,
    glidefs.volume.lease,
    glidefs.volume.uploader,
)
"""Modules whose times count against the grace."""

LOG = logging.getLogger("glidefs")

Content = dict[int, int]
"""Tags by sector; what is not in it is zero."""


def tagged(tag: int, sector: int) -> bytes:
    """What a sector holds that was written with ``tag``."""
    return (tag.to_bytes(4, "little") + (sector & 0xFFFFFFFF).to_bytes(4, "little")) * (SECTOR // 8)


def want(content: Content, sector: int) -> bytes:
    tag = content.get(sector)
    return bytes(SECTOR) if tag is None else tagged(tag, sector)


def show(data: bytes) -> str:
    return "zeros" if not any(data) else f"tag {int.from_bytes(data[:4], 'little')}"


class SlowStore(ClockStore):
    """``after_pack`` is called once a pack was put, on the thread that put it, and not within itself."""

    def __init__(self) -> None:
        super().__init__()
        self.after_pack: Callable[[], object] | None = None
        self._once = threading.Lock()

    def put(self, key: str, data: Body, *, if_match: str | None = None, if_none_match: bool = False) -> str:
        etag = super().put(key, data, if_match=if_match, if_none_match=if_none_match)
        if "/packs/" in key:
            with self._once:
                call, self.after_pack = self.after_pack, None
            if call is not None:
                call()
        return etag

    def etag_of(self, key: str) -> str | None:
        """Without a request."""
        with self._lock:
            found = self._objects.get(key)
        return found[1].etag if found else None

    def clear(self) -> None:
        with self._lock:
            self._objects.clear()


class Clock:
    """Stands in for the module ``time``."""

    def __init__(self, store: ClockStore) -> None:
        self._store = store

    def time(self) -> float:
        return self._store.now

    monotonic = time

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


class World:
    """The store and the nodes that all examples share."""

    def __init__(self) -> None:
        where = "/dev/shm" if os.path.isdir("/dev/shm") else None
        self.home = Path(tempfile.mkdtemp(prefix="glidefs-fork-model-", dir=where))
        self.store = SlowStore()
        self.clock = Clock(self.store)
        # Packs never change.
        self._indices: dict[str, PackIndex] = {}
        self._payloads: dict[tuple[str, int], bytes] = {}
        self.nodes = {
            name: Node(
                self.home / name,
                self.store,
                grace=GRACE,
                segment_bytes=32 * SECTOR,
                cache_bytes=16 * BLOCK,
                pack_bytes=256 << 10,
                read_ahead_bytes=0,
                compact_width=4,
                settle_width=1,
                backoff=0.002,
                poll_interval=3600.0,
                retire_segments=8,
            )
            for name in NODES
        }
        atexit.register(self.close)

    def close(self) -> None:
        for node in self.nodes.values():
            node.close()
        shutil.rmtree(self.home, ignore_errors=True)

    @contextlib.contextmanager
    def clocked(self) -> Iterator[None]:
        """All that counts against the grace goes by the store's clock."""
        sample, elapsed = glidefs.volume.pace._SAMPLE, glidefs.clock.elapsed
        level = LOG.level
        LOG.setLevel(logging.CRITICAL)  # fences by the hundred
        for module in CLOCKED:
            module.time = self.clock
        glidefs.clock.elapsed = self.clock.monotonic
        glidefs.volume.pace._SAMPLE = 0.0002
        pool, glidefs.gc.ThreadPoolExecutor = glidefs.gc.ThreadPoolExecutor, InlinePool  # type: ignore[misc]
        try:
            yield
        finally:
            LOG.setLevel(level)
            glidefs.gc.ThreadPoolExecutor = pool  # type: ignore[misc]
            glidefs.volume.pace._SAMPLE, glidefs.clock.elapsed = sample, elapsed
            for module in CLOCKED:
                module.time = time

    def begin(self) -> None:
        """An empty store, and nodes that know nothing."""
        self.store.clear()
        self._indices.clear()
        self._payloads.clear()
        self.store.now = START
        self.store.after_pack = None
        for node in self.nodes.values():
            for entry in node.router.table.all():
                node.router._opener.close_entry(entry, remove_device=True)
                node.router._opener.forget(entry)
                node.router.table.drop(entry)
            for base in node.bases.manifests.names():
                node.bases.forget(*base)
            node.bases._checked.clear()
            self.evict(node)
        for name in NODES:
            shutil.rmtree(self.home / name / "logs", ignore_errors=True)
            (self.home / name / "logs").mkdir()

    @staticmethod
    def evict(node: Node) -> None:
        """From now on reads go to the store."""
        node.engine.cache.evict_all()
        node.host.meta.indices.clear()

    def rest(self) -> None:
        """Wait until no node is about to upload: a job may be left over of a drain that has returned."""

        def at_rest() -> bool:
            soon = time.monotonic() + 60.0
            for node in self.nodes.values():
                scheduler = node.host.scheduler
                with scheduler._wake:
                    if any(job.busy or job.due < soon for job in scheduler._jobs.values()):
                        return False
            return True

        wait_for(at_rest, "rest")

    def gc(self) -> glidefs.gc.GcResult:
        result = glidefs.gc.collect(self.store, PREFIX, grace=GRACE)
        self.check_named()
        return result

    # -- what the store has, by the formats alone ----------------------------------------------

    def root(self, key: str) -> Root:
        return decode_root(key, self.store.data(key))

    def root_keys(self) -> list[str]:
        found = []
        for key in sorted(self.store.key_set()):
            match key.split("/"):
                case [_, "volumes", _, "manifest"] | [_, "volumes", _, "snapshots", _] | [_, "tags", _]:
                    found.append(key)
                case [_, "bases", _, "manifest"]:
                    found.append(key)
        return found

    def ages(self, keys: set[str]) -> dict[str, float]:
        return {key: self.store.now - self.store.head(key).last_modified for key in keys}

    def root_etags(self) -> dict[str, str | None]:
        return {key: self.store.etag_of(key) for key in self.root_keys()}

    def pages(self, root: Root) -> Iterator[tuple[int, Page]]:
        if root.inline_page is not None:
            yield 0, root.inline_page
        for number, page_id in enumerate(root.page_ids):
            if page_id:
                key = names.page_key(PREFIX, page_id.hex())
                yield number, decode_page(key, self.store.data(key))

    def named(self) -> set[str]:
        """The keys of what the roots name. A page that is gone raises KeyError."""
        found: set[str] = set()
        for key in self.root_keys():
            root = self.root(key)
            found |= {names.page_key(PREFIX, page_id.hex()) for page_id in root.page_ids if page_id}
            for _, page in self.pages(root):
                found |= {names.pack_key(PREFIX, ref.id.hex()) for ref in page.packs}
        return found

    def objects(self) -> set[str]:
        """The keys of packs and pages."""
        return self.store.key_set(f"{PREFIX}/packs/") | self.store.key_set(f"{PREFIX}/pages/")

    def check_named(self) -> None:
        """Nothing that a root names is gone; copies of roots belong to nobody."""
        lost = self.named() - self.objects()
        assert not lost, f"deleted, and still named: {lost}"
        for key in self.root_keys():
            root = self.root(key)
            if "/snapshots/" in key or "/tags/" in key or "/bases/" in key:
                assert (root.log_id, root.owner_node) == (NO_ID, ""), f"{key} has an owner"

    def stored(self, key: str, sectors: list[int]) -> dict[int, bytes]:
        """What the root under ``key`` says that these sectors hold."""
        root = self.root(key)
        pages = dict(self.pages(root))
        found: dict[int, bytes] = {}
        for sector in sectors:
            block = sector // SECTORS
            number, chunk = divmod(block // CHUNK_BLOCKS, PAGE_CHUNKS)
            page = pages.get(number, EMPTY_PAGE)
            refs = [page.packs[index] for index in page.chunks.get(chunk, ())]
            found[sector] = self._sector(refs, block, sector % SECTORS)
        return found

    def _sector(self, refs: list[PackRef], block: int, at: int) -> bytes:
        for ref in reversed(refs):
            key = names.pack_key(PREFIX, ref.id.hex())
            for entry in self._index(key, ref).range(block, 1):
                if entry.mask >> at & 1:
                    payload = self._payload(key, entry)
                    skip = (entry.mask & ((1 << at) - 1)).bit_count() * SECTOR
                    return payload[skip : skip + SECTOR]
                if entry.zero_mask >> at & 1:
                    return bytes(SECTOR)
        return bytes(SECTOR)

    def _index(self, key: str, ref: PackRef) -> PackIndex:
        data = self.store.data(key)
        if key not in self._indices:
            self._indices[key] = decode_index(key, data[-ref.index_length :], len(data))
        return self._indices[key]

    def _payload(self, key: str, entry: PackEntry) -> bytes:
        found = self._payloads.get((key, entry.block))
        if found is None:
            data = self.store.data(key)[entry.offset : entry.offset + entry.stored]
            found = self._payloads[key, entry.block] = bytes(decode_payload(key, entry, data))
        return found


_world: World | None = None


def shared_world() -> World:
    global _world
    if _world is None:
        _world = World()
    return _world
