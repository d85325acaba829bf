"""What writing costs at the store: bytes and PUTs, until it has settled."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from benchlib.common import GIB, MIB, BenchError, Settings, need, say
from benchlib.report import Ratio, Report
from benchlib.targets import GlideFS

EMPTY = "random 4k writes over an empty volume"
FULL = "random 4k writes over a full volume, compaction settled"
QUIET = 150.0
"""Seconds without an upload after which compaction counts as settled: longer than its settling time."""
LONGEST = 3600.0


def run(settings: Settings) -> Report:
    """Measure. Raises BenchError."""
    need("fio")
    report = Report("cost")
    written = (64 if settings.short else 256) * MIB
    with contextlib.ExitStack() as stack:
        glide = GlideFS(settings.work)
        stack.callback(glide.stop)
        glide.start()
        empty_volume(report, glide, written)
        if settings.short:
            report.notes.append("short: the full volume is left out")
        else:
            full_volume(report, glide)
    return report


def packs(store: Path) -> int:
    """Packs in the store: each is one PUT, and none is ever deleted by uploads or compaction."""
    return sum(1 for path in store.glob("*/packs/*/*") if path.is_file())


def random_writes(glide: GlideFS, size: int, written: int) -> None:
    """Incompressible data at random sectors of the whole volume."""
    glide.fio(
        rw="randwrite", bs="4k", iodepth=32, size=size, io_size=written, norandommap=1, refill_buffers=1
    )


def empty_volume(report: Report, glide: GlideFS, written: int) -> None:
    """Over 64 GiB that were never written; without waiting for compaction."""
    say("cost: an empty volume of 64 GiB")
    glide.create(64 * GIB, "empty", "nbd")
    sent, count = glide.sent(), packs(glide.store)
    random_writes(glide, 64 * GIB, written)
    glide.drain()
    amplification = (glide.sent() - sent) / written
    puts = packs(glide.store) - count
    report.add(EMPTY, glide.name, "bytes uploaded / written", amplification)
    report.add(EMPTY, glide.name, "PUTs of packs", puts)
    report.ratios.append(Ratio(EMPTY, "written bytes", "bytes uploaded", amplification, 1.15, True))
    report.want(EMPTY, glide.name, "PUTs of packs", 12)


def full_volume(report: Report, glide: GlideFS) -> None:
    """4 GiB over 16 GiB of data, compaction included."""
    size, written = 16 * GIB, 4 * GIB
    say("cost: filling a volume of 16 GiB")
    glide.create(size, "full", "nbd")
    glide.fio(rw="write", bs="1m", iodepth=8, size=size, refill_buffers=1)
    glide.drain()
    settled(glide)
    sent, count = glide.sent(), packs(glide.store)
    say("cost: 4 GiB of random writes over it")
    random_writes(glide, size, written)
    glide.drain()
    drained = glide.sent() - sent
    settled(glide)
    amplification = (glide.sent() - sent) / written
    report.add(FULL, glide.name, "bytes uploaded / written", amplification)
    report.add(FULL, glide.name, "bytes uploaded / written when drained", drained / written)
    report.add(FULL, glide.name, "PUTs of packs", packs(glide.store) - count)
    report.ratios.append(Ratio(FULL, "written bytes", "bytes uploaded", amplification, 3.0, True))


def settled(glide: GlideFS) -> None:
    """Wait until nothing was uploaded for a while."""
    say("cost: waiting until compaction has settled")
    deadline = time.monotonic() + LONGEST
    last, since = glide.sent(), time.monotonic()
    while time.monotonic() - since < QUIET:
        if time.monotonic() > deadline:
            raise BenchError("compaction does not settle")
        time.sleep(2)
        if (now := glide.sent()) != last:
            last, since = now, time.monotonic()
