"""Two nodes with routers, their store, and the clock that store, nodes and collector go by.

The clock stands still unless a test advances it. What the store has is read by the formats alone
(`stored.py`).
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

from fork_rig import PREFIX, Node
from gc_rig import START, ClockStore, InlinePool
from history import SECTOR
from stored import Stored
from waiting import wait_for

import glidefs.bases.stored
import glidefs.clock
import glidefs.compaction.compactor
import glidefs.exports.copies.pins
import glidefs.gc.run
import glidefs.manifest.lease
import glidefs.writing.pace
import glidefs.writing.upload
from glidefs.formats.pack import BLOCK
from glidefs.store.base import Body

GRACE = 1000.0
NODES = ("a", "b")
CLOCKED: tuple[Any, ...] = (
    glidefs.bases.stored,
    glidefs.exports.copies.pins,
    glidefs.compaction.compactor,
    glidefs.manifest.lease,
    glidefs.writing.upload,
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


class World(Stored):
    """The store and the nodes that all examples share."""

    def __init__(self) -> None:
        super().__init__(SlowStore())
        self.store: SlowStore
        where = "/dev/shm" if os.path.isdir("/dev/shm") else None
        self.home = Path(tempfile.mkdtemp(prefix="glidefs-fork-model-", dir=where))
        self.clock = Clock(self.store)
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
        sample, elapsed = glidefs.writing.pace._SAMPLE, glidefs.clock.elapsed
        level = LOG.level
        LOG.setLevel(logging.CRITICAL)  # fences by the hundred
        for module in CLOCKED:
            module.time = self.clock
        glidefs.clock.elapsed = self.clock.monotonic
        glidefs.writing.pace._SAMPLE = 0.0002
        pool, glidefs.gc.run.ThreadPoolExecutor = glidefs.gc.run.ThreadPoolExecutor, InlinePool  # type: ignore[misc]
        try:
            yield
        finally:
            LOG.setLevel(level)
            glidefs.gc.run.ThreadPoolExecutor = pool  # type: ignore[misc]
            glidefs.writing.pace._SAMPLE, glidefs.clock.elapsed = sample, elapsed
            for module in CLOCKED:
                module.time = time

    def begin(self) -> None:
        """An empty store, and nodes that know nothing."""
        self.store.clear()
        self.forget()
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

    def gc(self) -> glidefs.gc.run.GcResult:
        result = glidefs.gc.run.collect(self.store, PREFIX, grace=GRACE)
        self.check_named()
        return result


_world: World | None = None


def shared_world() -> World:
    global _world
    if _world is None:
        _world = World()
    return _world
