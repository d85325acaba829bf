"""From absent blocks to answers: manifest, pack indices, ranged GETs, verification, block cache.

The stamp of a fault was taken before the manifest is read here, so an answer from a manifest that
was replaced meanwhile is not mapped by the core (DESIGN section 5).
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from typing import Protocol

from glidefs.core.cache import BlockCache, Slot
from glidefs.core.check import Closed, CoreError
from glidefs.core.volume import CoreVolume, Install, install_error, install_slot, install_zero
from glidefs.errors import CorruptObject, GlideError, NotFound
from glidefs.formats.manifest import PackRef
from glidefs.formats.pack import CHUNK_BLOCKS, PackIndex, payload_hash
from glidefs.store.base import ObjectStore
from glidefs.volume.blocks import BlockPlan, assemble, plan_block
from glidefs.volume.fetch import fetch, plan_ranges
from glidefs.volume.flights import Flights
from glidefs.volume.keys import scoped_key
from glidefs.volume.meta import Manifest
from glidefs.volume.settings import HostSettings

log = logging.getLogger(__name__)

INSERT_PATIENCE = 5.0
"""Seconds to wait for a slot of the cache that is not pinned."""
_INSTALL_BATCH = 8
_LOG_EVERY = 10.0


class Readable(Protocol):
    """What the reader needs of a volume."""

    name: str
    prefix: str
    core: CoreVolume

    def manifest(self, store: ObjectStore) -> Manifest:
        """The manifest now in use, loading pages through ``store``."""


class Reader:
    """Resolves runs of blocks for all volumes of a host. Thread-safe; shares nothing but the caches."""

    def __init__(self, cache: BlockCache, settings: HostSettings, helpers: Executor | None) -> None:
        self._cache = cache
        self._settings = settings
        self._helpers = helpers
        self._flights = Flights()
        self._last_loud: dict[str, float] = {}

    def resolve(
        self,
        volume: Readable,
        store: ObjectStore,
        first: int,
        count: int,
        stamp: int,
        *,
        leave: int = -1,
    ) -> None:
        """Make blocks ``first`` up to ``first + count`` resident.

        ``leave`` is a block that is put in the cache but not mapped: the marker of read-ahead.
        Blocks whose packs are damaged are answered with EIO. Raises StoreError when the store fails
        and Closed when the volume closes; what was answered until then stays answered.
        """
        try:
            self._resolve(volume, store, first, count, stamp, leave)
        except (CorruptObject, NotFound) as error:
            if count == 1:
                self._damaged(volume, store, first, stamp, error)
                return
            for block in range(first, first + count):
                self.resolve(volume, store, block, 1, stamp, leave=leave)

    def _damaged(
        self, volume: Readable, store: ObjectStore, block: int, stamp: int, error: GlideError
    ) -> None:
        now = time.monotonic()
        if now - self._last_loud.get(volume.name, -_LOG_EVERY) >= _LOG_EVERY:
            self._last_loud[volume.name] = now
            log.error("volume %s: block %d cannot be read: %s", volume.name, block, error)
        volume.core.install(stamp, [install_error(block, 1, errno.EIO)])

    def _resolve(
        self, volume: Readable, store: ObjectStore, first: int, count: int, stamp: int, leave: int
    ) -> None:
        manifest = volume.manifest(store)
        zeros, plans = plan_run(manifest, first, count, self._helpers)
        if zeros:
            volume.core.install(stamp, zeros)
        answers = _Answers(volume.core, self._cache, stamp, leave)
        try:
            keys = {plan.block: self._key(plan, volume.prefix) for plan in plans}
            while plans:
                missing = [plan for plan in plans if not self._cached(plan, keys[plan.block], answers)]
                mine, others = self._flights.claim(keys[plan.block] for plan in missing)
                try:
                    self._fetch(store, [p for p in missing if keys[p.block] in mine], keys, answers)
                finally:
                    self._flights.land(mine)
                answers.send()
                # Blocks of equal key share the flight and find the slot in the next round.
                plans = [p for p in missing if p.block not in answers.done]
                for event in others:
                    event.wait()
        finally:
            answers.send()

    def _key(self, plan: BlockPlan, prefix: str) -> bytes:
        key = plan.key()
        return scoped_key(key, prefix) if self._settings.cache_scope == "prefix" else key

    def _cached(self, plan: BlockPlan, key: bytes, answers: _Answers) -> bool:
        slot = self._cache.lookup(key)
        if slot is None:
            return False
        if not slot.verified:
            try:
                good = payload_hash(self._cache.read(slot)) == slot.hash
            except CoreError as error:
                log.warning("block cache: a slot cannot be read: %s", error)
                good = False
            if not good:
                self._cache.drop(slot)
                return False
            self._cache.mark_verified(slot)
        self._answer(plan.block, slot, answers)
        return True

    def _answer(self, block: int, slot: Slot, answers: _Answers) -> None:
        if block == answers.leave:
            self._cache.unpin(slot)
            answers.done.add(block)
        else:
            answers.add(block, slot)

    def _fetch(
        self, store: ObjectStore, plans: Sequence[BlockPlan], keys: dict[int, bytes], answers: _Answers
    ) -> None:
        if not plans:
            return
        wanted = [part for plan in plans for part in plan.payloads()]
        ranges = plan_ranges(wanted, self._settings.coalesce_gap, self._settings.fetch_bytes)
        payloads = fetch(store, ranges, self._helpers)
        stored: set[bytes] = set()
        for plan in plans:
            key = keys[plan.block]
            if key in stored:
                continue
            data = assemble(plan, payloads)
            content = plan.parts[0].entry.hash if plan.whole else payload_hash(data)
            self._answer(plan.block, self._insert(key, content, data, answers), answers)
            stored.add(key)

    def _insert(self, key: bytes, content: bytes, data: bytes | bytearray, answers: _Answers) -> Slot:
        give_up = time.monotonic() + INSERT_PATIENCE
        pause = 0.0005
        while True:
            try:
                return self._cache.insert(key, content, data)
            except CoreError as error:
                if error.errno != errno.EAGAIN or time.monotonic() > give_up:
                    raise
            answers.send()  # our own pins may be those in the way
            time.sleep(pause)
            pause = min(pause * 2, 0.05)


class _Answers:
    """Answers not sent yet; each holds the pin of a slot."""

    __slots__ = ("_cache", "_core", "_list", "_stamp", "done", "leave")

    def __init__(self, core: CoreVolume, cache: BlockCache, stamp: int, leave: int) -> None:
        self._core = core
        self._cache = cache
        self._stamp = stamp
        self._list: list[tuple[int, Slot]] = []
        self.done: set[int] = set()
        self.leave = leave

    def add(self, block: int, slot: Slot) -> None:
        self._list.append((block, slot))
        self.done.add(block)
        if len(self._list) >= _INSTALL_BATCH:
            self.send()

    def send(self) -> None:
        batch, self._list = self._list, []
        if not batch:
            return
        try:
            self._core.install(self._stamp, [install_slot(block, slot) for block, slot in batch])
        except Closed:
            for _, slot in batch:
                self._cache.unpin(slot)
            raise


def plan_run(
    manifest: Manifest, first: int, count: int, helpers: Executor | None = None
) -> tuple[list[Install], list[BlockPlan]]:
    """What a run of blocks is made of: answers for zeros, plans for the others.

    The answer for a chunk that the manifest does not have covers the whole chunk.
    """
    zeros: list[Install] = []
    plans: list[BlockPlan] = []
    for chunk, start, stop in split_chunks(first, count):
        refs = manifest.packs(chunk)
        if not refs:
            base = chunk * CHUNK_BLOCKS
            zeros.append(install_zero(base, max(manifest.blocks_of(chunk), stop - base)))
            continue
        indices = load_indices(manifest, refs[::-1], helpers)
        for block in range(start, stop):
            plan = plan_block(block, indices)
            if plan.mask:
                plans.append(plan)
            elif zeros and zeros[-1].block + zeros[-1].count == block:
                zeros[-1] = install_zero(zeros[-1].block, zeros[-1].count + 1)
            else:
                zeros.append(install_zero(block, 1))
    return zeros, plans


def load_indices(manifest: Manifest, refs: Sequence[PackRef], helpers: Executor | None) -> list[PackIndex]:
    """The indices of packs, in their order; those that must be fetched are fetched in parallel."""
    cached = [manifest.cached_index(ref) for ref in refs]
    missing = [i for i, index in enumerate(cached) if index is None]
    futures = [helpers.submit(manifest.index, refs[i]) for i in missing[1:]] if helpers else []
    if missing:
        for i in missing[: 1 if helpers else None]:
            cached[i] = manifest.index(refs[i])
        for i, future in zip(missing[1:], futures, strict=False):
            cached[i] = future.result()
    return [index for index in cached if index is not None]


def split_chunks(first: int, count: int) -> Iterator[tuple[int, int, int]]:
    """(chunk, first block, block after the last) of each chunk that a run of blocks touches."""
    end = first + count
    while first < end:
        chunk = first // CHUNK_BLOCKS
        stop = min(end, (chunk + 1) * CHUNK_BLOCKS)
        yield chunk, first, stop
        first = stop
