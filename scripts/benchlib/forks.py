"""Many forks of one base, made and read at once on a host that has nothing of it; the store is 20 ms away.

What the base's blocks cost is asked of the store once, however many forks read them. Without read-ahead,
whose pieces depend on time.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from benchlib.cold import begin_empty, build, copy_packs, far
from benchlib.common import BLOCK, MIB, Settings, fio_jobs, need, random_file, say
from benchlib.report import Ratio, Report
from benchlib.targets import METRICS_AGE, GlideFS, on_seaweedfs

DELAY = 20
FORKS = 500
BLOCKS = 200
"""That each fork reads, one after the other, as a guest that boots does."""
ONE, ALL = "one fork", f"{FORKS} forks at once"


def run(settings: Settings) -> Report:
    """Measure. Raises BenchError."""
    need("fio", "cc")
    report = Report("forks")
    image = settings.work / "image"
    random_file(image, 256 * MIB)
    with contextlib.ExitStack() as stack:
        weed, glide = on_seaweedfs(stack, settings.work)
        glide.command("bless", str(image), "--name", "base")
        build(settings.work, "far_store")
        copy_packs(weed.endpoint, settings.work / "packs")
        for number in range(settings.rounds):
            with far(settings.work, weed.endpoint, DELAY) as port:
                for load, count in ((ONE, 1), (ALL, 20 if settings.short else FORKS)):
                    say(f"forks: {load}, round {number + 1} of {settings.rounds}")
                    measure(report, glide, settings.work, port, load, count)
    gets = report.get(ALL, glide.name, "GETs") / report.get(ONE, glide.name, "GETs")
    report.ratios.append(Ratio(ALL, ONE, "GETs", gets, 1.1, most=True))
    return report


def measure(report: Report, glide: GlideFS, work: Path, port: int, load: str, count: int) -> None:
    """From nothing to forks that have read their first blocks."""
    begin_empty(glide, port, read_ahead=False)
    before = settled_gets(glide)
    cpu, began = glide.cpu(), time.monotonic()
    names = f"{load.partition(' ')[0]}-{time.monotonic_ns()}"
    glide.command(
        "create", f"{names}-{{}}", "--count", str(count), "--from", "base:base", "--transport", "nbd"
    )
    made = time.monotonic() - began
    socket = glide.base / "run" / "nbd.sock"
    uris = [f"nbd+unix:///{names}-{number}?socket={socket}" for number in range(1, count + 1)]
    load_of_one = {
        "ioengine": "nbd",
        "rw": "read:124k",
        "bs": "4k",
        "number_ios": BLOCKS,
        "size": BLOCKS * BLOCK,
    }
    fio_jobs(load_of_one, [{"uri": uri} for uri in uris], work / "forks.fio")
    report.add(load, glide.name, "s until made", made)
    report.add(load, glide.name, "s until read", time.monotonic() - began)
    report.add(load, glide.name, "CPU s", glide.cpu() - cpu)
    report.add(load, glide.name, "GETs", gets(glide) - before)
    glide.command("remove", *[f"{names}-{number}" for number in range(1, count + 1)])


def gets(glide: GlideFS) -> float:
    """Objects and ranges that the store was asked for, once the metrics are no older than this call."""
    time.sleep(METRICS_AGE)
    kinds = ("get", "get_range")
    found = glide.metrics()
    return sum(
        value
        for name, value in found.items()
        if name.startswith("glidefs_store_requests_total") and any(f'"{kind}"' in name for kind in kinds)
    )


def settled_gets(glide: GlideFS) -> float:
    """The same once they do not grow: a host that begins empty looks at the root of each volume there is."""
    before, now = -1.0, gets(glide)
    while now != before:
        before, now = now, gets(glide)
    return now
