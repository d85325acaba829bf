"""vhost-user-blk beside qemu-storage-daemon on a full raw file, with one front-end (``vhost_load.c``), and
beside the NBD socket of the same daemon with fio. Hot reads, from the block cache, and writes.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
from pathlib import Path
from typing import NamedTuple

from benchlib.common import KIB, MIB, BenchError, Child, Settings, cpu_seconds, need, random_file, say
from benchlib.report import Report
from benchlib.targets import GlideFS, fill

VHOST, NBD, QEMU = "GlideFS", "GlideFS NBD", "qemu-storage-daemon"


class Load(NamedTuple):
    """Requests of one kind; the least ratio to qemu-storage-daemon, and to NBD."""

    name: str
    rw: str
    depth: int
    queues: int
    goal: float
    nbd_goal: float | None = None


LOADS = [
    Load("4k random read x32", "read", 32, 1, 1.5, 2.0),
    Load("4k random read x32, 4 queues x8", "read", 8, 4, 1.5),
    Load("4k random read x1", "read", 1, 1, 1.25),
    Load("4k random write x32", "write", 32, 1, 1.5),
]


def run(settings: Settings) -> Report:
    """Measure. Raises BenchError."""
    need("fio", "cc", "qemu-storage-daemon")
    report = Report("vhost")
    size = (64 if settings.short else 512) * MIB
    program = build(settings.work)
    with contextlib.ExitStack() as stack:
        glide = GlideFS(settings.work)
        stack.callback(glide.stop)
        glide.start()
        glide.create(size, transport="nbd")
        say("vhost: filling")
        fill(glide, size)
        glide.drain()
        glide.restart(drop_log=True)
        glide.fio(rw="read", bs="1m", iodepth=8, size=size)
        qemu = start_qemu(settings.work, size)
        stack.callback(qemu.stop)
        for load in LOADS:
            for number in range(settings.rounds):
                say(f"vhost: {load.name}, round {number + 1} of {settings.rounds}")
                served = use(glide, "vhost-user")
                glide.drain()
                measure(report, VHOST, program, served, glide.pid, load, size, settings.seconds)
                socket = settings.work / "qsd.sock"
                measure(report, QEMU, program, str(socket), qemu.pid, load, size, settings.seconds)
                if load.queues == 1:
                    glide.uri = use(glide, "nbd")
                    glide.drain()
                    measure_nbd(report, glide, load, size, settings.seconds)
    for load in LOADS:
        report.compare(load.name, VHOST, QEMU, "IOPS", load.goal)
        report.compare(load.name, VHOST, QEMU, "CPU us/op", 0.7, most=True)
        report.compare(load.name, VHOST, QEMU, "p50 us", 0.8 if load.depth == 1 else None, most=True)
        if load.queues == 1:
            report.compare(load.name, VHOST, NBD, "IOPS", load.nbd_goal)
    return report


def build(work: Path) -> Path:
    """Compile the front-end."""
    program = work / "vhost_load"
    source = Path(__file__).with_name("vhost_load.c")
    command = ["cc", "-O2", "-D_GNU_SOURCE", "-pthread", "-o", str(program), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchError(f"{source.name} does not compile: {done.stderr}")
    return program


def start_qemu(work: Path, size: int) -> Child:
    """A full raw file in the page cache, served as QEMU does by default."""
    image, socket = work / "qsd.img", work / "qsd.sock"
    random_file(image, size)
    image.read_bytes()
    export = (
        f"type=vhost-user-blk,id=e,node-name=f,addr.type=unix,addr.path={socket},writable=on,num-queues=4"
    )
    child = Child(
        [
            "qemu-storage-daemon",
            "--blockdev",
            f"driver=file,node-name=f,filename={image}",
            "--export",
            export,
        ],
        work / "qsd.log",
    )
    child.wait_until(socket.exists, "listening")
    return child


def use(glide: GlideFS, transport: str) -> str:
    """Serve the export so. Returns where."""
    glide.command("transport", glide.export, transport)
    return str(json.loads(glide.command("show", glide.export, "--json"))["device"])


def measure(
    report: Report, name: str, program: Path, socket: str, pid: int, load: Load, size: int, seconds: int
) -> None:
    """One run of the front-end."""
    command = [str(program), socket, load.rw, str(size), str(4 * KIB), str(load.depth), str(load.queues)]
    before = cpu_seconds(pid)
    done = subprocess.run([*command, str(seconds)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchError(f"{name}: {done.stderr.strip()}")
    rate, median, worst = map(float, done.stdout.split())
    report.add(load.name, name, "IOPS", rate)
    report.add(load.name, name, "CPU us/op", (cpu_seconds(pid) - before) * 1e6 / (rate * seconds))
    report.add(load.name, name, "p50 us", median)
    report.add(load.name, name, "p99 us", worst)


def measure_nbd(report: Report, glide: GlideFS, load: Load, size: int, seconds: int) -> None:
    """The same by fio over the NBD socket."""
    done = glide.fio(
        rw=f"rand{load.rw}",
        bs="4k",
        iodepth=load.depth,
        size=size,
        norandommap=1,
        time_based=1,
        runtime=seconds,
    )
    report.add(load.name, NBD, "IOPS", done.iops)
    report.add(load.name, NBD, "CPU us/op", done.cpu_us)
    report.add(load.name, NBD, "p50 us", done.p50 * 1e3)
    report.add(load.name, NBD, "p99 us", done.p99 * 1e3)
