"""What could fail once the predecessor has left is found before, in a rehearsal too. Hangs can be ended."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from handoff_rig import Generations, is_running, state_of
from waiting import DEADLINE, wait_for

from glidefs.api.client import Client, CommandError

Make = Callable[..., Generations]
TOKEN = "0123456789abcdef0123"


@pytest.fixture
def daemon(make_daemon: Make) -> Generations:
    node = make_daemon().start()
    node.run("create", "vm", "--size", "64MiB", "--transport", "nbd")
    return node


def change(node: Generations, section: str, *lines: str) -> None:
    """Add keys to a section of the configuration."""
    text = node.config.read_text()
    node.config.write_text(text.replace(f"[{section}]", "\n".join([f"[{section}]", *lines]), 1))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def token_file(node: Generations, mode: int = 0o600) -> Path:
    path = node.base / "token"
    path.write_text(TOKEN)
    path.chmod(mode)
    return path


def sockets(node: Generations) -> list[str]:
    return sorted(path.name for path in node.base.glob("*.sock"))


def refused(node: Generations, match: str) -> None:
    """Rehearsal and handoff say why not, and nothing has changed."""
    first = node.pid
    for dry_run in (True, False):
        with pytest.raises(CommandError, match=match):
            node.handoff(dry_run=dry_run)
        assert node.pid == first
    node.io("vm", "write -P 3 0 4k")


def test_a_token_that_others_can_read(daemon: Generations) -> None:
    token = token_file(daemon, 0o644)
    change(daemon, "api", f'listen = "127.0.0.1:{free_port()}"', f'token_file = "{token}"')
    refused(daemon, "others can read it")


def test_a_token_that_is_not_there(daemon: Generations) -> None:
    change(daemon, "api", f'listen = "127.0.0.1:{free_port()}"', 'token_file = "none"')
    refused(daemon, "No such file")


@pytest.mark.parametrize("section", ["api", "nbd"])
def test_an_address_that_is_taken(daemon: Generations, section: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        lines = [f'listen = "127.0.0.1:{taken.getsockname()[1]}"']
        if section == "api":
            lines.append(f'token_file = "{token_file(daemon)}"')
        change(daemon, section, *lines)
        refused(daemon, "cannot listen")


def test_addresses_that_changed(daemon: Generations) -> None:
    """New ones are listened on, those that are named no more are gone."""
    port = free_port()
    change(daemon, "api", f'listen = "127.0.0.1:{port}"', f'token_file = "{token_file(daemon)}"')
    assert daemon.handoff(dry_run=True)["outcome"] == "aborted"
    daemon.handoff()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/health", headers={"Authorization": f"Bearer {TOKEN}"}
    )
    with urllib.request.urlopen(request, timeout=DEADLINE) as answer:
        assert answer.status == 200
    text = daemon.config.read_text().replace('"api.sock"', '"api2.sock"').replace('"nbd.sock"', '"nbd2.sock"')
    daemon.config.write_text(text)
    assert daemon.handoff(dry_run=True)["outcome"] == "aborted"
    wait_for(lambda: sockets(daemon) == ["api.sock", "nbd.sock"], "the rehearsal leaves nothing")
    old = daemon.client
    daemon.client = Client(str(daemon.base / "api2.sock"))
    pid = old.call("POST", "/admin/handoff", {}, timeout=DEADLINE * 2)["pid"]
    wait_for(lambda: daemon.ready() and daemon.pid == pid, "the successor answers at its own socket")
    wait_for(lambda: not (daemon.base / "api.sock").exists(), "the old socket file goes")
    assert not (daemon.base / "nbd.sock").exists()
    daemon.io("vm", "write -P 3 0 4k")
    with urllib.request.urlopen(request, timeout=DEADLINE) as answer:
        assert answer.status == 200


def hanging(make_daemon: Make, stop_at: str) -> tuple[Generations, int, threading.Thread]:
    """A daemon in the middle of a handoff whose successor is stopped, with the product's deadlines."""
    node = make_daemon(stop_at=stop_at).start()
    node.run("create", "vm", "--size", "64MiB", "--transport", "nbd")
    node.io("vm", "write -P 3 0 4k")

    def ask() -> None:
        with pytest.raises(CommandError):
            node.handoff()

    asking = threading.Thread(target=ask)
    asking.start()
    stopped = wait_for(
        lambda: next((pid for pid in node.processes() if state_of(pid) == "T"), None), "it hangs"
    )
    return node, stopped, asking


@pytest.mark.parametrize("stop_at", ["successor:before:hello", "successor:before:ready"])
def test_a_stop_ends_a_handoff_that_hangs(make_daemon: Make, stop_at: str) -> None:
    """And leaves nobody who holds the locks: the next daemon starts."""
    node, successor, asking = hanging(make_daemon, stop_at)
    began = time.monotonic()
    node.stop()
    assert time.monotonic() - began < 30
    assert not is_running(successor)
    asking.join(DEADLINE)
    assert "told to stop" in node.log_text
    node.stop_at = ""
    node.start()
    assert node.has("vm", 3, "0", "4k")


def test_a_stop_ends_a_successor_that_waits(make_daemon: Make) -> None:
    """Its predecessor is stopped before the cut-over: the exports stay with that one."""
    node, predecessor, asking = hanging(make_daemon, "predecessor:got:ready")
    [successor] = set(node.processes()) - {predecessor}
    os.kill(successor, signal.SIGTERM)
    wait_for(lambda: not is_running(successor), "the successor ends")
    os.kill(predecessor, signal.SIGCONT)
    asking.join(DEADLINE)
    assert node.pid == predecessor
    assert node.has("vm", 3, "0", "4k")


def test_a_rehearsal_with_a_successor_that_does_not_end(make_daemon: Make) -> None:
    node = make_daemon(stop_at="successor:got:abort", seconds='{"end": 1}').start()
    assert node.handoff(dry_run=True)["outcome"] == "aborted"
    wait_for(lambda: len(node.processes()) == 1, "the successor is killed")
    assert "called off: killed" in node.log_text
