"""kill -9 of the daemon, again and again, under fio that verifies what it writes on two devices. fio stays
the same process from the first kill to the last: what it sees of each is a pause.

``GLIDEFS_KILLS`` sets how many (20 in a long run, else 3), ``GLIDEFS_SEED`` the moments of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from waiting import wait_for

pytest.importorskip("glidefs.core._core")
import device_rig as rig
from figures import Figures
from node import MIB, Node

pytestmark = [
    pytest.mark.skipif(rig.REASON is not None, reason=str(rig.REASON)),
    pytest.mark.root,
]

KILLS = int(os.environ.get("GLIDEFS_KILLS", "20" if os.environ.get("GLIDEFS_TEST_LENGTH") == "long" else "3"))
SEED = int(os.environ.get("GLIDEFS_SEED", str(time.time_ns() % 100_000)))
JOBS = {
    "small": ["--bs=4k", "--iodepth=16", f"--size={24 * MIB}", "--thinktime=50ms", "--thinktime_blocks=32"],
    "large": ["--bs=64k", "--iodepth=8", f"--size={64 * MIB}", "--thinktime=100ms", "--thinktime_blocks=8"],
}
"""What fio does to each of the devices: bursts, so that a daemon that starts finds CPU time, too."""
SPAN = 8.0 if rig.EMULATED else 2.0
"""A kill comes at most so many seconds after both devices were seen to serve requests again."""
SETTINGS = {
    # Small enough for uploads, retirement and recycled segments to be under way at a kill.
    "cache": {"log_size": '"128MiB"', "block_cache_size": '"64MiB"', "segment_size": '"4MiB"'},
    "upload": {"sync_interval": '"5s"'},
    "daemon": {"drain_deadline": '"300s"'},
}


class Kill(NamedTuple):
    """One kill -9; times are of the wall clock."""

    at: float
    ready: float
    in_start: bool
    """Whether the daemon that was started after it was killed, too, before it was ready."""

    def name(self, number: int) -> str:
        """For figures."""
        return f"kill {number}" + (" (two, the second in the start)" if self.in_start else "")


class Verify:
    """One fio with a job per device that writes an area in random order, verifies it, and so on without end.

    Each job has one block size: with several fio does not compare the numbers of writes, and takes what an
    earlier round wrote for the last one's data.
    """

    def __init__(self, devices: list[str], where: Path) -> None:
        self.logs = where / "fio"
        options = ["--ioengine=libaio", "--direct=1", "--thread", "--rw=randwrite", "--loops=1000000"]
        options += ["--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--verify_state_save=0"]
        options += [f"--write_lat_log={self.logs}", "--log_avg_msec=250", "--log_max_value=1"]
        for device, job in zip(devices, JOBS.values(), strict=True):
            options += [f"--name={Path(device).name}", f"--filename={device}", f"--randseed={SEED}", *job]
        self.process = subprocess.Popen(
            ["nice", "-n", "19", "fio", "--output-format=json", "--log_unix_epoch=1", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=where,
        )
        self.jobs = len(devices)

    def runs(self) -> bool:
        """Whether it has not given up; it gives up at the first error."""
        return self.process.poll() is None

    def end(self) -> list[dict[str, Any]]:
        """Stop it as ^C does; the reports of its jobs."""
        self.process.send_signal(signal.SIGINT)
        output = self.process.communicate(timeout=rig.STEP)[0]
        start = output.find("{\n")
        assert start >= 0, output
        report, end = json.JSONDecoder().raw_decode(output[start:])
        said = (output[:start] + output[start + end :]).replace("fio: terminating on signal 2", "").strip()
        assert said == "", output
        assert self.process.returncode in (0, 128), output
        jobs: list[dict[str, Any]] = report["jobs"]
        assert [job["error"] for job in jobs] == [0] * self.jobs, output
        return jobs

    def slowest(self, begin: float, end: float) -> float:
        """Seconds of the slowest request on any device that completed between two times of the wall clock."""
        longest = 0.0
        for number in range(1, self.jobs + 1):
            for line in Path(f"{self.logs}_clat.{number}.log").read_text().splitlines():
                at, nanoseconds = (float(field) for field in line.split(",")[:2])
                if begin <= at / 1000 < end:
                    longest = max(longest, nanoseconds / 1e9)
        return longest


@pytest.fixture
def node(place: Path) -> Iterator[Node]:
    with rig.no_leftovers(), rig.ended(Node(place / "n", settings=SETTINGS)) as made:
        yield made.start()


def requests(device: str) -> int:
    """Reads and writes that this device has completed."""
    counters = rig.counters(device)
    return counters[0] + counters[4]


def serve_again(devices: list[str], load: Verify) -> None:
    """Wait until requests get through on each."""
    marks = {device: requests(device) + 40 for device in devices}
    wait_for(
        lambda: not load.runs() or all(requests(device) > mark for device, mark in marks.items()),
        "requests get through on both devices",
    )


def kill_and_start(node: Node, rng: random.Random, in_start: bool, start_takes: float) -> Kill:
    """Kill the daemon and start a fresh one; ``in_start``: kill that one in its start, and start another."""
    at = time.time()
    node.kill()
    if in_start:
        node.spawn()
        time.sleep(rng.uniform(0.0, start_takes))
        node.kill()
    node.start()
    return Kill(at, time.time(), in_start)


def devices_of(node: Node) -> dict[str, str]:
    return {e["name"]: e["device"] for e in node.client.call("GET", "/api/exports")}


@pytest.mark.timeout((900 if rig.EMULATED else 300) + 120 * KILLS)
def test_kill_under_fio_verify(node: Node, place: Path, figure: Figures) -> None:
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    wanted = {name: rig.create(node, name, "512MiB") for name in JOBS}
    devices = list(wanted.values())
    before = len(rig.kernel_log())
    load = Verify(devices, place)
    kills: list[Kill] = []
    start_takes = 1.0
    try:
        serve_again(devices, load)
        while sum(1 + kill.in_start for kill in kills) < KILLS and load.runs():
            time.sleep(rng.uniform(0.0, SPAN))
            kill = kill_and_start(node, rng, len(kills) % 4 == 1, start_takes)
            kills.append(kill)
            figure(f"{kill.name(len(kills))}: to ready", kill.ready - kill.at, "s")
            start_takes = start_takes if kill.in_start else kill.ready - kill.at
            assert devices_of(node) == wanted
            assert [rig.state(device) for device in devices] == [rig.LIVE] * 2
            serve_again(devices, load)
        ended = time.time()
        reports = load.end()
    finally:
        with contextlib.suppress(ProcessLookupError):
            load.process.kill()
    report_kills(kills, load, ended, figure)
    for name, report in zip(JOBS, reports, strict=True):
        figure(f"{name}: written", report["write"]["io_bytes"] / MIB, "MiB", at_least=KILLS)
        figure(f"{name}: verified", report["read"]["io_bytes"] / MIB, "MiB", at_least=KILLS)
    assert rig.io_errors(before) == []
    for name, device in wanted.items():
        node.json("remove", name)
        assert not Path(device).exists()


def report_kills(kills: list[Kill], load: Verify, ended: float, figure: Figures) -> None:
    until = [kill.at for kill in kills[1:]] + [ended]
    for number, (kill, end) in enumerate(zip(kills, until, strict=True), 1):
        figure(f"{kill.name(number)}: slowest request", load.slowest(kill.at, end), "s")
    figure("kill -9 of the daemon", sum(1 + kill.in_start for kill in kills), at_least=KILLS)
    figure("longest from kill to ready", max(kill.ready - kill.at for kill in kills), "s")
    figure("slowest request of all", load.slowest(0, ended), "s")
