"""What every section uses: child processes, fio, CPU time, medians."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
IN_VM = bool(os.environ.get("GLIDEFS_VM"))
PATIENCE = 600.0 if IN_VM else 120.0
"""Seconds that a server may take to come up or to end."""
KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
BLOCK = 128 * KIB


class BenchError(Exception):
    """A section cannot go on: one line that says why."""


def say(text: str) -> None:
    """Progress, on stderr: stdout is for the tables."""
    print(text, file=sys.stderr, flush=True)


def need(*programs: str) -> None:
    """Raises BenchError for programs that are not installed."""
    missing = [name for name in programs if not shutil.which(name)]
    if missing:
        raise BenchError(f"not installed: {', '.join(missing)} (leave --no-install out)")


@dataclass
class Settings:
    """How long to measure, and where."""

    rounds: int
    seconds: int
    short: bool
    work: Path
    results: Path
    kernel: str = "6.12"
    extra: dict[str, Any] = field(default_factory=dict)


@contextlib.contextmanager
def work_directory(parent: Path | None) -> Iterator[Path]:
    """One directory for everything: all servers on the same file system."""
    base = parent or Path(os.environ.get("TMPDIR", "/var/tmp"))
    base.mkdir(parents=True, exist_ok=True)
    path = Path(tempfile.mkdtemp(prefix="glidefs-bench.", dir=base))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


class Child:
    """A server process of ours. `stop` ends exactly this process."""

    def __init__(self, command: Sequence[str | Path], log: Path, env: dict[str, str] | None = None) -> None:
        self.name = Path(str(command[0])).name
        self.log = log
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env={**os.environ, **(env or {})},
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    def wait_until(self, ready: Callable[[], bool], what: str) -> None:
        """Poll until `ready`; raises BenchError with the end of the log if the process ends before."""
        deadline = time.monotonic() + PATIENCE
        while not ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                tail = self.log.read_text(errors="replace")[-1500:]
                raise BenchError(f"{self.name}: {what} did not happen\n{tail}")
            time.sleep(0.05)

    def stop(self, number: int = signal.SIGTERM) -> None:
        """End it and wait; it is killed if it takes too long."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def cpu_seconds(pid: int, thread: str = "") -> float:
    """User and system time of all threads of a process so far, or of one, by its number."""
    path = Path(f"/proc/{pid}/task/{thread}/stat" if thread else f"/proc/{pid}/stat")
    fields = path.read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def accepts(path: Path) -> bool:
    """Whether somebody listens on a Unix socket."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
        probe.connect(str(path))
        return True
    return False


class Run(NamedTuple):
    """One fio run. `cpu` is CPU seconds of the server during it, NaN if there is none to ask.

    `p50`, `p99`, `p999` are latencies in milliseconds; of a mixed load those of the slower side.
    """

    ops: int
    seconds: float
    bytes: int
    cpu: float
    p50: float
    p99: float
    p999: float
    longest: float

    @property
    def iops(self) -> float:
        """Operations per second."""
        return self.ops / self.seconds

    @property
    def mb_per_second(self) -> float:
        """10^6 bytes per second."""
        return self.bytes / self.seconds / 1e6

    @property
    def cpu_us(self) -> float:
        """Microseconds of server CPU time per operation."""
        return self.cpu / max(1, self.ops) * 1e6


def fio(options: dict[str, Any], pid: int | None = None, log: Path | None = None) -> Run:
    """Run one fio job description; CPU time is taken of `pid` from before fio starts until it ended."""
    base: dict[str, Any] = {"name": "bench", "thread": 1, "randrepeat": 0, "group_reporting": 1}
    command = ["fio", "--output-format=json"]
    command += [f"--{key}={value}" for key, value in {**base, **options}.items()]
    before = cpu_seconds(pid) if pid else float("nan")
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    cpu = cpu_seconds(pid) - before if pid else float("nan")
    start = done.stdout.find("{")  # the nbd engine prints a line first
    if done.returncode or start < 0:
        tail = (done.stderr + done.stdout)[-800:]
        raise BenchError(f"fio failed (status {done.returncode}): {tail.strip()}")
    job = json.loads(done.stdout[start:])["jobs"][0]
    if job["error"]:
        raise BenchError(f"fio reports error {job['error']}: {done.stderr.strip()[-800:]}")
    sides = [job["read"], job["write"]]
    return Run(
        ops=sum(side["total_ios"] for side in sides),
        seconds=max(side["runtime"] for side in sides) / 1000,
        bytes=sum(side["io_bytes"] for side in sides),
        cpu=cpu,
        p50=latency(sides, "50.000000"),
        p99=latency(sides, "99.000000"),
        p999=latency(sides, "99.900000"),
        longest=max(side["clat_ns"]["max"] for side in sides) / 1e6,
    )


def fio_jobs(options: dict[str, Any], jobs: Sequence[dict[str, Any]], file: Path) -> None:
    """Run jobs at once that have ``options`` and each its own, and wait for all; ``file`` is for fio."""
    lines = ["[global]", "thread=1", *(f"{key}={value}" for key, value in options.items())]
    for number, own in enumerate(jobs):
        lines += [f"[job{number}]", *(f"{key}={value}" for key, value in own.items())]
    file.write_text("\n".join(lines) + "\n")
    done = subprocess.run(
        ["fio", "--output-format=terse", str(file)],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode:
        raise BenchError(f"fio failed (status {done.returncode}): {done.stderr.strip()[-800:]}")


def latency(sides: Sequence[dict[str, Any]], percentile: str) -> float:
    """Milliseconds; the larger one of reads and writes."""
    return max(side["clat_ns"].get("percentile", {}).get(percentile, 0) for side in sides) / 1e6


def median(values: Sequence[float]) -> float:
    """The median; NaN of nothing."""
    return statistics.median(values) if values else float("nan")


def random_file(path: Path, size: int) -> None:
    """A file of `size` bytes that no compressor shrinks."""
    chunk = os.urandom(MIB)
    with path.open("wb") as out:
        for i in range(0, size, MIB):
            # Different from block to block, without the cost of so much randomness.
            out.write(i.to_bytes(8, "little") + os.urandom(4096) + chunk[4104:])
