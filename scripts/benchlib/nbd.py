"""NBD over a Unix socket, beside nbdkit and qemu-nbd: the same fio, in turns, on one file system.

Order: fill everything; reads while the data is in the write log; restart with an empty log after a drain,
and one pass that fills the block cache; reads from there; writes, with the upload to the store running as
it does by default; a mixed load with an upload every two seconds, then a read of what it wrote, before and
after a restart.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any, NamedTuple

from benchlib.common import GIB, KIB, MIB, Run, Settings, need, say
from benchlib.report import Report
from benchlib.targets import GlideFS, Nbdkit, NbdTarget, QemuNbd, fill

VOLUME = 4 * GIB
BYTES_PER_SECOND = 512 * MIB
"""Bytes that a run with large requests moves, for each second that a run with small ones takes."""


class Load(NamedTuple):
    """A fio job and what is wanted of it: the least ratio to nbdkit's file plugin.

    `flush`: MiB after which both flush, so that both write to the disk. `jobs`: connections.
    """

    name: str
    rw: str
    bs: str
    depth: int
    goal: float
    cpu_goal: float | None = 0.8
    flush: int = 0
    jobs: int = 1


FROM_LOG = [Load("4k random read x32, log", "randread", "4k", 32, 1.0)]
FROM_CACHE = [
    Load("4k random read x32, cache", "randread", "4k", 32, 1.0),
    Load("4k random read x1, cache", "randread", "4k", 1, 1.0),
    Load("4k random read, 4 connections x8, cache", "randread", "4k", 8, 1.0, jobs=4),
    Load("128k read x8, cache", "read", "128k", 8, 1.0),
]
WRITES = [
    Load("4k random write x32", "randwrite", "4k", 32, 1.2),
    Load("4k random write x1", "randwrite", "4k", 1, 1.0),
    Load("128k write x8", "write", "128k", 8, 1.0),
    Load("128k write x8, flush each 64 MiB", "write", "128k", 8, 1.0, flush=64),
]
MIXED = Load("4k random read/write 70/30 x32", "randrw", "4k", 32, 1.5)
READ_BACK = Load("128k read x8 of what that wrote", "read", "128k", 8, 1.0)
AFTER_RESTART = Load("128k read x8 of it after a restart", "read", "128k", 8, 0.0, None)


def run(settings: Settings) -> Report:
    """Measure. Raises BenchError."""
    need("fio", "nbdkit", "qemu-nbd")
    report = Report("nbd")
    region = (128 if settings.short else 512) * MIB
    with contextlib.ExitStack() as stack:
        glide = GlideFS(settings.work)
        stack.callback(glide.stop)
        glide.start()
        glide.create(VOLUME, transport="nbd")
        others: list[NbdTarget] = []
        for make in (
            lambda: Nbdkit(settings.work, region, "file"),
            lambda: Nbdkit(settings.work, region, "memory"),
            lambda: QemuNbd(settings.work, region),
        ):
            target: NbdTarget = make()
            stack.callback(target.stop)
            others.append(target)
        fill(glide, region)
        glide.drain()
        targets = [glide, *others]
        rounds(report, settings, targets, FROM_LOG, region)
        glide.restart(drop_log=True)
        glide.fio(rw="read", bs="1m", iodepth=8, size=region)
        rounds(report, settings, targets, FROM_CACHE, region)
        rounds(report, settings, targets, WRITES, region)
        check_sources(report, glide)
        mixed(report, settings, glide, targets, region)
    for load in [*FROM_LOG, *FROM_CACHE, *WRITES, MIXED, READ_BACK]:
        unit = unit_of(load)
        report.compare(load.name, glide.name, "nbdkit file", unit, load.goal)
        report.compare(load.name, glide.name, "nbdkit file", "CPU us/op", load.cpu_goal, most=True)
        report.compare(
            load.name, glide.name, "nbdkit file", "p99 ms", 1.0 if load is MIXED else None, most=True
        )
        for other in ("nbdkit memory", "qemu-nbd"):
            report.compare(load.name, glide.name, other, unit)
    threads = ", ".join(f"{t.name} {t.threads}" for t in targets if isinstance(t, Nbdkit))
    report.notes.append(f"threads that did best in a second of the mixed load: {threads}")
    return report


def mixed(report: Report, settings: Settings, glide: GlideFS, targets: list[NbdTarget], region: int) -> None:
    """Reads and writes while the log is uploaded every two seconds: what was written here stays here."""
    glide.configure({"daemon": {"on_stop": '"remove"'}, "upload": {"sync_interval": '"2s"'}})
    glide.restart()
    rounds(report, settings, targets, [MIXED, READ_BACK], region)
    report.add(MIXED.name, glide.name, "reads from the store", glide.count("faults"))
    glide.drain()
    for _ in range(settings.rounds):
        glide.restart()
        measure(report, glide, AFTER_RESTART, region, settings.seconds)
        report.add(AFTER_RESTART.name, glide.name, "reads from the store", glide.count("faults"))


def unit_of(load: Load) -> str:
    """Small requests count by number, large ones by bytes."""
    return "IOPS" if load.bs == "4k" else "MB/s"


def rounds(
    report: Report, settings: Settings, targets: list[NbdTarget], loads: list[Load], region: int
) -> None:
    """Every load, all servers in turns."""
    for load in loads:
        for number in range(settings.rounds):
            say(f"nbd: {load.name}, round {number + 1} of {settings.rounds}")
            for target in targets:
                measure(report, target, load, region, settings.seconds)


def measure(report: Report, target: NbdTarget, load: Load, region: int, seconds: int) -> None:
    """One run. GlideFS writes as much again before it, unmeasured, so that the upload is under way."""
    options: dict[str, Any] = {"rw": load.rw, "bs": load.bs, "iodepth": load.depth, "size": region}
    if load.jobs > 1:
        options["numjobs"] = load.jobs
    if load.flush:
        options["fsync"] = load.flush * MIB // (128 * KIB)
    if load.rw == "randrw":
        options["rwmixread"] = 70
    if load.rw.startswith("rand"):
        options["norandommap"] = 1
    if load.bs == "4k":
        options |= {"time_based": 1, "runtime": seconds}
    else:  # by bytes: what a fast server writes in a time is kept in the store by GlideFS
        options |= {"io_size": seconds * BYTES_PER_SECOND}
    target.settle()
    os.sync()  # what one server left dirty must not be written back during the run of the next
    if isinstance(target, GlideFS) and load in WRITES:
        result = measure_upload(report, target, load, options)
    else:
        result = target.fio(**options)
    report.add(load.name, target.name, unit_of(load), value(load, result))
    report.add(load.name, target.name, "CPU us/op", result.cpu_us)
    for unit, latency in (("p50 ms", result.p50), ("p99 ms", result.p99), ("p99.9 ms", result.p999)):
        report.add(load.name, target.name, unit, latency)


def measure_upload(report: Report, target: GlideFS, load: Load, options: dict[str, Any]) -> Run:
    """A run of writes with the upload of earlier ones under way, and what all of it costs until drained."""
    cpu = target.cpu()
    earlier = target.fio(**options)
    sent = target.sent()
    result = target.fio(**options)
    report.add(load.name, target.name, "MB uploaded meanwhile", (target.sent() - sent) / 1e6)
    target.drain()
    ops = max(1, earlier.ops + result.ops)
    report.add(load.name, target.name, "CPU us/op until drained", (target.cpu() - cpu) / ops * 1e6)
    return result


def value(load: Load, result: Any) -> float:
    """The figure of a run in its unit."""
    return float(result.iops if unit_of(load) == "IOPS" else result.mb_per_second)


def check_sources(report: Report, glide: GlideFS) -> None:
    """Say where the reads since the restart came from: the cache phase must not have read the log."""
    log, cache = glide.count("log_hits"), glide.count("cache_reads")
    report.notes.append(
        f"reads since the restart: {cache:.0f} from the block cache, {log:.0f} from the log, "
        f"{glide.count('faults'):.0f} faults"
    )
