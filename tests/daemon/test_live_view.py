"""The live view, as data and in a terminal, of a daemon that guests use."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import termios
import time
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any

import command_line
import pytest
import servers
from daemon_harness import ROOT, Daemon
from rich.console import Console
from waiting import DEADLINE, wait_for

pytest.importorskip("glidefs.core._core")

from glidefs.api.client import CommandError
from glidefs.api.pages import UI_FILES
from glidefs.cli.top import PLAIN_WIDTH, Screen

Make = Callable[..., Daemon]
needs_qemu = pytest.mark.skipif(shutil.which("qemu-io") is None, reason="qemu-io is not installed")
STATIC = ROOT / "glidefs" / "api" / "static"


def live(daemon: Daemon, after: float = 0.0) -> dict[str, Any]:
    """The view, of later than ``after``."""

    def fresh() -> dict[str, Any] | None:
        found: dict[str, Any] = daemon.client.call("GET", "/v1/live")
        return found if found["host"]["time"] > after else None

    found: dict[str, Any] = wait_for(fresh, "a newer live view")
    return found


def make(daemon: Daemon, *names: str) -> None:
    for name in names:
        daemon.client.call("PUT", f"/api/exports/{name}", {"size": "16MiB", "transport": "nbd"})


@needs_qemu
def test_it_says_what_guests_did(daemon: Daemon) -> None:
    make(daemon, "busy", "idle")
    first = live(daemon)
    counts = [daemon.total("glidefs_operations_total", export="busy", op=op) for op in ("read", "write")]
    daemon.io("busy", "write -P 1 0 1M", "write -P 2 1M 1M", "read -P 1 0 1M")
    now = live(daemon, first["host"]["time"])
    after = [daemon.total("glidefs_operations_total", export="busy", op=op) for op in ("read", "write")]
    busy, idle = now["exports"]
    seconds = now["host"]["seconds"]
    assert (busy["name"], idle["name"], busy["state"]) == ("busy", "idle", "serving")
    did = [busy["read_iops"] * seconds, busy["write_iops"] * seconds]
    assert did == pytest.approx([b - a for a, b in zip(counts, after, strict=True)], rel=1e-2)
    assert busy["write_bytes_per_second"] * seconds == pytest.approx(2 << 20, rel=1e-2)
    assert busy["log_hit_ratio"] == 1.0
    assert busy["write_p99_seconds"] > 0
    assert busy["dirty_bytes"] == now["log"]["dirty_bytes"] == now["totals"]["dirty_bytes"] >= 2 << 20
    assert idle["write_iops"] == 0
    assert idle["read_p99_seconds"] is None
    assert (now["host"]["status"], now["wrong"], now["states"]) == ("ok", [], {"serving": 2})
    assert [event["export"] for event in now["events"]] == ["idle", "busy"]
    store = {"state": "up", "last_error": "", "url": f"file://{daemon.store}"}
    assert store.items() <= now["store"].items()

    def sampled() -> bool:
        history = daemon.client.call("GET", "/v1/live/busy")
        return any(history["series"]["write_iops"])

    wait_for(sampled, "a sample of ten seconds")
    history = daemon.client.call("GET", "/v1/live/busy")
    assert history["step_seconds"] == 10
    assert history["until"] <= time.time()
    rates = history["series"]["write_bytes_per_second"]
    assert sum(rates) * 10 == pytest.approx(2 << 20, rel=0.4)  # one look may be late
    assert not any(daemon.client.call("GET", "/v1/live/idle")["series"]["dirty_bytes"])
    with pytest.raises(CommandError, match="absent"):
        daemon.client.call("GET", "/v1/live/absent")


@needs_qemu
def test_what_is_wrong_and_what_to_do(daemon: Daemon, make_daemon: Make) -> None:
    make(daemon, "v1")
    daemon.io("v1", "write -P 1 0 1M")
    daemon.json("drain", "v1")
    other = make_daemon("b", node="node-2").start()
    other.json("attach", "v1", "--take-over")
    daemon.io("v1", "write -P 1 0 1M")
    assert daemon.run("drain", "v1", check=False).returncode
    (wrong,) = wait_for(lambda: live(daemon)["wrong"], "the fence is seen")
    assert (wrong["severity"], wrong["export"]) == ("error", "v1")
    assert wrong["what"].startswith("fenced: ")
    assert "glidefs detach v1" in wrong["todo"]
    frame = daemon.run("top", "--once").stdout
    assert re.search(r"^! v1: fenced: .* -> .*glidefs detach v1", frame, re.MULTILINE)
    daemon.store.rename(daemon.store.with_name("away"))
    other.io("v1", "write -P 1 0 1M")
    assert other.run("drain", "v1", "--timeout", "1s", check=False).returncode
    found = wait_for(lambda: live(other)["wrong"], "the outage is seen")
    assert found[0]["severity"] == "error"
    assert found[0]["what"].startswith("the store is away for ")
    assert found[0]["todo"]
    assert live(other)["store"]["last_error"]
    daemon.store.with_name("away").rename(daemon.store)


def test_files_of_the_dashboard_fetch_nothing_from_elsewhere() -> None:
    """And put nothing but text into the page; what is served is all there is."""
    names = {name for name, _ in UI_FILES.values()}
    assert {path.name for path in STATIC.iterdir()} == names | {"docs.html"}
    for path in (STATIC / name for name in names):
        text = path.read_text(encoding="utf-8")
        addresses = set(re.findall(r"\w+://[^\s\"']+", text)) - {"http://www.w3.org/2000/svg"}
        assert not addresses, path.name
        bad = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|\son\w+="
        assert not re.search(bad, text), path.name
    page = (STATIC / "index.html").read_text()
    assert not re.search(r"<script(?! type=\"module\" src=)|<style|style=", page)


def ask(port: int, path: str, method: str = "GET", **headers: str) -> tuple[int, Any, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE)
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


def test_over_tcp_the_page_is_free_and_what_it_shows_is_not(make_daemon: Make) -> None:
    port = servers.free_port()
    daemon = make_daemon()
    token = daemon.base / "token"
    token.write_text("0123456789abcdef\n")
    token.chmod(0o600)
    listen = f'[api]\nlisten = "127.0.0.1:{port}"\ntoken_file = "token"'
    daemon.config.write_text(daemon.config.read_text().replace("[api]", listen))
    daemon.start()
    for path, (name, kind) in UI_FILES.items():
        status, headers, data = ask(port, path)
        assert (status, headers["Content-Type"], data) == (200, kind, (STATIC / name).read_bytes())
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert headers["X-Content-Type-Options"] == "nosniff"
    for path in ("/v1/live", "/v1/live/x", "/ui/../api/exports", "/ui/", "/api/exports"):
        assert ask(port, path)[0] == 401, path
    for method in ("POST", "PUT", "DELETE"):
        assert ask(port, "/ui", method)[0] == 405
    assert ask(port, "/v1/live", Authorization="Bearer 0123456789abcdef")[0] == 200
    assert f"http://127.0.0.1:{port}/ui" in daemon.run("ui").stdout


@contextlib.contextmanager
def ended(process: subprocess.Popen[Any]) -> Iterator[subprocess.Popen[Any]]:
    """A process that does not outlive the block."""
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def forwarded(daemon: Daemon) -> Iterator[tuple[int, str]]:
    """`glidefs ui --port 0`: its port and its token."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLIDEFS_SOCKET": daemon.client.path}
    command = [*command_line.INTERRUPTIBLE, sys.executable, "-m", "glidefs", "ui", "--port", "0"]
    with ended(
        subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True, cwd=ROOT)
    ) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        url = urllib.parse.urlsplit(first.removeprefix("open ").strip())
        assert url.port, first
        yield url.port, url.fragment.removeprefix("token=")
        process.stdout.close()


def test_a_browser_on_this_host_gets_the_page_and_no_more(daemon: Daemon) -> None:
    make(daemon, "v1")
    with forwarded(daemon) as (port, token):
        known = {"Authorization": f"Bearer {token}"}
        assert len(token) >= 32
        status, headers, data = ask(port, "/ui")
        assert (status, data) == (200, (STATIC / "index.html").read_bytes())
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert json.loads(ask(port, "/v1/live", **known)[2])["exports"][0]["name"] == "v1"
        assert json.loads(ask(port, "/v1/live/v1", **known)[2])["name"] == "v1"
        assert ask(port, "/v1/live", **{**known, "Host": "localhost:9999"})[0] == 200
        assert ask(port, "/v1/live")[0] == 401
        assert ask(port, "/v1/live", Authorization="Bearer x")[0] == 401
        for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example:80", ""):
            assert ask(port, "/v1/live", **{**known, "Host": host})[0] == 421, host
        for path in ("/metrics", "/api/exports", "/v1/live/../exports", "/v1/live/a/b", "/admin/handoff"):
            assert ask(port, path, **known)[0] == 404, path
        for method in ("POST", "PUT", "DELETE", "PATCH"):
            assert ask(port, "/v1/live", method, **known)[0] == 501
        assert "choose another" in daemon.fails("ui", "--port", str(port))
        daemon.stop()
        assert ask(port, "/v1/live", **known)[0] == 502


# -- in a terminal -----------------------------------------------------------------------------------


@needs_qemu
def test_one_frame(daemon: Daemon) -> None:
    make(daemon, "a", "b", "c")
    daemon.io("b", "write -P 1 0 1M")
    lines = daemon.run("top", "--once").stdout.splitlines()
    head = next(at for at, line in enumerate(lines) if line.startswith("NAME"))
    assert [line.split()[0] for line in lines[head + 1 :] if line] == ["b", "a", "c"]
    assert "IOPS*" in lines[head]
    assert "1MiB" in lines[head + 1]
    assert all(len(line) <= PLAIN_WIDTH for line in lines)
    found = daemon.json("top", "--sort", "dirty", "-n", "1")
    assert [export["name"] for export in found["exports"]] == ["b"]
    assert found["exports"][0]["dirty_bytes"] >= 1 << 20
    assert "choose of iops, mibs, latency, dirty" in daemon.fails("top", "--sort", "size")
    assert "too short" in daemon.fails("top", "--interval", "10ms")
    daemon.stop()
    assert "no daemon answers" in daemon.fails("top", "--once")


def test_keys_and_the_terminal_afterwards(daemon: Daemon) -> None:
    make(daemon, *(f"vm-{number:02}" for number in range(40)))
    leader, follower = pty.openpty()
    termios.tcsetwinsize(leader, (20, 120))
    before = termios.tcgetattr(follower)
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "GLIDEFS_SOCKET": daemon.client.path,
        "TERM": "xterm",
    }
    for name in ("COLUMNS", "LINES"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "glidefs", "top", "--interval", "1m"]
    text = ""

    def shows(pattern: str) -> bool:
        nonlocal text
        if select.select([leader], [], [], 0.1)[0]:
            text += os.read(leader, 1 << 16).decode(errors="replace")
        return re.search(pattern, text) is not None

    def press(keys: bytes, pattern: str) -> None:
        nonlocal text
        text = ""
        os.write(leader, keys)
        wait_for(lambda: shows(pattern), f"{keys!r} shows {pattern}")

    with ended(
        subprocess.Popen(command, stdin=follower, stdout=follower, env=environment, cwd=ROOT)
    ) as process:
        wait_for(lambda: shows("1-13 of 40"), "the first frame")
        assert "vm-00" in text
        assert "IOPS*" in text
        press(b"\x1b[B\x1b[B", "3-15 of 40")
        press(b"\x1b[6~", "16-28 of 40")
        press(b"\x1b[6~\x1b[6~", "28-40 of 40")
        press(b"\x1bOA", "27-39 of 40")
        press(b"s", r"MIB/S\*")
        press(b"\x1b[D\x1b[D", r"(?s)DIRTY\*.*1-13 of 40")
        os.write(leader, b"q")
        assert process.wait(DEADLINE) == 0
    assert termios.tcgetattr(follower) == before
    os.close(leader)
    os.close(follower)


NUMBERS = (
    *("read_iops", "write_iops", "read_bytes_per_second", "write_bytes_per_second", "dirty_bytes"),
    *("oldest_dirty_seconds", "upload_bytes_per_second", "waiting_requests"),
)
NONE_YET = (
    *("read_p99_seconds", "write_p99_seconds", "read_mean_seconds", "write_mean_seconds"),
    *("log_hit_ratio", "cache_hit_ratio"),
)
EXPORT: dict[str, Any] = {
    **dict.fromkeys(NUMBERS, 0),
    **dict.fromkeys(NONE_YET),
    "name": "a",
    "state": "failed",
}
VIEW: dict[str, Any] = {
    "host": {"node": "n", "status": "ok", "time": 0, "version": "1"},
    "store": {
        "state": "up",
        "latency_seconds": 1,
        "received_bytes_per_second": 0,
        "sent_bytes_per_second": 0,
    },
    "log": {"dirty_bytes": 0, "limit_bytes": 0},
    "cache": {"blocks": 0, "limit_blocks": 0},
    "totals": EXPORT,
    "states": {"failed": 1},
    "wrong": [],
}


def frame(view: dict[str, Any], width: int, height: int | None) -> list[str]:
    console = Console(width=width, height=height, force_terminal=False, highlight=False)
    with console.capture() as capture:
        console.print(Screen("iops", None).frame(view, width, height))
    return capture.get().rstrip("\n").split("\n")


def test_a_narrow_terminal_has_the_names() -> None:
    """What is less needed goes first; no line is folded."""
    exports = [{**EXPORT, "name": f"database-{number:04}", "trouble": "why " * 50} for number in range(9)]
    for width in (60, 80, 100, 200):
        lines = frame({**VIEW, "exports": exports}, width, 20)
        named = [line for line in lines if line.startswith("database-")]
        assert len(named) == 9
        assert all(re.match(r"database-\d{4} ", line) for line in named)
        assert all(len(line) <= width for line in lines)
        (head,) = [line for line in lines if line.startswith("NAME")]
        assert ("CACHE" in head, "P99" in head) == (width > 80, True)
        assert lines[-1].startswith("1-9 of 9 ")


def test_hostile_text_does_not_reach_the_terminal() -> None:
    evil = "\x1b]0;owned\x07[red]x[/red]\n\x1b[2J"
    wrong = [{"severity": "error", "export": "a", "what": evil, "todo": evil}]
    view = {**VIEW, "host": {**VIEW["host"], "node": evil}, "wrong": wrong}
    text = "\n".join(frame({**view, "exports": [{**EXPORT, "trouble": evil}]}, PLAIN_WIDTH, None))
    assert "\x1b" not in text
    assert "\x07" not in text
    assert text.count("[red]x[/red]") >= 3
