"""What is wrong now and what to do about it, for the dashboard and `top`: each with the words of /health."""

from __future__ import annotations

import os
from collections.abc import Iterable

from msgspec import Struct

from glidefs.config import age_text
from glidefs.core.engine import EngineStats
from glidefs.exports.health import LONG, UNDER_WAY
from glidefs.exports.requests import ExportStatus
from glidefs.store.state import StoreState

LISTED = 50
"""Exports that are named; the others are only counted."""
NEARLY_FULL = 0.65
"""Part of the log limit that is dirty; by then writers are slowed down (glidefs/writing/throttle.py)."""


class Wrong(Struct, frozen=True, kw_only=True):
    """One thing; ``export`` is empty where it is the host's.

    ``severity``: "error" where data is not served, or not safe beyond this host, else "warning".
    """

    severity: str
    export: str = ""
    what: str
    todo: str


def wrongs(
    exports: Iterable[ExportStatus],
    store: StoreState,
    engine: EngineStats | None,
    now: float,
) -> list[Wrong]:
    """All that is wrong, the worst first; ``now`` in unix seconds. Empty: all is well."""
    exports = list(exports)
    dirty = sum(int((status.volume or {}).get("dirty_bytes", 0)) for status in exports)
    found = [*_of_store(store, now), *_of_host(engine, dirty)]
    bad = [_of_export(status, store) for status in exports if status.trouble]
    bad.sort(key=lambda wrong: wrong.severity != "error")
    found += bad[:LISTED]
    if len(bad) > LISTED:
        more = f"{len(bad) - LISTED} more exports want attention"
        found.append(Wrong(severity="warning", what=more, todo="see 'glidefs list'"))
    return sorted(found, key=lambda wrong: (wrong.severity != "error", wrong.export != ""))


def _of_store(store: StoreState, now: float) -> Iterable[Wrong]:
    if store.away:
        yield Wrong(
            severity="error",
            what=f"the store is away for {age_text(now - store.since)}: {store.reason}",
            todo="check the network, the credentials and the store itself; guests write on while the log has "
            "room, and all goes on by itself when it is back",
        )
    elif store.longest_wait >= LONG:
        yield Wrong(
            severity="warning",
            what=f"something waits for the store for {age_text(store.longest_wait)}: {store.wait_reason}",
            todo="see what the store refuses: permissions, space, one damaged object",
        )


def _of_host(engine: EngineStats | None, dirty: int) -> Iterable[Wrong]:
    if engine is None:
        return
    if engine.log_limit and dirty / engine.log_limit >= NEARLY_FULL:
        yield Wrong(
            severity="warning",
            what=f"{dirty / engine.log_limit:.0%} of the log is not uploaded: writers are slowed down",
            todo="look at the store first; then log_size, upload.volumes, upload.workers",
        )
    if engine.cache_errno:
        yield Wrong(
            severity="warning",
            what=f"the disk of the block cache fails: {os.strerror(engine.cache_errno)}",
            todo="replace it; reads go to the store meanwhile",
        )


def _of_export(status: ExportStatus, store: StoreState) -> Wrong:
    """What an export's own line says. A fence says itself what there is to do."""
    name = status.name
    if status.state == "fenced":
        what, _, todo = status.trouble.partition("; ")
        return Wrong(severity="error", export=name, what=what, todo=todo or f"glidefs show {name}")
    if status.state not in UNDER_WAY:
        todo = f"'glidefs show {name}' has all of it; 'glidefs attach {name}' tries again"
        return Wrong(severity="error", export=name, what=status.trouble, todo=todo)
    todo = "it goes on when the store is back" if store.away else "'glidefs doctor' looks for the cause"
    return Wrong(severity="warning", export=name, what=status.trouble, todo=todo)
