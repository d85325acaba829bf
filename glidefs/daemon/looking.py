"""What operators ask of the daemon: its health, its metrics, what it does now and did in the last hour."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import msgspec

from glidefs import events
from glidefs.core.figures import totals
from glidefs.core.volume import CoreVolume
from glidefs.daemon.metrics import Metrics, Snapshot, figures_of
from glidefs.errors import GlideError
from glidefs.exports.health import troubles
from glidefs.live import view
from glidefs.live.sampler import Key, Sampler
from glidefs.live.wrong import wrongs
from glidefs.store.state import StoreState
from glidefs.version import commit, version

if TYPE_CHECKING:
    from glidefs.daemon.daemon import Daemon


class Looks:
    """Of one daemon. `_lock` guards the rates of the store. `start()` once exports are served."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._metrics = Metrics(self._snapshot)
        self._sampler = Sampler(self._volumes, also=self._store_did)
        self._lock = threading.Lock()
        self._rates = view.StoreRates()

    def start(self) -> None:
        """Keep the history of exports from now on. Safe to call twice."""
        self._sampler.start()

    def close(self) -> None:
        """End that."""
        self._sampler.close()

    def _volumes(self) -> dict[Key, CoreVolume]:
        router = self._daemon.serving
        found: dict[Key, CoreVolume] = {}
        for entry in router.table.all() if router else ():
            volume, record = entry.volume, entry.record
            if volume is not None and record is not None and entry.transport is not None:
                found[entry.name, record.volume_id.hex()] = volume.core
        return found

    # -- health and metrics ------------------------------------------------------------------------

    def health(self) -> dict[str, Any]:
        """State of the process, for GET /health."""
        daemon = self._daemon
        router, store = daemon.serving, daemon.store
        exports = router.listing() if router else []
        states = Counter(status.state for status in exports)
        state = store.state if store else StoreState()
        now = time.time()
        wrong = troubles(exports, state, now)
        return {
            "status": self._status(degraded=bool(wrong)),
            "reasons": wrong,
            "ready": daemon.ready,
            "pid": os.getpid(),
            "version": version(),
            "commit": commit(),
            "node": daemon.config.daemon.node_name,
            "uptime_seconds": round(now - daemon.started_at, 3),
            "exports": {"total": len(exports), **states, "failed": states.get("failed", 0)},
            "store": {
                "url": daemon.config.store.url,
                "state": "down" if state.away or store is None else "up",
                "down_seconds": round(now - state.since, 3) if state.away else 0.0,
                "reason": state.reason,
            },
        }

    def _status(self, *, degraded: bool) -> str:
        if self._daemon.ready:
            return "degraded" if degraded else "ok"
        return "stopping" if self._daemon.is_stopping else "starting"

    def metrics(self) -> bytes:
        """The Prometheus text."""
        return self._metrics.render()

    def _snapshot(self) -> Snapshot:
        daemon = self._daemon
        router, store = daemon.serving, daemon.store
        core = daemon.core if router else None
        seen = router.survey() if router else []
        statuses = [export.status for export in seen]
        state = store.state if store else StoreState()
        detailed = daemon.config.api.export_metrics
        return Snapshot(
            engine=core.engine.stats() if core else None,
            exports=figures_of(seen, counters=detailed),
            totals=totals(core.engine) if core and not detailed else None,
            statuses=statuses,
            troubles=len(troubles(statuses, state, time.time())),
            store=store.metrics() if store else None,
            started_at=daemon.started_at,
            bases=router.bases.stats() if router else {},
            fault_fetches=core.host.faults.fetches if core else 0,
            handoffs=daemon.history.totals,
            shadow=daemon.config.debug.shadow_dir is not None,
        )

    # -- now, and the last hour --------------------------------------------------------------------

    def live(self) -> bytes:
        """The document of GET /v1/live. Raises GlideError while the daemon starts."""
        daemon, store = self._daemon, self._daemon.store
        core = daemon.core
        if store is None:
            raise GlideError("the daemon is starting; try again")
        seen, now = core.router.survey(), time.time()
        did = self._sampler.now()
        state, engine = store.state, core.engine.stats()
        wrong = wrongs([export.status for export in seen], state, engine, now)
        exports = view.live_exports(seen, did)
        dirty = sum(export.dirty_bytes for export in exports)
        host = view.Host(
            node=daemon.config.daemon.node_name,
            version=version(),
            commit=commit(),
            status=self._status(degraded=bool(wrong)),
            pid=os.getpid(),
            uptime_seconds=round(now - daemon.started_at, 1),
            time=round(now, 3),
            seconds=round(did.seconds, 3),
        )
        parts = {
            "store": view.store_part(daemon.config.store.url, state, store.metrics(), self._store_did(), now),
            **view.engine_parts(engine, dirty),
        }
        past = daemon.history.totals.recent
        return msgspec.json.encode(view.document(host, parts, wrong, exports, past, list(events.recent)))

    def _store_did(self) -> dict[str, Any]:
        """Rates of the store since the last question or sample, of a second at least."""
        if (store := self._daemon.store) is None:
            return {}
        metrics = store.metrics()
        with self._lock:
            return self._rates.note(time.monotonic(), metrics)

    def live_of(self, name: str) -> bytes:
        """The document of GET /v1/live/{name}. Raises UnknownExport."""
        entry = self._daemon.router.table.get(name)
        volume_id = entry.record.volume_id.hex() if entry.record else ""
        age, series = self._sampler.history((name, volume_id))
        return msgspec.json.encode(view.history_document(name, age, series, time.time()))
