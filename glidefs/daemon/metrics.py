"""Prometheus metrics: gathered when they are asked for, so that an idle daemon spends nothing on them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
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
from glidefs.version import commit, version

BUCKET_UNIT = 256e-9
"""Seconds; bucket b of the core covers [2**(b/2), 2**((b+1)/2)) units (csrc/volume/stats.h)."""
FIRST_POWER, LAST_POWER = 2, 28
"""Buckets shown are powers of two of the unit: 1 us to 69 s."""


class ExportFigures(Struct, frozen=True, kw_only=True, gc=False):
    """One export whose volume is open. ``stats``: None where only sums are asked for."""

    name: str
    transport: str
    info: VolumeInfo
    stats: VolumeStats | None = None


def figures_of(exports: list[Seen], *, counters: bool) -> list[ExportFigures]:
    """Of the exports whose volumes are open, with the counters of each or without."""
    open_ones = [
        (of.status, of.core, of.info) for of in exports if of.core is not None and of.info is not None
    ]
    found = stats([core for _, core, _ in open_ones]) if counters else [None] * len(open_ones)
    return [
        ExportFigures(name=status.name, transport=status.transport, info=info, stats=counts)
        for (status, _, info), counts in zip(open_ones, found, strict=True)
        if counts is not None or not counters  # closed meanwhile
    ]


class Snapshot(Struct, frozen=True, kw_only=True):
    """Everything at one moment. `troubles`: how many lines `/health` has; None is what is not there yet.

    ``totals``: the counters of the host, in place of those of each export.
    """

    engine: EngineStats | None
    exports: list[ExportFigures]
    totals: VolumeStats | None = None
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
    yield from _volumes(snapshot)
    counts = _counts(snapshot)
    yield from _counters(counts)
    if snapshot.shadow:
        yield from _shadow(counts)
    yield from _operations(counts)
    yield _latency(counts)


def rss_bytes() -> int:
    """Resident memory of this process."""
    fields = Path("/proc/self/statm").read_text(encoding="ascii").split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


def _gauge(name: str, text: str, value: float) -> str:
    return gauge(name, text, [("", value)])


def _counter(name: str, text: str, value: float) -> str:
    return counter(name, text, [("", value)])


def _process(snapshot: Snapshot) -> Iterator[str]:
    built = labels(version=version(), commit=commit())
    yield gauge("build_info", "1; the labels say what is running", [(built, 1)])
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
            if snapshot.totals is None or status.state == "fenced"
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
    took = [(labels(op=op), seconds) for op, seconds in sorted(figures.seconds.items())]
    yield counter("store_request_seconds", "Time that requests to the object store took", took)
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


_Gauge = tuple[str, str, Callable[[VolumeInfo], float], Callable[[Iterable[float]], float]]
_VOLUME_GAUGES: tuple[_Gauge, ...] = (
    ("size_bytes", "Size of the volume", lambda i: i.size, sum),
    ("dirty_bytes", "Log bytes that are not in the store", lambda i: i.dirty_bytes, sum),
    ("oldest_dirty_seconds", "Age of the oldest write that is not in the store", lambda i: i.dirty_age, max),
    ("export_log_bytes", "Bytes that the export's write log allocates", lambda i: i.log_bytes, sum),
    ("export_map_bytes", "Memory of the export's maps", lambda i: i.map_bytes, sum),
    ("parked_requests", "Requests that wait for space, blocks or the store", lambda i: i.parked, sum),
    (
        "longest_wait_seconds",
        "For how long the request has waited that waits longest",
        lambda i: i.longest_wait_ns / 1e9,
        max,
    ),
    ("connections", "NBD connections", lambda i: i.connections, sum),
)
"""Name, text, the value of one export, and how those of many become that of the host."""
_VOLUME_COUNTERS: tuple[tuple[str, str, Callable[[VolumeStats], float]], ...] = (
    ("faults", "Faults on absent blocks", lambda s: s.faults),
    ("log_hits", "Block reads answered by the write log", lambda s: s.log_hits),
    ("cache_reads", "Block reads answered by the block cache", lambda s: s.cache_reads),
    ("zero_reads", "Block reads of zeros", lambda s: s.zero_reads),
    ("unaligned_writes", "Writes that had to read first", lambda s: s.rmw),
    ("log_syncs", "fdatasync calls on the write log", lambda s: s.syncs),
    ("log_full_waits", "Writes that waited for log space", lambda s: s.log_full_waits),
    ("map_full_waits", "Writes that waited for map memory", lambda s: s.map_full_waits),
    ("paced_waits", "Times that writes were slowed down as uploads fell behind", lambda s: s.paced),
)


def _volumes(snapshot: Snapshot) -> Iterator[str]:
    exports, by_export = snapshot.exports, snapshot.totals is None
    of = [labels(export=export.name, transport=export.transport) for export in exports if by_export]
    for name, text, read, join in _VOLUME_GAUGES:
        values = [read(export.info) for export in exports]
        yield gauge(name, text, zip(of, values, strict=True) if by_export else [("", join(values or [0]))])
    yield gauge(
        "volume_errno",
        "errno that all I/O fails with, 0 while serving",
        [
            (labels(export=export.name, transport=export.transport), export.info.failed)
            for export in exports
            if by_export or export.info.failed
        ],
    )


_Counts = list[tuple[str, VolumeStats]]
"""Labels and counters: of each export, or of the host, which needs no labels."""


def _counts(snapshot: Snapshot) -> _Counts:
    if snapshot.totals is not None:
        return [("", snapshot.totals)]
    return [
        (labels(export=export.name), export.stats) for export in snapshot.exports if export.stats is not None
    ]


def _counters(counts: _Counts) -> Iterator[str]:
    for name, text, read in _VOLUME_COUNTERS:
        yield counter(name, text, [(of, read(stats)) for of, stats in counts])


def _shadow(counts: _Counts) -> Iterator[str]:
    """Of shadow verify, only where it is on."""
    compared = [(of, stats.shadow_compared) for of, stats in counts]
    yield counter("shadow_compared_sectors", "Sectors read and compared", compared)
    different = [(of, stats.shadow_differences) for of, stats in counts]
    yield counter("shadow_differences", "Sectors of them that were not as expected", different)
    yield counter(
        "shadow_skipped_sectors",
        "Sectors read and not compared: written meanwhile, or absent from the second source",
        [
            (and_label(of, "why", why), count)
            for of, stats in counts
            for why, count in (("changed", stats.shadow_changed), ("absent", stats.shadow_absent))
        ],
    )


def _operations(counts: _Counts) -> Iterator[str]:
    of = [and_label(label, "op", op) for label, _ in counts for op in OPS]
    for name, text, read in _OPERATIONS:
        values = [value for _, stats in counts for value in read(stats)]
        yield counter(name, text, zip(of, values, strict=True))


_OPERATIONS: tuple[tuple[str, str, Callable[[VolumeStats], tuple[int, ...]]], ...] = (
    ("operations", "Guest requests", lambda s: s.ops),
    ("operation_bytes", "Bytes of guest requests", lambda s: s.bytes),
    ("operation_errors", "Guest requests that failed", lambda s: s.errors),
)


def _latency(counts: _Counts) -> str:
    """Only operations that happened: a thousand idle exports must not mean 100,000 lines."""
    samples = (
        (and_label(of, "op", op), latency_buckets(buckets), total / 1e9)
        for of, stats in counts
        if any(stats.ops)
        for op, buckets, total in zip(OPS, stats.latency, stats.latency_sum_ns, strict=True)
        if any(buckets)
    )
    return histogram("operation_seconds", "Latency of guest requests", samples)


_POWERS = range(FIRST_POWER, LAST_POWER + 1)
_BOUNDS = (*(repr(BUCKET_UNIT * 2**power) for power in _POWERS), "+Inf")


def latency_buckets(counts: tuple[int, ...]) -> list[tuple[str, float]]:
    """Cumulative counts by upper bound in seconds, from the core's half-power-of-two buckets."""
    below = list(accumulate(counts, initial=0))
    return list(zip(_BOUNDS, [*(below[2 * power] for power in _POWERS), below[-1]], strict=True))
