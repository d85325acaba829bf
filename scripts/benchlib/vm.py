"""Devices in a VM: /dev/ublkbN beside the kernel's loop driver on a file, /dev/nbdN beside that of nbdkit.

The host's half boots the VM and runs the other half in it. Under emulated CPUs only ratios mean something.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchlib.common import GIB, IN_VM, MIB, ROOT, BenchError, Settings, fio, need, random_file, say
from benchlib.report import Figure, Ratio, Report
from benchlib.targets import GlideFS, Nbdkit
from glidefs.transport.ublk.driver import ublk_missing

READ_LOG = "4k random read x32, log"
READ_CACHE = "4k random read x32, cache"
WRITE = "4k random write x32"
NBD_DEVICE = "/dev/nbd15"
"""nbdkit's; ours takes the first that is free."""
CONNECTIONS = (1, 4)
"""Of nbdkit's device: with as many as do most in two seconds of reads. Ours has one."""


class Peer(NamedTuple):
    """A device that another server has, beside ours by `transport`; `goals`: least ratios of IOPS."""

    transport: str
    name: str
    goals: dict[str, float]


# Of loop: what a ublk loop target in C reaches of it.
LOOP = Peer("ublk", "loop driver", {READ_LOG: 8.5 / 39, READ_CACHE: 8.5 / 39, WRITE: 24 / 45})
NBDKIT = Peer("nbd-device", "nbdkit file", {READ_LOG: 1.0, READ_CACHE: 1.0, WRITE: 1.0})


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


@contextlib.contextmanager
def nbdkit_device(work: Path, size: int) -> Iterator[str]:
    """A device of the kernel's NBD driver that nbdkit serves from a file, with the best number of sockets."""
    server = Nbdkit(work, size, "file")
    reads = {"rw": "randread", "bs": "4k", "iodepth": 32, "time_based": 1, "runtime": 2}
    try:
        done = {}
        for count in CONNECTIONS:
            with connected(server.socket, count) as device:
                done[count] = job(device, size, **reads).iops
        with connected(server.socket, max(done, key=lambda count: done[count])) as device:
            yield device
    finally:
        server.stop()


@contextlib.contextmanager
def connected(socket: Path, count: int) -> Iterator[str]:
    """The server of a Unix socket as a device."""
    client = ["nbd-client", "-unix", str(socket), NBD_DEVICE, "-b", "4096", "-C", str(count)]
    done = subprocess.run(client, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchError(f"nbd-client: {done.stderr.strip()}")
    try:
        yield NBD_DEVICE
    finally:
        subprocess.run(["nbd-client", "-d", NBD_DEVICE], check=False, capture_output=True)


def inside(settings: Settings) -> Report:
    """Measure both pairs of devices."""
    need("fio", "losetup", "nbdkit", "nbd-client")
    report = Report("vm")
    region = (64 if settings.short else 256) * MIB
    if ublk_is_here():
        image = settings.work / "loop.img"
        random_file(image, region)
        with loop_device(image) as loop:
            beside(report, settings, region, LOOP, loop)
    with nbdkit_device(settings.work, region) as device:
        beside(report, settings, region, NBDKIT, device)
    report.notes.append(f"Linux {os.uname().release}, in a VM")
    return report


def ublk_is_here() -> bool:
    """Whether this kernel has what a ublk device needs; 6.1 has not."""
    reason = ublk_missing()
    if reason is not None:
        say(f"vm: without ublk: {reason}")
    return reason is None


def beside(report: Report, settings: Settings, region: int, peer: Peer, device: str) -> None:
    """Our device and that of the peer, in turns."""
    work = settings.work / peer.transport
    work.mkdir()
    with contextlib.ExitStack() as stack:
        glide = GlideFS(work)
        stack.callback(glide.stop)
        glide.start()
        glide.create(GIB, transport=peer.transport)
        say(f"vm: {peer.transport}: filling")
        job(glide.device, region, rw="write", bs="1m", iodepth=4)
        job(device, region, rw="read", bs="1m", iodepth=4)
        pairs(report, settings, glide, peer, device, region, READ_LOG)
        glide.drain()
        glide.restart()
        job(glide.device, region, rw="read", bs="1m", iodepth=4)
        pairs(report, settings, glide, peer, device, region, READ_CACHE)
        pairs(report, settings, glide, peer, device, region, WRITE)
        glide.command("remove", glide.export)
    for load, goal in peer.goals.items():
        report.compare(title(peer, load), glide.name, peer.name, "IOPS", goal)


def title(peer: Peer, load: str) -> str:
    """A load over a transport."""
    return f"{peer.transport}: {load}"


def job(device: str, region: int, pid: int | None = None, **options: Any) -> Any:
    """fio with libaio, without the page cache of the device."""
    return fio({"ioengine": "libaio", "direct": 1, "filename": device, "size": region, **options}, pid)


def pairs(
    report: Report, settings: Settings, glide: GlideFS, peer: Peer, device: str, region: int, load: str
) -> None:
    """One load, both devices in turns."""
    for number in range(settings.rounds):
        say(f"vm: {title(peer, load)}, round {number + 1} of {settings.rounds}")
        if load == WRITE:
            glide.settle()
        options: dict[str, Any] = {"rw": "randwrite" if load == WRITE else "randread", "bs": "4k"}
        options |= {"iodepth": 32, "norandommap": 1, "time_based": 1, "runtime": settings.seconds}
        result = job(glide.device, region, glide.pid, **options)
        report.add(title(peer, load), glide.name, "IOPS", result.iops)
        report.add(title(peer, load), glide.name, "CPU us/op", result.cpu_us)
        report.add(title(peer, load), peer.name, "IOPS", job(device, region, **options).iops)
