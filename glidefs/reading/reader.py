"""From absent blocks to answers: manifest, pack indices, ranged GETs, verification, block cache.

The stamp of a fault was taken before the manifest is read here, so an answer from a manifest that
was replaced meanwhile is not mapped by the core (DESIGN section 5).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from glidefs.core.cache import BlockCache, Slot
from glidefs.core.check import CoreError
from glidefs.core.volume import (
    CoreVolume,
    Fill,
    holes_error,
    install_error,
    install_slot,
)
from glidefs.errors import CorruptObject, GlideError, NotFound
from glidefs.formats.manifest import PAGE_CHUNKS, PackRef
from glidefs.formats.pack import CHUNK_BLOCKS, PackIndex, payload_hash
from glidefs.manifest.keys import scoped_key
from glidefs.manifest.view import Manifest
from glidefs.reading.fetch import Buffers, Payloads, fetch, plan_ranges
from glidefs.reading.flights import Flights
from glidefs.reading.holes import ChunkHoles, Zeros, holes_of_page
from glidefs.reading.plan import BlockPlan, assemble, plan_block
from glidefs.store.base import ObjectStore
from glidefs.volume.settings import HostSettings

if TYPE_CHECKING:
    from glidefs.tracing.spans import Stages
    from glidefs.volume.volume import Volume

T = TypeVar("T")
Runs = Sequence[tuple[int, int]]
"""Runs of blocks: first block and number of blocks of each."""

log = logging.getLogger(__name__)

INSERT_PATIENCE = 5.0
"""Seconds to wait for a slot of the cache that is not pinned."""
_LOG_EVERY = 10.0


class Reader:
    """Resolves runs of blocks for all volumes of a host. Thread-safe; shares nothing but the caches."""

    def __init__(self, cache: BlockCache, settings: HostSettings, helpers: Executor | None) -> None:
        self._cache = cache
        self._settings = settings
        self._helpers = helpers
        self.flights = Flights()
        self.chunk_holes = ChunkHoles()
        self._buffers = Buffers(settings.fetch_bytes)
        self._last_loud: dict[str, float] = {}

    def resolve(
        self,
        volume: Volume,
        store: ObjectStore,
        first: int,
        count: int,
        stamp: int,
        *,
        leave: int = -1,
        stages: Stages | None = None,
    ) -> int:
        """Make blocks ``first`` up to ``first + count`` resident; returns how many the store was asked for.

        ``leave`` is a block that is put in the cache but not mapped: the marker of read-ahead. ``stages``
        notes what is done when.
        A block that does not verify is fetched once more from the store, with all that says where it is;
        one that is damaged there is answered with EIO. Raises StoreError when the store fails
        and Closed when the volume closes; what was answered until then stays answered.
        """
        try:
            return self._resolve(volume, store, [(first, count)], stamp, leave, self._helpers, stages)
        except (CorruptObject, NotFound) as error:
            if stages is not None:
                stages.fail(error)
                stages.enter("plan")
            if count == 1:
                return self._resolve_anew(volume, store, first, stamp, leave, error, stages)
            return sum(
                self.resolve(volume, store, block, 1, stamp, leave=leave, stages=stages)
                for block in range(first, first + count)
            )

    def _resolve_anew(
        self,
        volume: Volume,
        store: ObjectStore,
        block: int,
        stamp: int,
        leave: int,
        first: CorruptObject | NotFound,
        stages: Stages | None,
    ) -> int:
        """A block that could not be had: once more, believing nothing that is kept here."""
        try:
            volume.manifest(store).forget(block // CHUNK_BLOCKS)
            asked = self._resolve(volume, store, [(block, 1)], stamp, leave, self._helpers, stages)
        except (CorruptObject, NotFound) as error:
            if stages is not None:
                stages.give_up(error)
            self._damaged(volume, store, block, stamp, error)
            return 0
        log.warning("volume %s: block %d verified when it was fetched again: %s", volume.name, block, first)
        return asked

    def resolve_runs(
        self, volume: Volume, store: ObjectStore, runs: Runs, stamp: int, helpers: Executor
    ) -> None:
        """The same for several runs of blocks, whose requests ``helpers`` make.

        Raises CorruptObject and NotFound instead of an answer: a guest did not ask.
        """
        self._resolve(volume, store, runs, stamp, -1, helpers)

    def resolve_holes(self, volume: Volume, store: ObjectStore, chunk: int, count: int, stamp: int) -> None:
        """Say which blocks of ``count`` chunks from ``chunk`` on are zeros, by their packs' indices alone.

        What does not verify is fetched once more, for the first chunk alone, and EIO if it is damaged in
        the store. Raises StoreError and Closed as :meth:`resolve`.
        """
        try:
            self._resolve_holes(volume, store, range(chunk, chunk + count), stamp)
        except (CorruptObject, NotFound):
            try:
                volume.manifest(store).forget(chunk)
                self._resolve_holes(volume, store, range(chunk, chunk + 1), stamp)
            except (CorruptObject, NotFound) as error:
                log.error("volume %s: what chunk %d holds cannot be told: %s", volume.name, chunk, error)
                volume.core.install_holes(stamp, [holes_error(chunk, errno.EIO)])

    def _resolve_holes(self, volume: Volume, store: ObjectStore, chunks: range, stamp: int) -> None:
        manifest = volume.manifest(store)
        packs = {chunk: manifest.packs(chunk)[::-1] for chunk in chunks}
        refs = list(dict.fromkeys(ref for found in packs.values() for ref in found))
        indices = dict(zip(refs, load_indices(manifest, refs, self._helpers), strict=True))
        pages = {chunk // PAGE_CHUNKS for chunk, found in packs.items() if not found}
        holes = [holes_of_page(manifest, page) for page in sorted(pages)]
        for chunk, found in packs.items():
            if found:
                holes.append(self.chunk_holes.of(chunk, [indices[ref] for ref in found]))
        # Where the stamp is stale no page lands, and who asked must look again.
        volume.core.install_holes(stamp, [*holes, holes_error(chunks.start, 0)])

    def prepare(self, volume: Volume, store: ObjectStore, first: int, count: int) -> None:
        """Load all that a plan of these blocks is made from. Raises CorruptObject, NotFound, StoreError."""
        manifest = volume.manifest(store)
        for chunk, _, _ in split_chunks(first, count):
            load_indices(manifest, manifest.packs(chunk)[::-1], self._helpers)

    def _damaged(self, volume: Volume, store: ObjectStore, block: int, stamp: int, error: GlideError) -> None:
        now = time.monotonic()
        if now - self._last_loud.get(volume.name, -_LOG_EVERY) >= _LOG_EVERY:
            self._last_loud[volume.name] = now
            log.error("volume %s: block %d cannot be read: %s", volume.name, block, error)
        volume.core.install(stamp, [install_error(block, 1, errno.EIO)])

    def _resolve(
        self,
        volume: Volume,
        store: ObjectStore,
        runs: Runs,
        stamp: int,
        leave: int,
        helpers: Executor | None,
        stages: Stages | None = None,
    ) -> int:
        manifest = volume.manifest(store)
        zeros = Zeros(self.chunk_holes)
        plans: list[BlockPlan] = []
        for first, count in runs:
            plan_run(manifest, first, count, helpers, zeros, plans)
        zeros.install(volume.core, stamp)
        keys = {p.block: self._key(p, volume.prefix) for p in plans}
        run = _Run(volume.core, stamp, leave, keys, helpers, stages)
        asked = 0
        while plans:
            plans = self._answer_cached(run, plans)
            mine, others = self.flights.claim(run.keys[plan.block] for plan in plans)
            try:
                asked += len(mine)
                done = self._fetch(run, store, [plan for plan in plans if run.keys[plan.block] in mine])
            finally:
                self.flights.land(mine)
            # Blocks of equal key share the flight and find the slot in the next round.
            plans = [plan for plan in plans if plan.block not in done]
            if others and stages is not None:
                stages.enter("shared GET")
            for event in others:
                event.wait()
        return asked

    def _key(self, plan: BlockPlan, prefix: str) -> bytes:
        key = plan.key()
        return scoped_key(key, prefix) if self._settings.cache_scope == "prefix" else key

    def _answer_cached(self, run: _Run, plans: list[BlockPlan]) -> list[BlockPlan]:
        """Answer what the cache has; the plans of the other blocks."""
        slots = self._cache.lookup([run.keys[plan.block] for plan in plans])
        if not any(slots):
            return plans
        found: list[tuple[int, Slot]] = []
        missing: list[BlockPlan] = []
        for plan, slot in zip(plans, slots, strict=True):
            if slot is None or not self._is_good(slot):
                missing.append(plan)
            elif plan.block == run.leave:
                self._cache.unpin(slot)
            else:
                found.append((plan.block, slot))
        try:
            run.core.install(run.stamp, [install_slot(block, slot) for block, slot in found])
        except GlideError:
            for _, slot in found:
                self._cache.unpin(slot)
            raise
        return missing

    def _is_good(self, slot: Slot) -> bool:
        """Whether the content of a pinned slot is what it should be; a slot that is damaged is dropped."""
        if slot.verified:
            return True
        try:
            data = self._cache.read(slot)
            if payload_hash(data) == slot.hash:
                self._cache.mark_verified(slot, data)
                return True
        except CoreError as error:
            log.debug("block cache: a slot cannot be read: %s", error)
        self._cache.drop(slot)
        return False

    def _fetch(self, run: _Run, store: ObjectStore, plans: Sequence[BlockPlan]) -> set[int]:
        """Fetch blocks, put them in the cache and answer them; those that are done: one of equal ones."""
        if not plans:
            return set()
        wanted = [part for plan in plans for part in plan.payloads()]
        ranges = plan_ranges(wanted, self._settings.coalesce_gap, self._settings.fetch_bytes)
        stages = run.stages
        if stages is not None:
            stages.enter("GET")
        with self._buffers.lend(ranges) as room:
            payloads = fetch(store, ranges, run.helpers, room)
            if stages is not None:
                stages.enter("verify")
                stages.gets += len(ranges)
                stages.bytes += sum(part.length for part in ranges)
            return self._land(run, plans, payloads)

    def _land(self, run: _Run, plans: Sequence[BlockPlan], payloads: Payloads) -> set[int]:
        """Blocks whose payloads are here: verify, put in the cache, answer."""
        fills: dict[bytes, Fill] = {}
        for plan in plans:
            key = run.keys[plan.block]
            if key not in fills:
                data = assemble(plan, payloads)
                content = plan.parts[0].entry.hash if plan.whole else payload_hash(data)
                fills[key] = Fill(plan.block, key, content, data)
        rest = [fill for fill in fills.values() if fill.block != run.leave]
        while rest:
            rest = rest[_fill(run, rest) :]
        for fill in fills.values():
            if fill.block == run.leave:
                with contextlib.suppress(CoreError):  # read ahead, for nobody yet
                    self._cache.unpin(_patiently(partial(self._cache.insert, fill.key, fill.hash, fill.data)))
        return {fill.block for fill in fills.values()}


class _Run(NamedTuple):
    """Blocks of one volume on their way: where the answers go, and the keys of the blocks in the cache."""

    core: CoreVolume
    stamp: int
    leave: int
    keys: dict[int, bytes]
    helpers: Executor | None
    stages: Stages | None


def _fill(run: _Run, fills: list[Fill]) -> int:
    """Answer blocks by way of the cache; where no slot becomes free, without it. How many."""
    try:
        return _patiently(partial(run.core.fill, run.stamp, fills))
    except CoreError as error:
        if error.errno != errno.EAGAIN:
            raise
    return run.core.fill(run.stamp, fills, through=True)


def _patiently(insert: Callable[[], T]) -> T:
    """The result of ``insert``, tried again for a while where every slot of the cache is pinned."""
    give_up = time.monotonic() + INSERT_PATIENCE
    pause = 0.0005
    while True:
        try:
            return insert()
        except CoreError as error:
            if error.errno != errno.EAGAIN or time.monotonic() > give_up:
                raise
        time.sleep(pause)
        pause = min(pause * 2, 0.05)


def plan_run(
    manifest: Manifest,
    first: int,
    count: int,
    helpers: Executor | None,
    zeros: Zeros,
    plans: list[BlockPlan],
) -> None:
    """Add what a run of blocks is made of: those that are zeros to ``zeros``, the others to ``plans``."""
    for chunk, start, stop in split_chunks(first, count):
        refs = manifest.packs(chunk)
        if not refs:
            zeros.add_absent(manifest, start, stop - start)
            continue
        indices = load_indices(manifest, refs[::-1], helpers)
        for block in range(start, stop):
            plan = plan_block(block, indices)
            if plan.mask:
                plans.append(plan)
                continue
            zeros.add(block, indices)


def block_key(manifest: Manifest, block: int) -> bytes | None:
    """The key of a block's content in the scope of the host; None for zeros. Raises as a read does."""
    indices = load_indices(manifest, manifest.packs(block // CHUNK_BLOCKS)[::-1], None)
    plan = plan_block(block, indices)
    return plan.key() if plan.mask else None


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
