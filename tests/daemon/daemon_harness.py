"""A real daemon in a process of its own, driven through the command line and the control socket."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import command_line
import servers
from prometheus_client.parser import text_string_to_metric_families
from waiting import DEADLINE, wait_for

from glidefs.api import wire
from glidefs.api.client import Client, CommandError

ROOT = Path(__file__).resolve().parents[2]


@contextlib.contextmanager
def no_devices_left() -> Iterator[None]:
    """Delete the ublk devices that a test leaves without a server."""
    from glidefs.transport.ublk import device as ublk

    def delete(dev_id: int) -> bool:
        found = ublk.query(dev_id)
        if found is None or (found.state == ublk.LIVE and not Path(f"/proc/{found.server_pid}").exists()):
            return found is None  # the kernel has not noticed yet
        ublk.ublk.delete(dev_id, found.tag)
        return True

    before = set(ublk.devices())
    yield
    for dev_id in set(ublk.devices()) - before:
        wait_for(lambda dev_id=dev_id: delete(dev_id), f"device {dev_id} is gone")


class Daemon:
    """One cache directory, one store, and the process that uses them."""

    def __init__(self, base: Path, store: Path, extra: str = "", node: str = "node-1") -> None:
        self.base = base
        self.store = store
        self.endpoint = ""
        """Of an S3 server, to use instead of the directory."""
        self.wrapper: Sequence[str] = ()
        """Words before the command of the process."""
        self.config = base / "glidefs.toml"
        base.mkdir(exist_ok=True)
        store.mkdir(parents=True, exist_ok=True)
        self.write_config(extra, node)
        self.process: subprocess.Popen[bytes] | command_line.Started | None = None
        self.client = Client(str(base / "api.sock"))

    def write_config(self, extra: str = "", node: str = "node-1") -> None:
        url = f'url = "file://{self.store}"'
        if self.endpoint:
            url = f'url = "s3://bucket/root"\nendpoint_url = "{self.endpoint}"\nconnect_timeout = "1s"'
        self.config.write_text(
            f"""
[cache]
dir = "cache"
log_size = "64MiB"
segment_size = "1MiB"
block_cache_size = "16MiB"
[store]
{url}
[api]
socket = "api.sock"
export_metrics = true
[nbd]
socket = "nbd.sock"
[upload]
sync_interval = "300s"
[daemon]
node = "{node}"
{extra}
"""
        )

    @property
    def log_text(self) -> str:
        path = self.base / "daemon.log"
        return path.read_text() if path.exists() else ""

    def spawn(self) -> subprocess.Popen[bytes] | command_line.Started:
        environment = {
            **os.environ,
            **servers.CREDENTIALS,
            "PYTHONPATH": str(ROOT),
            "PYTHONFAULTHANDLER": "1",
        }
        args = ["run", "-c", str(self.config)]
        with (self.base / "daemon.log").open("ab") as log:
            if self.wrapper:
                command = [*self.wrapper, sys.executable, "-m", "glidefs", *args]
                self.process = subprocess.Popen(command, cwd=ROOT, stderr=log, stdout=log, env=environment)
            else:
                self.process = command_line.Started(
                    args, cwd=ROOT, env=environment, stdout=log.fileno(), stderr=log.fileno()
                )
        return self.process

    def start(self) -> Daemon:
        process = self.spawn()

        def ready() -> bool:
            assert process.poll() is None, self.log_text
            try:
                return bool(self.client.call("GET", "/health/ready", timeout=5)["ready"])
            except CommandError:
                return False

        try:
            wait_for(ready, "the daemon is ready")
        except AssertionError:
            if process.poll() is None:
                print(self.autopsy(process))
            raise
        return self

    def autopsy(self, process: subprocess.Popen[bytes] | command_line.Started) -> str:
        """Ends a daemon that hangs: where its threads wait, in the kernel and in Python, and its log."""
        lines = []
        for task in sorted(Path(f"/proc/{process.pid}/task").iterdir()):
            with contextlib.suppress(OSError):
                state = (task / "stat").read_text().rpartition(")")[2].split()[0]
                waits = " ".join((task / name).read_text().strip() for name in ("comm", "wchan", "syscall"))
                lines.append(f"{task.name} {state} {waits}")
        process.send_signal(signal.SIGABRT)  # faulthandler prints the stacks of all threads
        process.wait(DEADLINE)
        return "\n".join([*lines, self.log_text[-20000:]])

    def stop(self, number: int = signal.SIGTERM, expected: int = 0) -> None:
        assert self.process is not None
        self.process.send_signal(number)
        code = self.process.wait(DEADLINE)
        self.process = None
        assert code == expected, self.log_text

    def kill(self) -> None:
        self.stop(signal.SIGKILL, -signal.SIGKILL)

    def run(self, *args: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """A glidefs command."""
        environment = {**os.environ, **servers.CREDENTIALS, "PYTHONPATH": str(ROOT)}
        environment["GLIDEFS_CONFIG"] = str(self.config)
        environment.pop("GLIDEFS_SOCKET", None)
        done = command_line.run(args, cwd=self.base, env=environment, timeout=DEADLINE * 2)
        if check:
            assert done.returncode == 0, f"{args}: {done.stdout}{done.stderr}\n{self.log_text}"
        return done

    def json(self, *args: str) -> Any:
        """The document that a command prints with --json: exactly one, and nothing else."""
        return json.loads(self.run(*args, "--json").stdout)

    def fails(self, *args: str) -> str:
        """The one line that a command prints when it fails."""
        done = self.run(*args, check=False)
        assert done.returncode != 0, done.stdout
        lines = done.stderr.strip().splitlines()
        assert len(lines) == 1, done.stderr
        assert lines[0].startswith("glidefs: ")
        return lines[0]

    def samples(self, name: str, **labels: str) -> list[float]:
        """What GET /metrics has of the sample ``name`` with these labels."""
        now = {"Cache-Control": "no-cache"}
        _, text = wire.request(self.client.path, "GET", "/metrics", headers=now, timeout=DEADLINE)
        return [
            sample.value
            for family in text_string_to_metric_families(text.decode())
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        ]

    def total(self, name: str, **labels: str) -> float:
        """Sum of the samples ``name`` with these labels."""
        return sum(self.samples(name, **labels))

    def volumes_in_store(self) -> list[str]:
        """Names of the volumes in the store that were not removed."""
        found = {path.parent.name: path for path in self.store.rglob("volumes/*/manifest")}
        return sorted(
            name for name, path in found.items() if not self.json("inspect", str(path))["removed_at"]
        )

    def io(self, name: str, *commands: str) -> str:
        """qemu-io commands on an export."""
        uri = self.json("show", name)["device"]
        args = [part for command in commands for part in ("-c", command)]
        done = subprocess.run(
            ["qemu-io", "-f", "raw", *args, uri],
            capture_output=True,
            text=True,
            timeout=DEADLINE,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr + self.log_text
        assert "failed" not in done.stdout, done.stdout
        return done.stdout

    def has(self, name: str, pattern: int, offset: str, length: str) -> bool:
        """Whether an area of an export holds a byte pattern."""
        return "Pattern verification failed" not in self.io(name, f"read -P {pattern} {offset} {length}")
