"""Random writes for a quarter of an hour over a log that fills: whether guests ever stand still.

The log is 2 GiB, the store a directory, everything else as it is by default. What guests get is compared with
what is committed meanwhile: the log only lends.
"""

from __future__ import annotations

import contextlib
import shutil
import statistics
from pathlib import Path

from benchlib.common import GIB, MIB, BenchError, Settings, need, say
from benchlib.report import Ratio, Report
from benchlib.targets import GlideFS

LOAD = "4k random write x32, log of 2 GiB"
LONG = 900
"""Seconds. Nothing collects what is uploaded meanwhile before compaction, so where the disk has no room for
it, guests write what compresses well enough."""
MOST = 330 * MIB
"""Bytes per second that guests may get."""
LEAST_KEPT = 10
"""Percent of such data that cannot be compressed."""


def run(settings: Settings) -> Report:
    """Measure. Raises BenchError."""
    need("fio")
    report = Report("sustained")
    room = shutil.disk_usage(settings.work).free * 9 // 10
    seconds = 20 if settings.short else LONG
    kept = min(100, room * 100 // (MOST * seconds))
    if kept < LEAST_KEPT:
        raise BenchError(f"{settings.work} has no room for {MOST * seconds * LEAST_KEPT // 100} bytes")
    with contextlib.ExitStack() as stack:
        glide = GlideFS(settings.work, overrides={"cache": {"log_size": '"2GiB"'}})
        stack.callback(glide.stop)
        glide.start()
        glide.create(8 * GIB, transport="nbd")
        say(f"sustained: {seconds} s of writes")
        log = settings.work / "rate"
        result = glide.fio(
            rw="randwrite",
            bs="4k",
            iodepth=32,
            size=8 * GIB,
            norandommap=1,
            refill_buffers=1,
            buffer_compress_percentage=100 - kept,
            time_based=1,
            runtime=seconds,
            write_bw_log=log,
            log_avg_msec=1000,
        )
        uploaded = result.mb_per_second * 1e6 - glide.metrics()["glidefs_dirty_bytes"] / result.seconds
        rates = seconds_of(log.with_name("rate_bw.1.log"))
    mean = statistics.fmean(rates)
    if kept < 100:
        report.notes.append(f"{100 - kept} % of what was written compresses: the disk has no room for more")
    report.add(LOAD, glide.name, "MB/s", result.mb_per_second)
    report.add(LOAD, glide.name, "MB/s committed", uploaded / 1e6)
    report.add(LOAD, glide.name, "MB/s, slowest second", min(rates) / 1e6)
    for unit, value in (
        ("p50 ms", result.p50),
        ("p99 ms", result.p99),
        ("p99.9 ms", result.p999),
        ("longest ms", result.longest),
    ):
        report.add(LOAD, glide.name, unit, value)
    report.want(LOAD, glide.name, "p99.9 ms", 20.0)
    report.want(LOAD, glide.name, "longest ms", 250.0)
    report.add(LOAD, glide.name, "CPU us/op", result.cpu_us)
    report.ratios.append(Ratio(LOAD, "committed", "MB/s", result.mb_per_second * 1e6 / uploaded, 0.9))
    report.ratios.append(Ratio(LOAD, "mean", "slowest second", min(rates) / mean, 0.5))
    return report


def seconds_of(log: Path) -> list[float]:
    """Bytes per second in each second but the last, which is not whole."""
    rates = [float(line.split(",")[1]) * 1024 for line in log.read_text().splitlines()]
    if len(rates) < 2:
        raise BenchError(f"fio logged no rates in {log}")
    return rates[:-1]
