"""A daemon that hands over to another process, and then to another."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "acceptance"))

from node import DEADLINE, Node, wait_for

from glidefs.cli.client import CommandError


def is_running(pid: int) -> bool:
    """Whether a process is there, and not only its corpse."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


class Generations(Node):
    """``pid`` is the process that serves now. ``die`` in the environment: see handoff/protocol.py."""

    die = ""

    def spawn(self) -> subprocess.Popen[bytes]:
        os.environ["GLIDEFS_TEST_HANDOFF_DIE"] = self.die
        try:
            return super().spawn()
        finally:
            del os.environ["GLIDEFS_TEST_HANDOFF_DIE"]

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
        pids = {self.process.pid} if self.process is not None else set()
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    command = (entry / "cmdline").read_bytes()
                except OSError:
                    continue
                if str(self.config).encode() in command and b"run" in command.split(b"\0"):
                    pids.add(int(entry.name))
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if self.process is not None:
            self.process.wait(DEADLINE)
