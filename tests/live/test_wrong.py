"""What is wrong comes with what to do, the worst first, and not more of it than people read."""

from __future__ import annotations

import pytest

pytest.importorskip("glidefs.core._core")

from msgspec.structs import replace

from glidefs.core.engine import EngineStats
from glidefs.exports.health import judged
from glidefs.exports.requests import ExportStatus
from glidefs.live.wrong import LISTED, wrongs
from glidefs.store.state import StoreState

UP = StoreState()
AWAY = StoreState(away=True, since=1000.0, reason="no route")
ENGINE = replace(EngineStats(**dict.fromkeys(EngineStats.__struct_fields__, 0)), log_limit=1000)


def export(
    name: str, state: str = "serving", reason: str = "", store: StoreState = UP, **figures: float
) -> ExportStatus:
    found = ExportStatus(
        name=name,
        size=1,
        transport="nbd",
        device="",
        state=state,
        reason=reason,
        prefix="default",
        read_only=False,
        flush="local",
        volume_id="",
        log_id="",
        volume=dict(figures),
    )
    return judged(found, store, 300.0)


def test_all_is_well() -> None:
    assert wrongs([export("a"), export("b", dirty_bytes=600)], UP, ENGINE, 2000.0) == []
    assert wrongs([], UP, None, 2000.0) == []


def test_each_has_something_to_do() -> None:
    found = wrongs(
        [
            export("late", oldest_dirty_seconds=400.0, dirty_bytes=700, store=AWAY),
            export("gone", "fenced", "node b has it; 'glidefs detach gone' forgets it here"),
            export("bad", "failed", "all I/O fails: Input/output error"),
        ],
        AWAY,
        replace(ENGINE, cache_errno=5),
        1010.0,
    )
    assert all(one.todo for one in found)
    errors = [one for one in found if one.severity == "error"]
    assert found[: len(errors)] == errors
    assert [one.export for one in errors] == ["", "gone", "bad"]
    assert errors[0].what == "the store is away for 10s: no route"
    assert (errors[1].what, errors[1].todo) == (
        "fenced: node b has it",
        "'glidefs detach gone' forgets it here",
    )
    assert "glidefs attach bad" in errors[2].todo
    warnings = [one.what for one in found[len(errors) :]]
    assert warnings == [
        "70% of the log is not uploaded: writers are slowed down",
        "the disk of the block cache fails: Input/output error",
        "not uploaded for 6m40s: the store is away: no route",
    ]


def test_thousands_are_counted() -> None:
    found = wrongs([export(f"e{n}", "failed", "why") for n in range(3000)], UP, ENGINE, 1.0)
    assert len(found) == LISTED + 1
    assert [one.what for one in found if not one.export] == [f"{3000 - LISTED} more exports want attention"]
