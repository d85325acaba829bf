"""What an operator sees is true: an export that waits or is lost, a store that is away."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable

import pytest
from daemon_harness import Daemon
from waiting import wait_for

from glidefs.exports.health import judged, troubles
from glidefs.exports.requests import ExportStatus
from glidefs.store.state import StoreState

pytest.importorskip("glidefs.core._core")

Make = Callable[..., Daemon]
UP = StoreState()
AWAY = StoreState(away=True, since=1000.0, reason="no route")


def status(
    state: str = "serving", name: str = "v1", reason: str = "", **figures: float | str
) -> ExportStatus:
    return ExportStatus(
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


def wrong(found: ExportStatus, store: StoreState = UP) -> str:
    return judged(found, store, 300.0).trouble


def test_what_is_wrong_with_an_export() -> None:
    assert wrong(status()) == ""
    assert wrong(status(longest_wait_seconds=9.0, oldest_dirty_seconds=300.0), AWAY) == ""
    assert wrong(status("fenced", reason="node b has it")) == "fenced: node b has it"
    assert wrong(status(longest_wait_seconds=130.0)) == "requests wait, the first for 2m10s"
    assert wrong(status(longest_wait_seconds=11.0), AWAY).endswith("for 11s: the store is away: no route")
    late = status(oldest_dirty_seconds=400.0, last_error="access denied")
    assert wrong(late) == "not uploaded for 6m40s: access denied"


def test_all_that_is_wrong() -> None:
    assert troubles([judged(status(), UP, 300.0)], UP, 1010.0) == []
    fenced = [judged(status("fenced", f"v{n}", "why"), AWAY, 300.0) for n in range(10)]
    found = troubles(fenced, AWAY, 1010.0)
    assert found[0] == "the store is away for 10s: no route"
    assert found[1] == "v0: fenced: why"
    assert len(found) == 10
    assert found[-1].startswith("2 more")


@pytest.mark.skipif(shutil.which("qemu-io") is None, reason="qemu-io is not installed")
def test_an_outage_with_a_reader_that_waits(daemon: Daemon, make_daemon: Make) -> None:
    daemon.json("create", "v1", "--size", "16MiB")
    daemon.io("v1", "write -P 1 0 1M")
    daemon.json("detach", "v1")
    other = make_daemon("b", node="node-2").start()
    uri = other.json("attach", "v1")["device"]
    health = other.client.call("GET", "/health")
    assert (health["status"], health["reasons"]) == ("ok", [])
    away = daemon.store.with_name("away")
    daemon.store.rename(away)
    reader = ["qemu-io", "-f", "raw", "-c", "read -P 1 0 64k", uri]
    with subprocess.Popen(reader, stdout=subprocess.PIPE) as process:

        def waits() -> str:
            (export,) = other.client.call("GET", "/api/exports")
            return str(export["trouble"])

        trouble = wait_for(waits, "the list says that a request waits")
        assert trouble.startswith("requests wait, the first for 1")
        assert "the store is away" in trouble
        health = other.client.call("GET", "/health/ready")  # it serves what it has: ready, and not well
        assert (health["status"], health["ready"]) == ("degraded", True)
        assert health["store"]["state"] == "down"
        assert any(line.startswith("the store is away for") for line in health["reasons"])
        assert any(line.startswith("v1: requests wait") for line in health["reasons"])
        assert "requests wait" in other.run("list").stdout
        away.rename(daemon.store)
        assert process.wait(60) == 0
    wait_for(lambda: other.client.call("GET", "/health")["status"] == "ok", "all is well again")
