"""Blessing an image of a real file system, beside zstd -1 -T2 over the same bytes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchlib.common import BLOCK, GIB, MIB, ROOT, BenchError, Settings, need, say
from benchlib.report import Ratio, Report

LOAD = "an ext4 image with the files of /usr"
OURS = "glidefs bless"
THEIRS = "zstd -1 -T2"
PEAK = 300e6
"""Bytes of resident memory that a bless may have."""


def run(settings: Settings) -> Report:
    """Measure. Raises BenchError."""
    need("zstd", "mkfs.ext4")
    report = Report("bless")
    image, data = settings.work / "image", settings.work / "data"
    size = 2 * GIB if not settings.short else 256 * MIB
    make_image(settings.work, image, size)
    plain = compact(image, data)
    report.notes.append(f"an image of {size / MIB:.0f} MiB, {plain / MIB:.0f} MiB of it not zeros")
    report.notes.append("both write to a disk; bless also syncs what it wrote, zstd does not")
    for number in range(settings.rounds):
        say(f"bless: round {number + 1} of {settings.rounds}")
        for measure in (theirs, ours) if number % 2 else (ours, theirs):
            measure(report, settings.work, image, data, plain)
    report.compare(LOAD, OURS, THEIRS, "MB/s", 0.8)
    report.compare(LOAD, OURS, THEIRS, "bytes out", 1.1, most=True)
    peak = report.get(LOAD, OURS, "MB resident, peak") * 1e6
    report.ratios.append(Ratio(LOAD, "300 MB", "resident memory", peak / PEAK, 1.0, True))
    return report


def make_image(work: Path, image: Path, size: int) -> None:
    """A file system that is about three quarters full of files of this machine."""
    say("bless: making the image")
    tree = work / "tree"
    tree.mkdir()
    room = size * 3 // 4
    for path in sorted(Path("/usr").rglob("*")):
        if path.is_symlink() or not path.is_file():
            continue
        room -= -(-path.stat().st_size // 4096) * 4096
        if room < 0:
            break
        target = tree / path.relative_to("/usr")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    with image.open("wb") as file:
        file.truncate(size)
    made = subprocess.run(
        ["mkfs.ext4", "-q", "-F", "-d", str(tree), str(image)], capture_output=True, text=True, check=False
    )
    if made.returncode:
        raise BenchError(f"mkfs.ext4 failed: {made.stderr.strip()}")
    shutil.rmtree(tree)


def compact(image: Path, data: Path) -> int:
    """Write the blocks of the image that are not zeros, one after the other; returns their bytes."""
    zero = bytes(BLOCK)
    with image.open("rb") as source, data.open("wb") as target:
        while block := source.read(BLOCK):
            if block != zero[: len(block)]:
                target.write(block)
    return data.stat().st_size


def ours(report: Report, work: Path, image: Path, data: Path, plain: int) -> None:
    """One bless into a new store."""
    store = work / "store"
    command = [sys.executable, "-m", "glidefs", "bless", image, "--name", "b"]
    config = work / "bless.toml"
    store.mkdir(exist_ok=True)
    config.write_text(f'[store]\nurl = "file://{store}"\n')
    seconds, cpu, peak, out = timed([*map(str, command), "--json"], {"GLIDEFS_CONFIG": str(config)})
    if json.loads(out)["data_bytes"] != plain:
        raise BenchError("bless and the compact file disagree on what is not zeros")
    stored = sum(path.stat().st_size for path in store.rglob("*") if path.is_file())
    note(report, OURS, plain, seconds, cpu, peak, stored)
    shutil.rmtree(store)


def theirs(report: Report, work: Path, image: Path, data: Path, plain: int) -> None:
    """One run of zstd."""
    out = work / "data.zst"
    seconds, cpu, peak, _ = timed(["zstd", "-q", "-f", "-1", "-T2", str(data), "-o", str(out)], {})
    note(report, THEIRS, plain, seconds, cpu, peak, out.stat().st_size)
    out.unlink()


def note(report: Report, who: str, plain: int, seconds: float, cpu: float, peak: float, stored: int) -> None:
    """One round."""
    report.add(LOAD, who, "MB/s", plain / seconds / 1e6)
    report.add(LOAD, who, "CPU seconds", cpu)
    report.add(LOAD, who, "bytes out", stored)
    report.add(LOAD, who, "MB resident, peak", peak / 1e6)


def timed(command: Sequence[str], environment: dict[str, str]) -> tuple[float, float, float, str]:
    """Seconds, CPU seconds, peak bytes of resident memory and output of a program that must succeed."""
    os.sync()  # what was written before is not this program's to wait for
    python = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
    started = time.monotonic()
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": python, **environment}
    )
    assert child.stdout is not None
    out = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.monotonic() - started
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise BenchError(f"{Path(command[0]).name} failed with status {child.returncode}")
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024.0, out
