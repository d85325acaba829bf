"""Prometheus metrics: gathered when they are asked for, so that an idle daemon spends nothing on them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate
from pathlib import Path

from msgspec import Struct

from glidefs.bases.manifest_cache import CacheStats
from glidefs.core.engine import EngineStats
from glidefs.core.figures import OPS, VolumeInfo, VolumeStats, stats
from glidefs.daemon.exposition import and_label, counter, gauge, histogram, labels
from glidefs.exports.requests import ExportStatus
from glidefs.exports.survey import Seen
from glidefs.handoff.history import BOUNDS, OUTCOMES, Totals
from glidefs.store.counters import StoreMetrics

BUCKET_UNIT = 256e-9
"""Seconds; bucket b of the core covers [2**(b/2), 2**((b+1)/2)) units (csrc/volume/stats.h)."""
FIRST_POWER, LAST_POWER = 2, 28
"""Buckets shown are powers of two of the unit: 1 us to 69 s."""


class ExportFigures(Struct, frozen=True, kw_only=True, gc=False):
    """One served export."""

    name: str
    transport: str
    info: VolumeInfo
    stats: VolumeStats


def figures_of(exports: list[Seen]) -> list[ExportFigures]:
    """Of the exports whose volumes are open, the counters with them."""
    open_ones = [
        (of.status, of.core, of.info) for of in exports if of.core is not None and of.info is not None
    ]
    found = stats([core for _, core, _ in open_ones])
    return [
        ExportFigures(name=status.name, transport=status.transport, info=info, stats=counters)
        for (status, _, info), counters in zip(open_ones, found, strict=True)
        if counters is not None  # closed meanwhile
    ]


class Snapshot(Struct, frozen=True, kw_only=True):
    """Everything at one moment. `troubles`: how many lines `/health` has; None is what is not there yet."""

    engine: EngineStats | None
    exports: list[ExportFigures]
    statuses: list[ExportStatus]
    store: StoreMetrics | None
    started_at: float
    bases: Mapping[str, CacheStats] = {}
    fault_fetches: int = 0
    handoffs: Totals = Totals()
    shadow: bool = False
    troubles: int = 0


class Metrics:
    """`render()` gives the text of GET /metrics."""

    def __init__(self, gather: Callable[[], Snapshot]) -> None:
        self._gather = gather

    def render(self) -> bytes:
        """The exposition format, version 0.0.4."""
        return "".join(_families(self._gather())).encode()


def _families(snapshot: Snapshot) -> Iterator[str]:
    yield from _process(snapshot)
    if snapshot.engine is not None:
        yield from _engine(snapshot.engine)
    if snapshot.store is not None:
        yield from _store(snapshot.store)
    yield from _bases(snapshot.bases)
    yield from _handoffs(snapshot.handoffs)
    yield _counter("fault_fetches", "Guest faults that the store was asked for", snapshot.fault_fetches)
    yield from _volumes(snapshot.exports)
    if snapshot.shadow:
        yield from _shadow(snapshot.exports)
    yield from _operations(snapshot.exports)
    yield _latency(snapshot.exports)


def rss_bytes() -> int:
    """Resident memory of this process."""
    fields = Path("/proc/self/statm").read_text(encoding="ascii").split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


def _gauge(name: str, text: str, value: float) -> str:
    return gauge(name, text, [("", value)])


def _counter(name: str, text: str, value: float) -> str:
    return counter(name, text, [("", value)])


def _process(snapshot: Snapshot) -> Iterator[str]:
    yield _gauge("process_resident_memory_bytes", "Resident memory of the daemon", rss_bytes())
    yield _gauge("start_time_seconds", "When the daemon started, unix time", snapshot.started_at)
    states = Counter(status.state for status in snapshot.statuses)
    yield gauge(
        "exports", "Exports by state", [(labels(state=state), count) for state, count in states.items()]
    )
    yield _gauge("troubles", "What is wrong, as /health says it: 0 = all is well", snapshot.troubles)
    yield gauge(
        "fenced",
        "1 if this host may not serve the volume any more",
        [
            (labels(export=status.name, transport=status.transport), int(status.state == "fenced"))
            for status in snapshot.statuses
        ],
    )


def _engine(stats: EngineStats) -> Iterator[str]:
    yield _gauge("log_bytes", "Bytes that all write logs allocate", stats.log_bytes)
    yield _gauge("log_limit_bytes", "Bytes that all write logs may allocate", stats.log_limit)
    yield _gauge("map_bytes", "Memory of log maps and block maps", stats.map_bytes)
    yield _gauge("map_budget_bytes", "Memory that maps may take", stats.map_budget)
    yield _gauge("cache_blocks", "Blocks in the block cache", stats.cache_used)
    yield _gauge("cache_capacity_blocks", "Blocks that the block cache can hold", stats.cache_slots)
    yield _counter("cache_hits", "Look-ups of the block cache that found the block", stats.cache_hits)
    yield _counter("cache_misses", "Look-ups of the block cache that did not", stats.cache_misses)
    yield _counter("cache_evictions", "Blocks evicted from the block cache", stats.cache_evictions)
    yield _gauge("nbd_reply_bytes", "Replies and send buffers of NBD connections", stats.nbd_replies)
    yield _gauge("nbd_payload_bytes", "What NBD clients sent that has to wait", stats.nbd_payloads)
    yield _counter("cache_lost", "Blocks that the disk of the block cache lost", stats.cache_lost)
    yield _gauge("cache_errno", "Why the block cache's disk is not used now; 0 = it works", stats.cache_errno)
    yield _gauge("faults_queued", "Absent runs of blocks that wait for a reader thread", stats.faults_queued)
    yield _gauge("workers", "I/O worker threads", stats.workers)


def _store(figures: StoreMetrics) -> Iterator[str]:
    for name, text, counts in (
        ("store_requests", "Requests to the object store", figures.requests),
        ("store_errors", "Requests to the object store that failed", figures.errors),
        ("store_retries", "Requests to the object store that were tried again", figures.retries),
    ):
        yield counter(name, text, [(labels(op=op), count) for op, count in sorted(counts.items())])
    yield _counter("store_received_bytes", "Payload bytes read from the object store", figures.bytes_in)
    yield _counter("store_sent_bytes", "Payload bytes written to the object store", figures.bytes_out)
    yield _gauge("store_waiting", "Calls that wait for a place, a retry or the store", figures.waiting)
    yield _gauge("store_up", "0 while the breaker holds requests back", float(figures.breaker == "closed"))
    yield _gauge("store_down_seconds", "For how long the store has not answered", figures.down_seconds)


def _handoffs(totals: Totals) -> Iterator[str]:
    """Counts go on from process to process."""
    outcomes = zip(OUTCOMES, totals.outcomes, strict=True)
    yield counter(
        "handoffs", "Handoffs by outcome", [(labels(outcome=outcome), count) for outcome, count in outcomes]
    )
    bounds = [*(repr(bound) for bound in BOUNDS), "+Inf"]
    buckets: list[tuple[str, float]] = list(zip(bounds, accumulate(totals.buckets), strict=True))
    yield histogram(
        "handoff_stall_seconds", "How long guests waited in a handoff", [("", buckets, totals.stall_seconds)]
    )


_CACHE_FIGURES: tuple[tuple[str, str, Callable[..., str], Callable[[CacheStats], float]], ...] = (
    ("base_cache_entries", "Bases kept in memory", gauge, lambda s: s.entries),
    ("base_cache_capacity", "Bases that can be kept", gauge, lambda s: s.capacity),
    ("base_cache_hits", "Look-ups answered from memory", counter, lambda s: s.hits),
    ("base_cache_misses", "Look-ups that began a load", counter, lambda s: s.misses),
    ("base_cache_evictions", "Bases that made room", counter, lambda s: s.evictions),
    ("base_cache_failures", "Loads that failed", counter, lambda s: s.failures),
    ("base_cache_load_seconds", "Time that loads took", counter, lambda s: s.load_seconds),
)


def _bases(caches: Mapping[str, CacheStats]) -> Iterator[str]:
    for name, text, family, read in _CACHE_FIGURES:
        yield family(name, text, [(labels(cache=cache), read(stats)) for cache, stats in caches.items()])


_VOLUME_GAUGES: tuple[tuple[str, str, Callable[[ExportFigures], float]], ...] = (
    ("size_bytes", "Size of the volume", lambda e: e.info.size),
    ("dirty_bytes", "Log bytes that are not in the store", lambda e: e.info.dirty_bytes),
    ("oldest_dirty_seconds", "Age of the oldest write that is not in the store", lambda e: e.info.dirty_age),
    ("export_log_bytes", "Bytes that the export's write log allocates", lambda e: e.info.log_bytes),
    ("export_map_bytes", "Memory of the export's maps", lambda e: e.info.map_bytes),
    ("parked_requests", "Requests that wait for space, blocks or the store", lambda e: e.info.parked),
    (
        "longest_wait_seconds",
        "For how long the request has waited that waits longest",
        lambda e: e.info.longest_wait_ns / 1e9,
    ),
    ("connections", "NBD connections", lambda e: e.info.connections),
    ("volume_errno", "errno that all I/O fails with, 0 while serving", lambda e: e.info.failed),
)
_VOLUME_COUNTERS: tuple[tuple[str, str, Callable[[ExportFigures], float]], ...] = (
    ("faults", "Faults on absent blocks", lambda e: e.stats.faults),
    ("log_hits", "Block reads answered by the write log", lambda e: e.stats.log_hits),
    ("cache_reads", "Block reads answered by the block cache", lambda e: e.stats.cache_reads),
    ("zero_reads", "Block reads of zeros", lambda e: e.stats.zero_reads),
    ("unaligned_writes", "Writes that had to read first", lambda e: e.stats.rmw),
    ("log_syncs", "fdatasync calls on the write log", lambda e: e.stats.syncs),
    ("log_full_waits", "Writes that waited for log space", lambda e: e.stats.log_full_waits),
    ("map_full_waits", "Writes that waited for map memory", lambda e: e.stats.map_full_waits),
    (
        "paced_waits",
        "Times that writes were slowed down as uploads fell behind",
        lambda e: e.stats.paced,
    ),
)


def _volumes(exports: list[ExportFigures]) -> Iterator[str]:
    of = [labels(export=export.name, transport=export.transport) for export in exports]
    for name, text, read in _VOLUME_GAUGES:
        yield gauge(name, text, zip(of, map(read, exports), strict=True))
    of = [labels(export=export.name) for export in exports]
    for name, text, read in _VOLUME_COUNTERS:
        yield counter(name, text, zip(of, map(read, exports), strict=True))


def _shadow(exports: list[ExportFigures]) -> Iterator[str]:
    """Of shadow verify, only where it is on."""
    for name, text, fields in (
        ("shadow_compared_sectors", "Sectors read and compared", {"": "shadow_compared"}),
        ("shadow_differences", "Sectors of them that were not as expected", {"": "shadow_differences"}),
        (
            "shadow_skipped_sectors",
            "Sectors read and not compared: written meanwhile, or absent from the second source",
            {"changed": "shadow_changed", "absent": "shadow_absent"},
        ),
    ):
        yield counter(
            name,
            text,
            [
                (labels(export=export.name, **({"why": why} if why else {})), getattr(export.stats, field))
                for export in exports
                for why, field in fields.items()
            ],
        )


def _operations(exports: list[ExportFigures]) -> Iterator[str]:
    of = [
        and_label(label, "op", op)
        for export in exports
        for label in (labels(export=export.name),)
        for op in OPS
    ]
    for name, text, read in _OPERATIONS:
        values = [value for export in exports for value in read(export.stats)]
        yield counter(name, text, zip(of, values, strict=True))


_OPERATIONS: tuple[tuple[str, str, Callable[[VolumeStats], tuple[int, ...]]], ...] = (
    ("operations", "Guest requests", lambda s: s.ops),
    ("operation_bytes", "Bytes of guest requests", lambda s: s.bytes),
    ("operation_errors", "Guest requests that failed", lambda s: s.errors),
)


def _latency(exports: list[ExportFigures]) -> str:
    """Only operations that happened: a thousand idle exports must not mean 100,000 lines."""
    samples = (
        (labels(export=export.name, op=op), latency_buckets(counts), total / 1e9)
        for export in exports
        if any(export.stats.ops)
        for op, counts, total in zip(OPS, export.stats.latency, export.stats.latency_sum_ns, strict=True)
        if any(counts)
    )
    return histogram("operation_seconds", "Latency of guest requests", samples)


_POWERS = range(FIRST_POWER, LAST_POWER + 1)
_BOUNDS = (*(repr(BUCKET_UNIT * 2**power) for power in _POWERS), "+Inf")


def latency_buckets(counts: tuple[int, ...]) -> list[tuple[str, float]]:
    """Cumulative counts by upper bound in seconds, from the core's half-power-of-two buckets."""
    below = list(accumulate(counts, initial=0))
    return list(zip(_BOUNDS, [*(below[2 * power] for power in _POWERS), below[-1]], strict=True))
