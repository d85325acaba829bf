"""Handoffs under fio with checksums, on connections that were there before the first of them."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from handoff_rig import Generations
from waiting import DEADLINE, wait_for

pytestmark = [
    pytest.mark.skipif(shutil.which("fio") is None, reason="fio is not installed"),
    pytest.mark.timeout(3600),
]

HANDOFFS = int(os.environ.get("GLIDEFS_HANDOFFS", "8"))
"""How many in a normal run; 100 is what the goal is stated for."""


class Fio:
    """fio that writes and verifies one export until it is told to end."""

    def __init__(self, directory: Path, uri: str, seed: int, *, seconds: int) -> None:
        self.output = directory / f"fio{seed}.json"
        self.log = directory / f"fio{seed}.log"
        job = [
            "--name=verify",
            "--ioengine=nbd",
            f"--uri={uri}",
            "--rw=randwrite",
            "--bsrange=4k-64k",
            "--iodepth=16",
            "--size=96m",
            "--verify=crc32c",
            "--verify_fatal=1",
            "--verify_state_save=0",
            "--verify_backlog=256",
            "--do_verify=1",
            "--time_based",
            f"--runtime={seconds}",
            f"--randseed={seed}",
            "--rate_iops=1500",
            "--fsync=64",
        ]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                ["fio", *job, "--output-format=json", f"--output={self.output}"], stdout=log, stderr=log
            )

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def report(self) -> dict[str, Any]:
        """What it did; asserts that it met no error."""
        code = self.process.wait(DEADLINE * 5)
        text = self.output.read_text() + self.log.read_text()
        assert code in (0, 128), text  # 128: it was told to end
        text = self.output.read_text()
        job: dict[str, Any] = json.loads(text[text.index("{") :])["jobs"][0]
        assert job["error"] == 0, job
        return job

    def kill(self) -> None:
        if self.running:
            self.process.kill()
            self.process.wait()


def test_handoffs_under_verify(
    make_daemon: Callable[..., Generations], tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    daemon = make_daemon().start()
    uris = []
    for name in ("one", "two"):
        daemon.run("create", name, "--size", "128MiB", "--transport", "nbd")
        uris.append(daemon.uri(name))
    jobs = [Fio(tmp_path, uri, seed, seconds=36000) for seed, uri in enumerate(uris, 1)]
    stalls: list[float] = []

    def write() -> bool:
        return all(daemon.json("show", name)["volume"]["dirty_bytes"] for name in ("one", "two"))

    try:
        wait_for(write, "both write")
        for number in range(HANDOFFS):
            assert all(job.running for job in jobs), f"after {number}: {daemon.log_text[-3000:]}"
            if number % 3 == 1:
                daemon.run("drain", "one")
            answer = daemon.handoff()
            assert answer["outcome"] == "succeeded", answer
            assert answer["connections"] == 2
            stalls.append(answer["stall"])
        for job in jobs:
            job.process.terminate()
        reports = [job.report() for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    print(
        f"\n{HANDOFFS} handoffs: stall median {statistics.median(stalls) * 1e3:.1f} ms, "
        f"longest {max(stalls) * 1e3:.1f} ms; verified "
        f"{sum(report['read']['io_bytes'] for report in reports) >> 20} MiB"
    )
    record_property("stall_median_ms", statistics.median(stalls) * 1e3)
    record_property("stall_longest_ms", max(stalls) * 1e3)
    assert all(report["read"]["io_bytes"] for report in reports)
    log = daemon.log_text
    assert " ERROR " not in log, log[-4000:]
    limit = float(os.environ.get("GLIDEFS_STALL_LIMIT", "1.0"))
    *others, longest = sorted(stalls)
    assert max(others, default=0.0) < limit
    assert longest < limit + 4.0  # the machine itself may stand still once
