"""A daemon for acceptance tests: the product's own defaults unless a test says otherwise, on ``file://``
or on S3, with what is needed to measure it from outside.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from waiting import DEADLINE, wait_for

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "daemon"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "nbd"))

from daemon_harness import Daemon
from daemon_harness import servers as servers
from nbd_client import RawClient

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
EMULATED = bool(os.environ.get("GLIDEFS_VM"))
BUCKET = "glide-test"

Sections = Mapping[str, Mapping[str, str]]


class Node(Daemon):
    """``settings`` are TOML values by section and key, over few defaults.

    With an S3 ``endpoint`` the store is below the name of the base directory in ``BUCKET``.
    """

    def __init__(self, base: Path, *, endpoint: str = "", settings: Sections | None = None) -> None:
        self._endpoint = endpoint
        self._settings = settings or {}
        self.lost = False
        base.mkdir(parents=True, exist_ok=True)
        super().__init__(base, base / "store")

    def write_config(self, extra: str = "", node: str = "node-1") -> None:
        sections: dict[str, dict[str, str]] = {
            "cache": {"dir": '"cache"'},
            "store": {"url": f'"file://{self.store}"'},
            "api": {"socket": '"api.sock"'},
            "nbd": {"socket": '"nbd.sock"'},
            "daemon": {"node": f'"{node}"'},
        }
        if self._endpoint:
            url = f"s3://{BUCKET}/{self.base.name}"
            sections["store"] = {"url": f'"{url}"', "endpoint_url": f'"{self._endpoint}"'}
        for name, keys in self._settings.items():
            sections.setdefault(name, {}).update(keys)
        lines: list[str] = []
        for name, table in sections.items():
            lines += [f"[{name}]", *(f"{key} = {value}" for key, value in table.items())]
        self.config.write_text("\n".join([*lines, extra, ""]))

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def cache(self) -> Path:
        return self.base / "cache"

    # -- life ------------------------------------------------------------------------------------

    def wipe(self) -> None:
        """Lose the local disk."""
        assert self.process is None
        shutil.rmtree(self.cache)
        self.lost = True

    def wait_served(self, *names: str) -> None:
        """Until these exports are served: after a lost disk they are taken back first."""
        if self.lost:
            self.json("attach", "--all", "--take-over")
            self.lost = False

        def served() -> bool:
            states = {e["name"]: e["state"] for e in self.client.call("GET", "/api/exports")}
            return all(states.get(name) == "serving" for name in names)

        wait_for(served, f"{names} are served\n{self.log_text}")

    # -- figures ---------------------------------------------------------------------------------

    def _rollup(self, field: str) -> int:
        for line in Path(f"/proc/{self.pid}/smaps_rollup").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
        raise AssertionError(field)

    def anonymous(self) -> int:
        """Bytes of anonymous memory."""
        return self._rollup("Anonymous")

    def rss(self) -> int:
        """Resident bytes."""
        return self._rollup("Rss")

    # -- guests ----------------------------------------------------------------------------------

    @contextmanager
    def nbd(self, name: str, timeout: float = DEADLINE) -> Iterator[RawClient]:
        """A connection in transmission."""
        with RawClient(str(self.base / "nbd.sock"), timeout) as client:
            client.greet().go(name)
            yield client

    def uri(self, name: str) -> str:
        """For fio and others."""
        return f"nbd+unix:///{name}?socket={self.base}/nbd.sock"


def allocated(path: Path) -> int:
    """Bytes that the files below a directory take on disk, as du counts them."""
    total = 0
    for directory, _, files in os.walk(path):
        for name in files:
            try:
                total += os.lstat(os.path.join(directory, name)).st_blocks * 512
            except FileNotFoundError:
                continue
    return total


def fio_command(target: str, *options: str) -> list[str]:
    """fio on an NBD URI or a block device."""
    engine = ["--ioengine=nbd", f"--uri={target}"] if "://" in target else [f"--filename={target}"]
    if "://" not in target:
        engine += ["--ioengine=libaio", "--direct=1"]
    return ["fio", "--name=job", "--output-format=json", "--thread", "--randrepeat=1", *engine, *options]


def fio_report(output: str) -> dict[str, Any]:
    """The report of fio's only job; its nbd engine prints lines before the JSON."""
    report: dict[str, Any] = json.loads(output[output.index("{\n") :])
    return report["jobs"][0]


def fio(target: str, *options: str, timeout: float = DEADLINE * 3) -> dict[str, Any]:
    """Run fio to its end, without an error."""
    done = subprocess.run(
        fio_command(target, *options), capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = fio_report(done.stdout)
    assert report["error"] == 0, done.stdout
    return report


@contextmanager
def stopwatch() -> Iterator[list[float]]:
    """A list that holds the seconds of the block once it ended."""
    taken: list[float] = []
    began = time.monotonic()
    try:
        yield taken
    finally:
        taken.append(time.monotonic() - began)
