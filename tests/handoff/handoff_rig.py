"""A daemon that hands over to another process, and then to another."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from waiting import DEADLINE, wait_for

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "acceptance"))

from command_line import Started
from node import Node

from glidefs.api.client import CommandError
from glidefs.handoff.channel import DIE_VARIABLE, STOP_VARIABLE
from glidefs.handoff.deadlines import SECONDS_VARIABLE

_environment = threading.Lock()


def state_of(pid: int) -> str:
    """The letter of a process's state: T stopped, Z a corpse; empty if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def is_running(pid: int) -> bool:
    """Whether a process is there, and not only its corpse."""
    return state_of(pid) not in ("", "Z")


class Generations(Node):
    """``pid`` is the process that serves now. ``die``, ``stop_at``: where, as in handoff/channel.py.

    ``seconds``: deadlines of handoffs that are not the product's, as JSON.
    """

    die = ""
    stop_at = ""
    seconds = ""

    def spawn(self) -> subprocess.Popen[bytes] | Started:
        own = {DIE_VARIABLE: self.die, STOP_VARIABLE: self.stop_at, SECONDS_VARIABLE: self.seconds}
        with _environment:
            os.environ.update(own)
            try:
                return super().spawn()
            finally:
                for name in own:
                    del os.environ[name]

    def processes(self) -> list[int]:
        """The daemons that were started with this configuration and run, also stopped ones."""
        pids = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            words = command.split(b"\0")
            if str(self.config).encode() in words and b"run" in words and is_running(int(entry.name)):
                pids.append(int(entry.name))
        return sorted(pids)

    @property
    def pid(self) -> int:
        return int(self.client.call("GET", "/health", timeout=30)["pid"])

    def ready(self) -> bool:
        try:
            return bool(self.client.call("GET", "/health/ready", timeout=5)["ready"])
        except CommandError:
            return False

    def handoff(self, *, dry_run: bool = False) -> dict[str, Any]:
        """The answer of the process that was asked; on return the one that serves is ready."""
        answer: dict[str, Any] = self.client.call(
            "POST", "/admin/handoff", {"dry_run": dry_run}, timeout=DEADLINE * 2
        )
        if answer["outcome"] == "succeeded":
            self.settled(answer["pid"])
        return answer

    def settled(self, pid: int) -> None:
        """Wait until process ``pid`` serves, and the one that was started here has ended."""
        assert self.process is not None
        self.process.wait(DEADLINE)
        wait_for(lambda: self.ready() and self.pid == pid, f"process {pid} serves\n{self.log_text}")

    def stop(self, number: int = signal.SIGTERM, expected: int = 0) -> None:
        """End the process that serves."""
        if self.process is not None and self.process.poll() is None:
            super().stop(number, expected)
            return
        pid = self.pid
        os.kill(pid, number)
        until = time.monotonic() + DEADLINE
        while is_running(pid):
            assert time.monotonic() < until, self.log_text
            time.sleep(0.02)
        self.process = None

    def kill_all(self) -> None:
        """At the end of a test, whatever is left."""
        own = {self.process.pid} if self.process is not None else set()
        for pid in own.union(self.processes()):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if self.process is not None:
            self.process.wait(DEADLINE)
