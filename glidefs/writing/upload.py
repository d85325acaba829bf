"""Uploads: sealed segments of one volume become packs, and one commit makes them part of it.

An upload is planned first: the sealed log is compared with the manifest and cut into packs. Zeros are cheap
in both directions: a chunk that an upload covers whole loses its older packs, in other chunks zeroed sectors
become mask bits, and where nothing older is they need no entry.

The order that a crash at any point survives: seal, fsync the segments, gather (verified), put packs,
put pages, put the root, fsync a local copy of it; only then may the segments go.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from typing import TYPE_CHECKING, NamedTuple

from glidefs import clock
from glidefs.core import heap
from glidefs.core.check import Closed, CoreError
from glidefs.core.gather import Gather, GatherExtent
from glidefs.core.packs import GatherChunk, PackJob, PackRules, UploadPlan
from glidefs.errors import Fenced, GlideError, StoreError
from glidefs.formats.pack import (
    BLOCK,
    CHUNK_BLOCKS,
    HEADER_SIZE,
    MAX_ENTRIES,
    SECTOR,
    encode_header,
)
from glidefs.manifest.cache import MetaCache
from glidefs.manifest.commit import Append, Change, Superseded
from glidefs.manifest.view import Manifest, block_count
from glidefs.store.base import Buffer
from glidefs.store.packs import BuiltPack, put_body
from glidefs.store.resilient import ResilientStore
from glidefs.volume.settings import HostSettings
from glidefs.writing.pace import Burst

if TYPE_CHECKING:
    from glidefs.volume.volume import Volume

log = logging.getLogger(__name__)

LOOK = 0.2
"""Seconds between two looks whether a volume closes whose packs are queued."""
REPLANS = 8
"""How often an upload is planned again on a root that the store turned out to have."""

SAMPLES = 32
SAMPLE = 4 * SECTOR
SHRINKS = 970
"""A sample that keeps more than this part of a thousand says that a pack is not worth compressing."""


class Uploaded(NamedTuple):
    """What one commit carried."""

    segment: int
    packs: int
    bytes: int
    chunks: frozenset[int] = frozenset()


class Cut(NamedTuple):
    """``drops``: chunks whose older packs are covered whole; ``jobs``: packs, ascending by block."""

    drops: frozenset[int]
    jobs: list[PackJob]


class Counters:
    """Totals of the host. ``lock`` guards them."""

    __slots__ = ("commits", "compacted_bytes", "compacted_packs", "lock", "pack_bytes", "packs")

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.commits = 0
        self.packs = 0
        self.pack_bytes = 0
        self.compacted_packs = 0
        self.compacted_bytes = 0


class Life:
    """Whether uploads go on. The scheduler sets it under its lock; uploads under way read it without."""

    __slots__ = ("crowded", "give_up_at", "pauses", "stopping")

    def __init__(self) -> None:
        self.stopping = False
        """The host ends: what waits for the store is given up."""
        self.pauses = 0
        """How many wait for uploads to end."""
        self.give_up_at = 0.0
        """The time, of ``time.monotonic()``, after which a pause has taken too long."""
        self.crowded = False
        """The logs of the host fill: uploads step back for nobody. The throttle's thread sets it."""

    @property
    def pausing(self) -> bool:
        """Give up what waits for the store; it is done again later."""
        return self.pauses > 0

    @property
    def hurried(self) -> bool:
        """Whether uploads step back for nobody."""
        return self.crowded or self.pausing

    @property
    def giving_up(self) -> bool:
        """Give up what is under way, too."""
        return self.pauses > 0 and time.monotonic() >= self.give_up_at


class Paused(GlideError):
    """What is left of an upload waits until the host goes on."""

    temporary = True


class Uploader:
    """Uploads volumes; the scheduler says which and when, one job per volume at a time.

    ``puts`` builds and puts packs; at most ``put_threads`` are held in memory at once.
    """

    def __init__(
        self,
        store: ResilientStore,
        meta: MetaCache,
        settings: HostSettings,
        puts: Executor,
    ) -> None:
        self._store = store.view("upload", settings.store_patience)
        self._reads = store.view("read", settings.store_patience)
        self._meta = meta
        self._settings = settings
        self._puts = puts
        self._rules = PackRules(settings.compression_level, SAMPLES, SAMPLE, SHRINKS)
        self.bodies = heap.Bodies(HEADER_SIZE + max(settings.pack_bytes, BLOCK))
        self.life = Life()
        self.counters = Counters()

    def upload(self, volume: Volume, last: int, size: int, burst: Burst | None = None) -> Uploaded:
        """Upload and commit the sealed segments up to ``last``; ``size`` goes into the root.

        With ``burst`` it steps back while that lasts.

        Raises Fenced, Closed, CorruptLog, and StoreError (temporary: call again, nothing is lost).
        """
        for _ in range(REPLANS):
            try:
                return self._upload(volume, last, size, burst)
            except Superseded as error:
                log.info("%s; planning again", error)
        raise StoreError("the root keeps changing", key=volume.name, op="commit", temporary=True)

    def _upload(self, volume: Volume, last: int, size: int, burst: Burst | None) -> Uploaded:
        committer = volume.committer
        self._check_first_put(volume)
        committer.publish(self._store)
        if volume.done_segment >= last and not volume.root_lags:
            return Uploaded(volume.done_segment, 0, 0)
        started = clock.elapsed()
        adoptions = committer.adoptions
        built: list[BuiltPack] = []
        drops: frozenset[int] = frozenset()
        if volume.done_segment < last:
            try:
                volume.core.sync()
            except CoreError as error:
                # A sticky fdatasync failure ends with this upload, which verifies what it reads.
                log.warning("volume %s: %s; uploading what the page cache has", volume.name, error)
                with contextlib.suppress(CoreError):
                    volume.core.sync()  # the mark of the failure: a start without the local root looks for it
            with Gather(
                volume.core, volume.log_dir, volume.id, volume.log_id, volume.done_segment + 1, last
            ) as gather:
                manifest = committer.manifest(self._reads)
                with UploadPlan(gather, manifest.root.size) as plan:
                    drops, jobs = plan_upload(plan, gather.extents(), manifest, self._settings.pack_bytes)
                    if burst is not None:
                        burst.step_back(clock.elapsed() - started)
                    built = self._put_all(volume, plan, jobs, burst)
        if clock.elapsed() - started > self._settings.gc_grace / 2:
            # The collector may take packs that no manifest named in time: make them anew.
            raise StoreError("the upload took too long", key=volume.name, op="commit", temporary=True)
        for pack in built:
            self._meta.add_index(pack.ref, pack.index, pack.tail)
        change = Change(
            drops=drops,
            appends=tuple(Append(pack.ref, pack.chunks) for pack in built),
            size=size,
            transport=volume.record.transport,
            last_segment=max(last, committer.root.last_segment),
        )
        self.retry(volume, lambda: committer.commit(self._store, change, adoptions), started)
        volume.size_committed(size)
        with self.counters.lock:
            self.counters.commits += 1
        chunks = frozenset(chunk for pack in built for chunk in pack.chunks)
        return Uploaded(last, len(built), sum(pack.ref.size for pack in built), chunks)

    def _check_first_put(self, volume: Volume) -> None:
        """A fork's root names packs of its source, which the collector keeps only so long for it."""
        root = volume.root
        if volume.committer.published or not root.source:
            return
        since = root.created_at or volume.opened_at
        late = time.time() - since > self._settings.gc_grace / 4
        if late and not volume.committer.was_published(self._store):
            raise Fenced(
                volume.name,
                f"the first root of this fork of {root.source} could not be put in time; make the fork again",
            )

    def poll(self, volume: Volume) -> None:
        """Find out whether another host took the volume. Raises Fenced, StoreError."""
        volume.committer.poll(self._reads, adopt=not volume.read_only)

    def _put_all(
        self, volume: Volume, plan: UploadPlan, jobs: list[PackJob], burst: Burst | None
    ) -> list[BuiltPack]:
        """Build and put packs, a few at a time. All are finished or given up on return."""
        built: list[BuiltPack] = []
        waiting: deque[Future[BuiltPack]] = deque()
        todo = iter(jobs)
        error: BaseException | None = None
        while True:
            began = time.monotonic()
            most = 1 if burst is not None and burst.lasts() else self._settings.put_threads
            if error is None and self.life.giving_up:
                error = Paused(f"volume {volume.name}: uploads pause")
            while error is None and len(waiting) < most:
                job = next(todo, None)
                if job is None:
                    break
                waiting.append(self._puts.submit(self._put_one, volume, plan, job))
            if not waiting:
                break
            try:
                built.append(self._result(volume, waiting.popleft()))
                if burst is not None:
                    burst.step_back(time.monotonic() - began)
            except BaseException as caught:
                error = error or caught
        if error is not None:
            raise error
        return built

    def _result(self, volume: Volume, future: Future[BuiltPack]) -> BuiltPack:
        """The result of a pack. When the volume closes, one that is queued is given up.

        It may be behind those of other volumes, which wait for the store.
        """
        while True:
            try:
                return future.result(LOOK)
            except TimeoutError:
                if future.done():
                    raise
                if (volume.closing or self.life.stopping) and future.cancel():
                    raise Closed(f"volume {volume.name} closes") from None

    def _put_one(self, volume: Volume, plan: UploadPlan, job: PackJob) -> BuiltPack:
        with self.bodies.borrow() as body:
            parts = plan.build(job, self._rules, body)
            body[:HEADER_SIZE] = encode_header()
            pack = put_body(
                lambda key, data: self.put(volume, key, data),
                volume.prefix,
                volume.id,
                [body[: parts.end]],
                parts.records,
                parts.chunks,
                0,
            )
        with self.counters.lock:
            self.counters.packs += 1
            self.counters.pack_bytes += pack.ref.size
        return pack

    def put(self, volume: Volume, key: str, body: list[Buffer]) -> None:
        """Put a pack, through outages, until the volume closes or is fenced."""
        if volume.closing or self.life.stopping:
            raise Closed(f"volume {volume.name} closes")  # who closes it waits for the upload
        self.retry(volume, lambda: self._store.put(key, body), clock.elapsed())

    def retry(self, volume: Volume, action: Callable[[], object], since: float) -> None:
        """Run ``action``, again after temporary store errors, for at most half the grace from ``since``.

        Not for a volume that is fenced, whoever found that out.
        """
        while True:
            if volume.fenced:
                raise Fenced(volume.name, volume.fenced)
            try:
                action()
                volume.last_error = ""
                return
            except StoreError as error:
                if not error.temporary:
                    raise
                volume.last_error = str(error)
                if volume.closing or self.life.stopping:
                    raise Closed(f"volume {volume.name} closes") from error
                if self.life.pausing or clock.elapsed() - since > self._settings.gc_grace / 2:
                    raise
            time.sleep(0.05)  # the store's own wrapper did the waiting


def plan_upload(plan: UploadPlan, zeros: Sequence[GatherExtent], manifest: Manifest, pack_bytes: int) -> Cut:
    """Cut a gather over ``manifest`` into packs of ``pack_bytes`` plain bytes; ``zeros`` are its extents."""
    chunks = plan.chunks()
    drops = covered_chunks(chunks, zeros, manifest)
    # Where nothing older is, zeros hide nothing.
    keep = bytes(bool(c.zeros and c.chunk not in drops and manifest.packs(c.chunk)) for c in chunks)
    runs = list(_zero_runs(zeros, manifest, drops))
    return Cut(drops, plan.cut(keep, runs, pack_bytes, MAX_ENTRIES - 1))


def covered_chunks(
    chunks: Sequence[GatherChunk], zeros: Sequence[GatherExtent], manifest: Manifest
) -> frozenset[int]:
    """The chunks of the manifest that a gather covers whole.

    Only blocks within the manifest's size count: those that a grow added since are in no pack.
    """
    blocks_end = block_count(manifest.root.size)
    covered = Counter({c.chunk: c.whole for c in chunks if c.whole})
    for extent in zeros:
        end = min(extent.block + extent.count, blocks_end)
        if extent.block >= end:
            continue
        for chunk in manifest.present(extent.block // CHUNK_BLOCKS, (end - 1) // CHUNK_BLOCKS):
            start, stop = chunk * CHUNK_BLOCKS, (chunk + 1) * CHUNK_BLOCKS
            covered[chunk] += min(stop, end) - max(start, extent.block)
    return frozenset(
        chunk
        for chunk, blocks in covered.items()
        if blocks >= manifest.blocks_of(chunk) > 0 and manifest.packs(chunk)
    )


def _zero_runs(
    zeros: Sequence[GatherExtent], manifest: Manifest, drops: frozenset[int]
) -> Iterator[GatherExtent]:
    """The whole zero blocks in chunks that keep older packs, ascending."""
    for extent in sorted(zeros):
        end = extent.block + extent.count
        for chunk in manifest.present(extent.block // CHUNK_BLOCKS, (end - 1) // CHUNK_BLOCKS):
            if chunk not in drops:
                first = max(extent.block, chunk * CHUNK_BLOCKS)
                stop = min(end, chunk * CHUNK_BLOCKS + manifest.blocks_of(chunk))
                if first < stop:
                    yield GatherExtent(first, stop - first)
