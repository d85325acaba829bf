"""Who waits for the store keeps nobody else waiting; a wait ends when nobody wants its answer."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import servers
from command_line import INTERRUPTIBLE
from daemon_harness import ROOT, Daemon
from waiting import DEADLINE, wait_for

from glidefs.api import wire
from glidefs.api.pools import Pools
from glidefs.exports.router import PUBLISH_THREADS

pytest.importorskip("glidefs.core._core")
pytestmark = pytest.mark.skipif(shutil.which("qemu-io") is None, reason="qemu-io is not installed")

Make = Callable[..., Daemon]
BUSY = DEADLINE / 60
"""Times are those of an idle machine, times this."""
STILL = 5.0
"""Seconds that the machine may stand still meanwhile."""


class Asked:
    """A request whose answer nobody waits for yet, or whose client leaves: `wire` has no such thing."""

    def __init__(self, daemon: Daemon, path: str, body: str = "{}") -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(str(daemon.base / "api.sock"))
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        self.socket.sendall((head + body).encode())

    def answer(self) -> tuple[int, str]:
        """Status and body."""
        self.socket.settimeout(DEADLINE)
        text = b"".join(iter(lambda: self.socket.recv(1 << 16), b"")).decode()
        self.socket.close()
        head, _, body = text.partition("\r\n\r\n")
        return int(head.split()[1]), body


@contextlib.contextmanager
def store_away(daemon: Daemon) -> Iterator[None]:
    """The directory of the store is not there, as when its disk is not mounted."""
    away = daemon.store.with_name("away")
    daemon.store.rename(away)
    try:
        yield
    finally:
        away.rename(daemon.store)


def waiting(daemon: Daemon) -> int:
    return int(daemon.client.call("GET", "/health", timeout=DEADLINE)["waiting_verbs"])


def ask(daemon: Daemon, path: str, count: int, body: str = "{}") -> list[Asked]:
    before = waiting(daemon)
    asked = [Asked(daemon, path, body) for _ in range(count)]
    wait_for(lambda: waiting(daemon) == before + count, f"{count} verbs wait")
    return asked


def test_forty_waits_hold_up_nobody(daemon: Daemon) -> None:
    daemon.json("create", "v1", "--size", "16MiB", "--wait")
    daemon.io("v1", "write -P 1 0 1M")
    with store_away(daemon):
        asked = ask(daemon, "/api/exports/v1/drain", 20) + ask(daemon, "/api/exports/v1/snapshot", 20)
        for call, seconds in (
            (lambda: daemon.client.call("PUT", "/api/exports/v2", {"size": "16MiB"}), 3.0),
            (lambda: daemon.client.call("GET", "/api/exports"), 1.0),
            (lambda: daemon.client.call("GET", "/api/exports/v1"), 1.0),
            (lambda: daemon.client.call("GET", "/metrics"), 1.0),
            (lambda: daemon.client.call("POST", "/api/exports/v2/resize", {"size": "32MiB"}), 1.0),
        ):
            began = time.monotonic()
            call()
            assert time.monotonic() - began < seconds * BUSY + STILL
        daemon.io("v2", "write -P 2 0 1M")
        assert waiting(daemon) == 40
    statuses = {each.answer()[0] for each in asked}
    assert statuses == {200, 201}
    assert daemon.json("drain", "v2", "--timeout", "60s")["volume"]["dirty_bytes"] == 0


@pytest.mark.parametrize("verb", ["drain", "detach", "snapshot"])
def test_a_wait_ends_with_its_client(daemon: Daemon, verb: str) -> None:
    daemon.json("create", "v1", "--size", "16MiB", "--wait")
    daemon.io("v1", "write -P 1 0 1M")
    with store_away(daemon):
        for each in ask(daemon, f"/api/exports/v1/{verb}", 3):
            each.socket.close()
        wait_for(lambda: not waiting(daemon), "the waits have ended")
    daemon.json("drain", "v1", "--timeout", "60s")
    assert daemon.json("show", "v1")["state"] == "serving"
    assert daemon.json("snapshots", "v1") == []
    assert daemon.has("v1", 1, "0", "1M")


def test_too_many_waits_are_refused(daemon: Daemon) -> None:
    daemon.json("create", "v1", "--size", "16MiB", "--wait")
    daemon.io("v1", "write -P 1 0 1M")
    places = Pools().waits.places
    with store_away(daemon):
        asked = ask(daemon, "/api/exports/v1/drain", places)
        status, body = wire.request(
            daemon.client.path, "POST", "/api/exports/v1/drain", b"{}", timeout=DEADLINE
        )
        assert (status, json.loads(body)["error"]) == (503, f"{places} verbs wait already")
        daemon.json("list")
    assert {each.answer()[0] for each in asked} == {200}


@contextlib.contextmanager
def moto(daemon: Daemon) -> Iterator[subprocess.Popen[bytes]]:
    """The process of an S3 server, for a daemon that is started with it."""
    port = servers.free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        daemon.endpoint = f"http://127.0.0.1:{port}"
        daemon.write_config()
        text = daemon.config.read_text()
        daemon.config.write_text(text.replace("[api]", 'read_timeout = "20s"\n[api]', 1))
        servers.make_bucket(daemon.endpoint, "bucket")
        daemon.start()
        yield server
    finally:
        server.kill()
        server.wait()


def test_create_while_the_store_hangs(make_daemon: Make) -> None:
    """Every request is taken and none is answered: no attempt ends before its own time-out."""
    daemon = make_daemon()
    with moto(daemon) as server:
        daemon.json("create", "before", "--size", "16MiB", "--wait")
        server.send_signal(signal.SIGSTOP)

        def create(number: int) -> float:
            began = time.monotonic()
            made = daemon.client.call("PUT", f"/api/exports/v{number}", {"size": "16MiB"})
            assert (made["state"], made["published"]) == ("serving", False)
            return time.monotonic() - began

        count = PUBLISH_THREADS + 4  # some get no thread for their request
        with ThreadPoolExecutor(count) as pool:
            assert max(pool.map(create, range(count))) < 3.0 * BUSY + STILL
        daemon.io("v0", "write -P 1 0 1M")
        server.send_signal(signal.SIGCONT)
        for number in range(count):
            daemon.client.call("POST", f"/api/exports/v{number}/drain", {"timeout": DEADLINE})
        assert {export["state"] for export in daemon.json("list")} == {"serving"}
        assert daemon.has("v0", 1, "0", "1M")


def test_waits_do_not_hold_up_a_handoff(make_daemon: Make) -> None:
    daemon = make_daemon()
    with moto(daemon) as server:
        daemon.json("create", "v1", "--size", "16MiB", "--wait")
        daemon.io("v1", "write -P 1 0 1M")
        server.kill()
        asked = ask(daemon, "/api/exports/v1/drain", 40)
        assert daemon.json("handoff", "--dry-run")["exports"] == 1
        assert waiting(daemon) == 40
        for each in asked:
            each.socket.close()


def test_an_interrupted_profile_ends(daemon: Daemon, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(os.urandom(1 << 20))
    daemon.run("bless", str(image), "-n", "base")
    daemon.json("create", "fork", "--from", "base:base")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLIDEFS_CONFIG": str(daemon.config)}
    for number in (signal.SIGINT, signal.SIGKILL):
        command = [*INTERRUPTIBLE, sys.executable, "-m", "glidefs"]
        command += ["profile", "fork", "--stop-after", "1h"]
        with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as client:
            wait_for(lambda: waiting(daemon) == 1, "the profile runs")
            client.send_signal(number)
        wait_for(lambda: not waiting(daemon), "the profile has ended")
    assert daemon.json("profile", "fork", "--stop-after", "100ms")["base"] == "base"
