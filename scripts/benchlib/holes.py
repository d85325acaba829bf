"""Reads of holes beside reads of the log, in one process.

The volume is 10 TiB without a byte in its store. Each of its pages of 128 GiB is read once; then 4 KiB random
reads take turns between the holes and a part that was written and is in the log.
"""

from __future__ import annotations

import contextlib
from typing import Any

from benchlib.common import GIB, MIB, Settings, need, say
from benchlib.report import Report
from benchlib.targets import GlideFS, fill

SIZE = 10 << 40
PAGE = 128 * GIB
HOLES = "4k random read x32 of holes"
LOG = "from the log map"


def run(settings: Settings) -> Report:
    """Measure. Raises BenchError."""
    need("fio")
    report = Report("holes")
    written = (64 if settings.short else 256) * MIB
    with contextlib.ExitStack() as stack:
        glide = GlideFS(settings.work)
        stack.callback(glide.stop)
        glide.start()
        glide.create(SIZE, transport="nbd")
        fill(glide, written)
        say("holes: every page once")
        glide.fio(rw=f"read:{PAGE - 4096}", bs="4k", offset=PAGE, size=SIZE - PAGE, number_ios=SIZE // PAGE)
        faults = glide.count("faults")
        for number in range(settings.rounds):
            say(f"holes: round {number + 1} of {settings.rounds}")
            measure(report, settings, glide, LOG, offset=0, size=written)
            measure(report, settings, glide, glide.name, offset=PAGE, size=SIZE - PAGE)
        report.notes.append(f"{glide.count('faults') - faults:.0f} faults while measured")
    report.compare(HOLES, glide.name, LOG, "IOPS", 0.8)
    report.compare(HOLES, glide.name, LOG, "CPU us/op", 1.0, most=True)
    return report


def measure(report: Report, settings: Settings, glide: GlideFS, name: str, **where: Any) -> None:
    """One run in a part of the volume."""
    load: dict[str, Any] = {"rw": "randread", "bs": "4k", "iodepth": 32, "norandommap": 1, "time_based": 1}
    result = glide.fio(**load, **where, runtime=settings.seconds)
    report.add(HOLES, name, "IOPS", result.iops)
    report.add(HOLES, name, "CPU us/op", result.cpu_us)
