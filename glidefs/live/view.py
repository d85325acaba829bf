"""The documents of GET /v1/live and GET /v1/live/{name}, put together from figures of one moment."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from msgspec import Struct

from glidefs.core.engine import EngineStats
from glidefs.events import PastEvent
from glidefs.exports.survey import Seen
from glidefs.handoff.history import PastHandoff
from glidefs.live.rates import NOTHING
from glidefs.live.ring import STEP
from glidefs.live.sampler import Key, Now
from glidefs.live.wrong import Wrong
from glidefs.store.counters import StoreMetrics
from glidefs.store.state import StoreState

EVENTS = 100


class LiveExport(Struct, frozen=True, gc=False):
    """One export. Rates are per second, latencies in seconds, ratios parts of one; None: there was nothing.

    `waiting_requests` wait for space, blocks or the store, the first for `longest_wait_seconds`.
    `waits_per_second`: how often writers waited for space, or for their turn.
    """

    name: str
    state: str
    transport: str
    size: int
    connections: int
    trouble: str
    read_iops: float
    write_iops: float
    read_bytes_per_second: float
    write_bytes_per_second: float
    read_mean_seconds: float | None
    write_mean_seconds: float | None
    read_p99_seconds: float | None
    write_p99_seconds: float | None
    log_hit_ratio: float | None
    cache_hit_ratio: float | None
    store_reads_per_second: float
    errors_per_second: float
    dirty_bytes: int
    oldest_dirty_seconds: float
    upload_bytes_per_second: float
    waiting_requests: int
    longest_wait_seconds: float
    waits_per_second: float


class Host(Struct, frozen=True, kw_only=True):
    """What the process says of itself; `seconds`: the time that rates are of."""

    node: str
    version: str
    commit: str
    status: str
    pid: int
    uptime_seconds: float
    time: float
    seconds: float


class StoreRates:
    """What the store did between two looks. For callers that hold a lock."""

    def __init__(self) -> None:
        self._before: tuple[float, StoreMetrics] | None = None
        self._said: dict[str, Any] = {}

    def note(self, at: float, metrics: StoreMetrics) -> dict[str, Any]:
        """Rates since the note before, of a second or longer ago; ``at`` of ``time.monotonic()``."""
        before = self._before
        if before is None or at - before[0] >= 1.0:
            self._before = (at, metrics)
            self._said = _store_rates(before[1] if before else metrics, metrics, at - (before or (at,))[0])
        return self._said


def _store_rates(old: StoreMetrics, new: StoreMetrics, seconds: float) -> dict[str, Any]:
    requests = sum(new.requests.values()) - sum(old.requests.values())
    errors = sum(new.errors.values()) - sum(old.errors.values())
    took = sum(new.seconds.values()) - sum(old.seconds.values())
    per = max(seconds, 1e-3)
    return {
        "requests_per_second": round(requests / per, 2),
        "errors_per_second": round(errors / per, 2),
        "latency_seconds": round(took / requests, 6) if requests else None,
        "received_bytes_per_second": round((new.bytes_in - old.bytes_in) / per),
        "sent_bytes_per_second": round((new.bytes_out - old.bytes_out) / per),
    }


def store_part(url: str, state: StoreState, metrics: StoreMetrics, did: Mapping[str, Any], now: float) -> Any:
    """Whether the store answers, how fast, and what it said last."""
    return {
        "url": url,
        "state": "down" if state.away else "up",
        "reason": state.reason,
        "down_seconds": round(now - state.since, 1) if state.away else 0.0,
        "waiting_calls": metrics.waiting,
        "longest_wait_seconds": round(state.longest_wait, 1),
        "last_error": metrics.last_error,
        "last_error_at": metrics.last_error_at,
        **did,
    }


def engine_parts(engine: EngineStats, dirty: int) -> dict[str, Any]:
    """How full log, maps and block cache are."""
    return {
        "log": {"bytes": engine.log_bytes, "dirty_bytes": dirty, "limit_bytes": engine.log_limit},
        "maps": {"bytes": engine.map_bytes, "limit_bytes": engine.map_budget},
        "cache": {
            "blocks": engine.cache_used,
            "limit_blocks": engine.cache_slots,
            "errno": engine.cache_errno,
        },
    }


def key_of(seen: Seen) -> Key:
    """By which the sampler knows an export."""
    return seen.status.name, seen.status.volume_id


def live_exports(seen: Iterable[Seen], now: Now) -> list[LiveExport]:
    """All exports, by name."""
    return [_live_export(of, now) for of in seen]


def _live_export(seen: Seen, now: Now) -> LiveExport:
    status, key = seen.status, key_of(seen)
    figures, did = status.volume or {}, now.rates.get(key, NOTHING)
    return LiveExport(
        status.name,
        status.state,
        status.transport,
        status.size,
        figures.get("connections", 0),
        status.trouble,
        _short(did.read_iops),
        _short(did.write_iops),
        _short(did.read_bytes),
        _short(did.write_bytes),
        _short_or_none(did.read_mean),
        _short_or_none(did.write_mean),
        _short_or_none(did.read_p99),
        _short_or_none(did.write_p99),
        _short_or_none(did.log_hits),
        _short_or_none(did.cache_hits),
        _short(did.store_reads),
        _short(did.errors),
        figures.get("dirty_bytes", 0),
        _short(figures.get("oldest_dirty_seconds", 0.0)),
        _short(now.drained.get(key, 0.0)),
        figures.get("parked", 0),
        figures.get("longest_wait_seconds", 0.0),
        _short(did.waits),
    )


def _short(value: float) -> float:
    """Four digits are more than anybody reads, and a third of the bytes."""
    return float(f"{value:.4g}") if value else 0.0


def _short_or_none(value: float | None) -> float | None:
    return None if value is None else _short(value)


def totals(exports: Sequence[LiveExport]) -> dict[str, Any]:
    """Of all exports together; ages and waits are the longest, ratios are left to single exports."""
    summed = (
        "read_iops",
        "write_iops",
        "read_bytes_per_second",
        "write_bytes_per_second",
        "store_reads_per_second",
        "errors_per_second",
        "dirty_bytes",
        "upload_bytes_per_second",
        "waiting_requests",
        "waits_per_second",
        "connections",
    )
    found: dict[str, Any] = {}
    for name in summed:
        total = sum(getattr(of, name) for of in exports)
        found[name] = _short(total) if isinstance(total, float) else total
    for name in ("oldest_dirty_seconds", "longest_wait_seconds"):
        found[name] = max((getattr(of, name) for of in exports), default=0.0)
    return found


def document(
    host: Host,
    parts: Mapping[str, Any],
    wrong: Sequence[Wrong],
    exports: Sequence[LiveExport],
    handoffs: Iterable[PastHandoff],
    events: Sequence[PastEvent],
) -> dict[str, Any]:
    """The answer of GET /v1/live; handoffs and events newest first."""
    return {
        "host": host,
        **parts,
        "wrong": wrong,
        "states": Counter(of.state for of in exports),
        "totals": totals(exports),
        "handoffs": list(handoffs)[::-1],
        "events": events[: -EVENTS - 1 : -1],
        "exports": exports,
    }


def history_document(
    name: str, age: float, series: Mapping[str, list[float | None]], now: float
) -> dict[str, Any]:
    """The answer of GET /v1/live/{name}: samples of `step_seconds`, the newest ends at `until`."""
    return {"name": name, "step_seconds": STEP, "until": round(now - age, 3), "series": series}
