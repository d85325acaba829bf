"""/dev/ublkbN beside the kernel's loop driver on a file, in a VM whose kernel has ublk.

The host's half boots the VM and runs the other half in it. Under emulated CPUs only ratios mean something.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchlib.common import GIB, IN_VM, MIB, ROOT, BenchError, Settings, fio, need, random_file, say
from benchlib.report import Figure, Ratio, Report
from benchlib.targets import GlideFS

READ_LOG = "4k random read x32, log"
READ_CACHE = "4k random read x32, cache"
WRITE = "4k random write x32"
LOOP = "loop driver"
# What a ublk loop target in C reaches of the loop driver.
GOALS = {READ_LOG: 8.5 / 39, READ_CACHE: 8.5 / 39, WRITE: 24 / 45}


def run(settings: Settings) -> Report:
    """In the VM: measure. Elsewhere: boot one for it."""
    return inside(settings) if IN_VM else outside(settings)


def outside(settings: Settings) -> Report:
    """Boot, and read what came of it."""
    results = (settings.results / "vm-share").resolve()
    results.mkdir(parents=True, exist_ok=True)
    (results / "vm.json").unlink(missing_ok=True)
    command: list[str | Path] = [ROOT / "vm-test" / "run", "--kernel", settings.kernel, "--disk", "12G"]
    command += ["--timeout", "3000", "--", ROOT / "scripts" / "bench", "vm", "--no-install"]
    command += ["--rounds", str(settings.rounds), "--seconds", str(settings.seconds)]
    command += ["--work", "/scratch", "--results", results]
    command += ["--short"] if settings.short else []
    environment = {**os.environ, "GLIDEFS_VM_SHARE": str(results), "GLIDEFS_LOG": "/dev/null"}
    status = subprocess.run(
        [str(part) for part in command],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        check=False,
    ).returncode
    if status or not (results / "vm.json").exists():
        raise BenchError(f"the benchmark in the VM failed (status {status})")
    found = json.loads((results / "vm.json").read_text())
    for figure in found["figures"]:
        del figure["median"]
    for ratio in found["ratios"]:
        del ratio["met"]
    return Report(
        "vm",
        [Figure(**figure) for figure in found["figures"]],
        [Ratio(**ratio) for ratio in found["ratios"]],
        found["notes"],
    )


@contextlib.contextmanager
def loop_device(image: Path) -> Iterator[str]:
    """A loop device on a file."""
    done = subprocess.run(
        ["losetup", "--show", "-f", str(image)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise BenchError(f"losetup: {done.stderr.strip()}")
    device = done.stdout.strip()
    try:
        yield device
    finally:
        subprocess.run(["losetup", "-d", device], check=False)


def inside(settings: Settings) -> Report:
    """Measure both devices in turns."""
    need("fio", "losetup")
    report = Report("vm")
    region = (64 if settings.short else 256) * MIB
    with contextlib.ExitStack() as stack:
        glide = GlideFS(settings.work)
        stack.callback(glide.stop)
        glide.start()
        glide.create(GIB, transport="ublk")
        image = settings.work / "loop.img"
        random_file(image, region)
        loop = stack.enter_context(loop_device(image))
        say("vm: filling")
        job(glide.device, region, rw="write", bs="1m", iodepth=4)
        job(loop, region, rw="read", bs="1m", iodepth=4)
        pairs(report, settings, glide, loop, region, READ_LOG, "randread")
        glide.drain()
        glide.restart()
        job(glide.device, region, rw="read", bs="1m", iodepth=4)
        pairs(report, settings, glide, loop, region, READ_CACHE, "randread")
        pairs(report, settings, glide, loop, region, WRITE, "randwrite")
    for load, goal in GOALS.items():
        report.compare(load, glide.name, LOOP, "IOPS", goal)
    report.notes.append(f"Linux {os.uname().release}, in a VM")
    return report


def job(device: str, region: int, pid: int | None = None, **options: Any) -> Any:
    """fio with libaio, without the page cache of the device."""
    return fio({"ioengine": "libaio", "direct": 1, "filename": device, "size": region, **options}, pid)


def pairs(
    report: Report, settings: Settings, glide: GlideFS, loop: str, region: int, load: str, rw: str
) -> None:
    """One load, both devices in turns."""
    for number in range(settings.rounds):
        say(f"vm: {load}, round {number + 1} of {settings.rounds}")
        if rw == "randwrite":
            glide.settle()
        options: dict[str, Any] = {"rw": rw, "bs": "4k", "iodepth": 32, "norandommap": 1}
        options |= {"time_based": 1, "runtime": settings.seconds}
        result = job(glide.device, region, glide.pid, **options)
        report.add(load, glide.name, "IOPS", result.iops)
        report.add(load, glide.name, "CPU us/op", result.cpu_us)
        report.add(load, LOOP, "IOPS", job(loop, region, **options).iops)
