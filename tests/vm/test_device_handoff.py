"""Handoffs of exports on /dev/ublkbN and over NBD, under fio with checksums, beside a device without data."""

from __future__ import annotations

import json
import mmap
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from waiting import wait_for

pytest.importorskip("glidefs.core._core")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "handoff"))

import device_rig as rig
from figures import Figures
from handoff_rig import Generations
from node import MIB, fio_command
from null_server import NullServer, build

from glidefs.api.client import CommandError

pytestmark = [
    pytest.mark.skipif(rig.REASON is not None, reason=str(rig.REASON)),
    pytest.mark.root,
    pytest.mark.timeout(7200 if rig.EMULATED else 1800),
]

HANDOFFS = int(os.environ.get("GLIDEFS_HANDOFFS", "3"))
"""How many in a normal run; the goals are stated for 50 of one device and 20 of five exports."""
SETTINGS = {
    "cache": {"log_size": '"512MiB"', "segment_size": '"8MiB"', "block_cache_size": '"64MiB"'},
    "upload": {"sync_interval": '"5s"'},
}
SIZE = 48 * MIB


@pytest.fixture
def node(place: Path) -> Iterator[Generations]:
    with rig.no_leftovers():
        made = Generations(place / "n", settings=SETTINGS)
        try:
            yield made
        finally:
            if os.environ.get("GLIDEFS_DAEMON_LOG"):
                Path(os.environ["GLIDEFS_DAEMON_LOG"]).write_text(made.log_text)
            made.kill_all()


class Load:
    """fio that writes, and verifies, until it is told to end, on a device or an NBD URI."""

    def __init__(
        self, target: str, directory: Path, seed: int, *, verify: bool = True, rate: int = 300
    ) -> None:
        self.target = target
        self.seed = seed
        self.verify = verify
        job = ["--rw=randwrite", "--bsrange=4k-32k", "--iodepth=8", f"--size={SIZE}"]
        if verify:
            job += ["--verify=crc32c", "--do_verify=1", "--verify_state_save=0", "--verify_backlog=64"]
            job += ["--verify_fatal=1"]
        job += ["--time_based", "--runtime=36000", f"--randseed={seed}", f"--rate_iops={rate}"]
        self.output = (directory / f"fio{seed}.log").open("w+")
        self.process = subprocess.Popen(fio_command(target, *job), stdout=self.output, stderr=self.output)

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def finish(self) -> dict[str, Any]:
        """What it did; asserts that it met no error."""
        if self.running:
            self.process.terminate()
        code = self.process.wait(rig.STEP)
        self.output.seek(0)
        text = self.output.read()
        assert code in (0, 128), text
        job: dict[str, Any] = json.loads(text[text.index("{\n") :])["jobs"][0]
        assert job["error"] == 0, text
        assert job["read" if self.verify else "write"]["io_bytes"], text
        return job

    def kill(self) -> None:
        if self.running:
            self.process.kill()
            self.process.wait()


class Oracle(threading.Thread):
    """Writes a part of a device, from ``first`` to ``end`` in bytes, and remembers what must be there."""

    def __init__(self, device: str, first: int, end: int) -> None:
        super().__init__(daemon=True)
        self.device = device
        self.first = first
        self.expected = bytearray(end - first)
        self.rounds = 0
        self._fd = os.open(device, os.O_RDWR | os.O_DIRECT)
        self._ended = threading.Event()
        self._error: OSError | None = None
        self._random = random.Random(1)

    def run(self) -> None:
        buffer = mmap.mmap(-1, 64 << 10)  # aligned
        try:
            while not self._ended.is_set():
                length = 4096 * self._random.randrange(1, 17)
                at = 4096 * self._random.randrange((len(self.expected) - length) // 4096)
                data = self.rounds.to_bytes(8, "little") * (length // 8)
                buffer[:length] = data
                assert os.pwrite(self._fd, memoryview(buffer)[:length], self.first + at) == length
                self.expected[at : at + length] = data
                self.rounds += 1
                time.sleep(0.01)
        except OSError as error:
            self._error = error

    def end(self) -> None:
        """Stop writing."""
        self._ended.set()
        self.join(rig.STEP)
        os.close(self._fd)
        assert self._error is None

    def finish(self) -> None:
        """Stop, and look at every block."""
        self.end()
        fd = os.open(self.device, os.O_RDONLY | os.O_DIRECT)
        buffer = mmap.mmap(-1, MIB)
        for at in range(0, len(self.expected), MIB):
            assert os.preadv(fd, [buffer], self.first + at) == MIB
            assert buffer[:] == self.expected[at : at + MIB], f"wrong data in the MiB at {self.first + at}"
        os.close(fd)


def null_stalls(place: Path, count: int, devices: int, *, rate: int, writer: bool) -> list[float]:
    """How long devices that hold nothing are away when other processes wait for the death of their own.

    Under the same load as ours, but that nothing is verified.
    """
    program = build(place)
    servers = [NullServer(program, "add") for _ in range(devices)]
    loads = [Load(str(old.device), place, i, verify=False, rate=rate) for i, old in enumerate(servers, 1)]
    oracle = Oracle(str(servers[0].device), SIZE, 128 * MIB) if writer else None
    stalls = []
    try:
        if oracle is not None:
            oracle.start()
        for _ in range(count):
            stalls.append(recovered(program, servers))
        for load in loads:
            load.finish()
    finally:
        for load in loads:
            load.kill()
    if oracle is not None:
        oracle.end()
    for server in servers:
        server.stop()
    return stalls


def recovered(program: Path, servers: list[NullServer]) -> float:
    """Kill the servers; seconds until others serve all their devices."""
    successors = [
        subprocess.Popen([str(program), "recover", str(old.id)], stdout=subprocess.PIPE, text=True)
        for old in servers
    ]
    time.sleep(1.0 if rig.EMULATED else 0.1)  # they ask the kernel again and again by now
    began = time.monotonic()
    for old in servers:
        old.process.kill()
    for new in successors:
        assert new.stdout is not None
        assert new.stdout.readline().startswith("ready ")
    stall = time.monotonic() - began
    for old, new in zip(servers, successors, strict=True):
        old.process.wait()
        old.process = new
    return stall


def handoffs(node: Generations, jobs: list[Load], count: int) -> list[float]:
    stalls = []
    for number in range(count):
        for job in jobs:
            assert job.running, f"{job.target} after {number} handoffs\n{node.log_text[-4000:]}"
        answer = node.handoff()
        assert answer["outcome"] == "succeeded", answer
        stalls.append(float(answer["stall"]))
        print(f"handoff {number + 1}: {stalls[-1] * 1e3:.1f} ms", flush=True)
        wait_for(node.ready, "the successor is ready")
    return stalls


def show(figure: Figures, what: str, stalls: list[float]) -> None:
    figure(f"{what}: median stall", statistics.median(stalls) * 1e3, "ms")
    figure(f"{what}: longest stall", max(stalls) * 1e3, "ms")
    print(f"{what}: {[round(stall * 1e3, 1) for stall in sorted(stalls)]} ms")


def compare(figure: Figures, what: str, stalls: list[float], null: list[float]) -> None:
    show(figure, what, stalls)
    show(figure, "null", null)
    ours, kernel = statistics.median(stalls), statistics.median(null)
    goal = 1.0 if HANDOFFS >= 20 else None  # a few say nothing
    figure("median stall less that of null, to that", (ours - kernel) / kernel, below=goal)


def test_one_device(node: Generations, place: Path, figure: Figures) -> None:
    node.start()
    device = rig.create(node, "disk", "128MiB")
    before = len(rig.kernel_log())
    job = Load(device, place, 1)
    oracle = Oracle(device, SIZE, 128 * MIB)
    oracle.start()
    try:
        stalls = handoffs(node, [job], HANDOFFS)
        report = job.finish()
        oracle.finish()
    finally:
        job.kill()
    null = null_stalls(place, HANDOFFS, 1, rate=300, writer=True)
    compare(figure, f"{HANDOFFS} handoffs of one device", stalls, null)
    figure("verified", report["read"]["io_bytes"] / MIB, "MiB")
    assert rig.io_errors(before) == []
    assert node.json("show", "disk")["device"] == device
    figure("writes that the oracle checked", oracle.rounds, at_least=HANDOFFS)
    assert " ERROR " not in node.log_text
    node.json("drain", "disk")
    node.json("remove", "disk")


def test_five_exports(node: Generations, place: Path, figure: Figures) -> None:
    """Three devices and two NBD exports in one daemon."""
    node.start()
    before = len(rig.kernel_log())
    targets = [rig.create(node, f"u{i}", "64MiB") for i in range(3)]
    for i in range(2):
        node.json("create", f"n{i}", "--size", "64MiB", "--transport", "nbd")
        targets.append(node.uri(f"n{i}"))
    jobs = [Load(target, place, seed, rate=60) for seed, target in enumerate(targets, 1)]
    try:
        stalls = handoffs(node, jobs, HANDOFFS)
        for job in jobs:
            job.finish()
    finally:
        for job in jobs:
            job.kill()
    for name in [f"u{i}" for i in range(3)]:
        node.json("remove", name)
    null = null_stalls(place, HANDOFFS, 3, rate=60, writer=False)
    compare(figure, f"{HANDOFFS} handoffs of five exports", stalls, null)
    assert rig.io_errors(before) == []
    assert " ERROR " not in node.log_text


GRID = {
    "successor:after:hello": "predecessor",
    "successor:got:hello-ack": "predecessor",
    "successor:before:ready": "predecessor",
    "successor:after:ready": "predecessor",
    "successor:got:cut-over": "predecessor",
    "successor:before:alive": "predecessor",
    "predecessor:got:hello": "successor",
    "predecessor:before:hello-ack": "successor",
    "predecessor:after:hello-ack": "successor",
    "predecessor:got:ready": "successor",
    "predecessor:before:cut-over": "successor",
    "predecessor:after:cut-over": "successor",
    "predecessor:got:alive": "successor",
}
"""Who dies when, and who serves after that: the table in docs/runbook.md."""


@pytest.mark.parametrize("die", GRID)
def test_either_side_dies(node: Generations, place: Path, die: str) -> None:
    """No guest of a device sees an error, and no block is wrong, whoever dies."""
    node.die = die
    node.start()
    device = rig.create(node, "disk", "64MiB")
    before = len(rig.kernel_log())
    job = Load(device, place, 1)
    try:
        time.sleep(2)
        first = node.pid
        try:
            node.handoff()
        except CommandError as error:
            print(f"{die}: {error}")
        wait_for(node.ready, f"a daemon serves\n{node.log_text}")
        assert (node.pid == first) == (GRID[die] == "predecessor"), node.log_text
        mark = sum(rig.counters(device)[:8:4])
        wait_for(
            lambda: not job.running or sum(rig.counters(device)[:8:4]) > mark + 100, "requests get through"
        )
        job.finish()
    finally:
        job.kill()
    assert rig.io_errors(before) == []
    assert node.json("show", "disk")["device"] == device
