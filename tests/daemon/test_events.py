"""Each event in the life of an export is one line of the log: what, which volume, who asked, how long."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from daemon_harness import Daemon
from waiting import wait_for

from glidefs.api.access import Caller, Scope, address_of
from glidefs.api.client import CommandError, export_path

pytest.importorskip("glidefs.core._core")
pytestmark = pytest.mark.skipif(shutil.which("qemu-io") is None, reason="qemu-io is not installed")

Make = Callable[..., Daemon]
ME = f"uid {os.getuid()} pid {os.getpid()}"
JSON = 'log_format = "json"'


def events(daemon: Daemon, since: int = 0) -> list[dict[str, str]]:
    """The events in a log of JSON lines; every line must be one object."""
    lines = [json.loads(line) for line in daemon.log_text.splitlines()[since:]]
    return [line for line in lines if "event" in line]


def test_every_verb_is_one_event(make_daemon: Make, tmp_path: Path) -> None:
    daemon = make_daemon(extra=JSON).start()
    image = tmp_path / "image"
    image.write_bytes(b"x" * (1 << 20))

    def call(method: str, path: str, body: dict[str, object] | None = None) -> dict[str, object]:
        """One verb of this process, and its one event."""
        before = len(daemon.log_text.splitlines())
        result: dict[str, object] = daemon.client.call(method, path, {} if body is None else body)
        (found,) = events(daemon, before)
        assert found["by"] == ME
        assert found["outcome"] == "done"
        assert float(found["seconds"]) >= 0
        seen.append((found["event"], found.get("export", ""), found.get("volume_id", "")))
        return result

    seen: list[tuple[str, str, str]] = []
    v1 = export_path("v1")
    volume = str(call("PUT", v1, {"size": "16MiB"})["volume_id"])
    call("POST", f"{v1}/resize", {"size": "32MiB"})
    call("POST", f"{v1}/drain")
    call("POST", f"{v1}/snapshot")
    call("POST", f"{v1}/tag", {"tag": "t"})
    call("POST", "/api/bases/b", {"image": str(image)})
    fork = str(call("PUT", export_path("f"), {"source": "base:b"})["volume_id"])
    call("POST", f"{v1}/detach")
    call("POST", f"{v1}/attach")
    view = call("PUT", export_path("view"), {"source": "base:b", "read_only": True})
    promoted = call("POST", f"{export_path('view')}/promote")
    call("DELETE", v1)
    assert seen == [
        ("create", "v1", volume),
        ("resize", "v1", volume),
        ("drain", "v1", volume),
        ("snapshot", "v1", volume),
        ("tag", "v1", volume),
        ("bless", "base:b", ""),
        ("fork", "f", fork),
        ("detach", "v1", volume),
        ("attach", "v1", volume),
        ("fork", "view", view["volume_id"]),
        ("promote", "view", promoted["volume_id"]),
        ("remove", "v1", volume),
    ]


def test_what_is_done_already_is_no_event(make_daemon: Make) -> None:
    daemon = make_daemon(extra=JSON).start()
    daemon.json("create", "v1", "--size", "16MiB", "--wait")
    daemon.json("create", "v1", "--size", "16MiB")
    daemon.json("attach", "v1")
    daemon.json("resize", "v1", "16MiB")
    assert [found["event"] for found in events(daemon)] == ["create"]


def test_a_failure_is_one_event_with_its_reason(make_daemon: Make) -> None:
    daemon = make_daemon(extra=JSON).start()
    made = daemon.json("create", "v1", "--size", "16MiB")
    with pytest.raises(CommandError):
        daemon.client.call("POST", export_path("v1", "resize"), {"size": "8MiB"})
    found = events(daemon)[-1]
    assert (found["event"], found["outcome"], found["level"]) == ("resize", "failed", "warning")
    assert found["volume_id"] == made["volume_id"]
    assert "--shrink" in found["message"]


def test_twenty_events_are_twenty_lines(daemon: Daemon) -> None:
    """Repetitions are held back, events are not; text lines carry the same as JSON."""
    for number in range(20):
        daemon.client.call("PUT", export_path(f"v{number}"), {"size": "1MiB"})
    form = r"create (v\d+): done in [\d.]+ s: nbd, 1048576 bytes; volume \w{32}, by (.*)"
    lines = re.findall(form, daemon.log_text)
    assert lines == [(f"v{number}", ME) for number in range(20)]


def test_fence_and_outage_are_events(make_daemon: Make) -> None:
    daemon = make_daemon(extra=JSON).start()
    made = daemon.json("create", "v1", "--size", "16MiB", "--wait")
    other = make_daemon("b", node="node-2", extra=JSON).start()
    other.json("attach", "v1", "--take-over")
    assert events(other)[-1]["event"] == "take-over"
    daemon.io("v1", "write -P 1 0 1M")
    daemon.run("drain", "v1", check=False)
    fences = wait_for(lambda: [e for e in events(daemon) if e["event"] == "fence"], "the fence is said")
    assert [(e["export"], e["volume_id"], e["level"]) for e in fences] == [("v1", made["volume_id"], "error")]
    other.io("v1", "write -P 1 0 1M")
    away = daemon.store.with_name("away")
    daemon.store.rename(away)
    other.run("drain", "v1", "--timeout", "3s", check=False)
    wait_for(lambda: [e for e in events(other) if e["event"] == "store-away"], "the outage is said")
    away.rename(daemon.store)
    other.json("drain", "v1", "--timeout", "60s")
    said = [e["event"] for e in events(other)]
    assert said.count("store-away") == said.count("store-back") == 1


@pytest.mark.parametrize("form", ["text", "json"])
def test_the_journal_gets_priorities(make_daemon: Make, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    daemon = make_daemon(extra=f'log_format = "{form}"')
    log = daemon.base / "daemon.log"
    log.touch()
    status = log.stat()
    monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
    daemon.start()
    daemon.json("create", "v1", "--size", "16MiB")
    daemon.run("resize", "v1", "1MiB", check=False)
    lines = daemon.log_text.splitlines()
    assert all(re.match(r"<[2-7]>\S", line) for line in lines), lines
    assert [line[:3] for line in lines if "create v1" in line] == ["<6>"]
    assert [line[:3] for line in lines if "resize v1" in line] == ["<4>"]


def test_version_and_commit_are_named(daemon: Daemon) -> None:
    health = daemon.client.call("GET", "/health")
    assert health["version"]
    assert health["commit"]
    assert f"ready: glidefs {health['version']} (commit {health['commit']}), 0 exports" in daemon.log_text


def test_who_asks_over_tcp_is_an_address() -> None:
    for client, said in (
        (("10.0.0.7", 4031), "10.0.0.7:4031"),
        (("uid 0 pid 7", 0), "uid 0 pid 7"),
        (None, "unknown"),
    ):
        assert address_of({"type": "http", "client": client}) == said
    assert Caller(Scope.READ, "10.0.0.7:40312", "ci").who == "token ci at 10.0.0.7:40312"
