"""Health for operators: what is wrong with an export or with the store. Nothing here blocks."""

from __future__ import annotations

from collections.abc import Iterable

from msgspec.structs import replace

from glidefs.config import age_text
from glidefs.exports.requests import ExportStatus
from glidefs.store.state import StoreState

LONG = 10.0
"""Seconds that a request may wait before it is reported."""
LISTED = 8
"""How many exports are named; the others are only counted."""
UNDER_WAY = ("serving", "creating", "starting")


def judged(status: ExportStatus, store: StoreState, max_dirty_age: float) -> ExportStatus:
    """The status with what is wrong, if something is."""
    trouble = _trouble(status, store, max_dirty_age)
    return replace(status, trouble=trouble) if trouble else status


def _trouble(status: ExportStatus, store: StoreState, max_dirty_age: float) -> str:
    if status.state not in UNDER_WAY:
        return f"{status.state}: {status.reason}" if status.reason else status.state
    figures = status.volume or {}
    why = figures.get("last_error") or ""
    if store.away:
        why = f"the store is away: {store.reason}"
    elif not why and store.longest_wait >= LONG:
        why = f"the store: {store.wait_reason}"
    found = []
    if (waited := figures.get("longest_wait_seconds", 0.0)) >= LONG:
        found.append(f"requests wait, the first for {age_text(waited)}")
    if (dirty := figures.get("oldest_dirty_seconds", 0.0)) >= max_dirty_age + LONG:
        found.append(f"not uploaded for {age_text(dirty)}")
    return ", ".join(found) + (f": {why}" if found and why else "")


def troubles(exports: Iterable[ExportStatus], store: StoreState, now: float) -> list[str]:
    """All that is wrong, one line each; ``now`` in unix seconds. Empty: all is well."""
    found = []
    if store.away:
        found.append(f"the store is away for {age_text(now - store.since)}: {store.reason}")
    elif store.longest_wait >= LONG:
        found.append(f"something waits for the store for {age_text(store.longest_wait)}: {store.wait_reason}")
    lines = [f"{status.name}: {status.trouble}" for status in exports if status.trouble]
    found += lines[:LISTED]
    if len(lines) > LISTED:
        found.append(f"{len(lines) - LISTED} more exports; see 'glidefs list'")
    return found
