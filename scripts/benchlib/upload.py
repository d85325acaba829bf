"""CPU time and rate of uploads, beside what the disk, the store and zstd do with the same bytes.

From the first write until the store has all of it. The CPU time is that of all threads but those that serve
guests. The disk's limit is the same bytes in files of a pack's size, synced; the store's is raw PUTs of them,
as many at a time.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchlib.bless import compact, make_image, timed
from benchlib.common import GIB, MIB, BenchError, Settings, cpu_seconds, need, random_file, say
from benchlib.report import Report
from benchlib.targets import WEED_ENVIRONMENT, GlideFS, Weed

PACK = 32 * MIB
WRITERS = 8
"""PUTs at a time: `[store] writes`."""
RANDOM = "bytes that do not compress"
FILES = "files of /usr"
SCATTERED = "4k random writes"
LIMIT = {"file": "files of 32 MiB, synced", "s3": "raw PUTs of 32 MiB"}
GUESTS = "glide-worker"
"""Threads that serve guests."""


def run(settings: Settings) -> Report:
    """Measure. Raises BenchError."""
    need("fio", "zstd", "qemu-img", "mkfs.ext4")
    report = Report("upload")
    size = (128 if settings.short else 1024) * MIB
    noise, image, files = (settings.work / name for name in ("noise", "image", "files"))
    random_file(noise, size)
    make_image(settings.work, image, size * 3 // 2)
    compact(image, files)
    image.unlink()
    with contextlib.ExitStack() as stack:
        weed = Weed(settings.work)
        stack.callback(weed.stop)
        for kind in ("file", "s3"):
            for number in range(settings.rounds):
                say(f"upload: to {kind}, round {number + 1} of {settings.rounds}")
                limit(report, kind, noise, weed.endpoint)
                for load, source in ((RANDOM, noise), (FILES, files), (SCATTERED, None)):
                    measure(report, settings.work, kind, weed.endpoint, load, source, size)
    for number in range(settings.rounds):
        say(f"upload: zstd, round {number + 1} of {settings.rounds}")
        zstd(report, files)
    goals = {RANDOM: 2.0, FILES: 3.0, SCATTERED: 2.0}
    for kind in ("file", "s3"):
        for load, goal in goals.items():
            report.want(f"{load}, to {kind}", GlideFS.name, "CPU s/GB", goal)
        report.compare(f"{RANDOM}, to {kind}", GlideFS.name, LIMIT[kind], "MB/s", 0.8)
    report.want(f"{RANDOM}, to file", GlideFS.name, "MB/s", 600.0, most=False)
    return report


def measure(
    report: Report, work: Path, kind: str, endpoint: str, load: str, source: Path | None, size: int
) -> None:
    """`size` bytes of a file, or half as many scattered, through a daemon of its own."""
    place = work / "ours"
    place.mkdir()
    to_s3: dict[str, Any] = {"store": f"s3://bench/{time.monotonic_ns()}", "endpoint": endpoint}
    glide = GlideFS(place, env=WEED_ENVIRONMENT, **(to_s3 if kind == "s3" else {}))
    glide.start()
    try:
        glide.create(8 * GIB, transport="nbd")
        os.sync()
        began, cpu = time.monotonic(), uploading(glide)
        if source is None:
            glide.fio(rw="randwrite", bs="4k", iodepth=32, size=8 * GIB, io_size=size // 2, refill_buffers=1)
        else:
            copy(source, glide.uri)
        written = size // 2 if source is None else source.stat().st_size
        glide.drain()
        seconds, cpu = time.monotonic() - began, uploading(glide) - cpu
    finally:
        glide.stop()
        shutil.rmtree(place)
    report.add(f"{load}, to {kind}", glide.name, "MB/s", written / seconds / 1e6)
    report.add(f"{load}, to {kind}", glide.name, "CPU s/GB", cpu / written * 1e9)


def uploading(glide: GlideFS) -> float:
    """CPU seconds so far of the threads that serve no guests."""
    guests = 0.0
    for task in Path(f"/proc/{glide.pid}/task").iterdir():
        if (task / "comm").read_text().strip() == GUESTS:
            guests += cpu_seconds(glide.pid, task.name)
    return glide.cpu() - guests


def copy(source: Path, uri: str) -> None:
    """Write a raw file to the beginning of an export."""
    command = ["qemu-img", "convert", "-n", "-W", "-f", "raw", "-O", "raw", str(source), uri]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchError(f"qemu-img: {done.stderr.strip()}")


def limit(report: Report, kind: str, noise: Path, endpoint: str) -> None:
    """The same bytes, as fast as they go without GlideFS."""
    data = noise.read_bytes()
    parts = [memoryview(data)[at : at + PACK] for at in range(0, len(data), PACK)]
    os.sync()
    began = time.monotonic()
    if kind == "file":
        write_files(noise.with_name("parts"), parts)
    else:
        put_all(endpoint, parts)
    report.add(f"{RANDOM}, to {kind}", LIMIT[kind], "MB/s", len(data) / (time.monotonic() - began) / 1e6)
    shutil.rmtree(noise.with_name("parts"), ignore_errors=True)


def write_files(directory: Path, parts: list[memoryview]) -> None:
    """Each part a file, which is synced."""
    directory.mkdir()

    def write(number: int) -> None:
        with (directory / str(number)).open("wb") as out:
            out.write(parts[number])
            os.fsync(out.fileno())

    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(write, range(len(parts))))


def put_all(endpoint: str, parts: list[memoryview]) -> None:
    """Each part an object."""
    import boto3
    from botocore.config import Config

    os.environ.update(WEED_ENVIRONMENT)
    config = Config(max_pool_connections=WRITERS, s3={"addressing_style": "path"})
    client: Any = boto3.client("s3", endpoint_url=endpoint, config=config)
    with ThreadPoolExecutor(WRITERS) as pool:
        list(
            pool.map(
                lambda number: client.put_object(
                    Bucket="bench", Key=f"raw/{number}", Body=bytes(parts[number])
                ),
                range(len(parts)),
            )
        )


def zstd(report: Report, files: Path) -> None:
    """One run over the same bytes."""
    out = files.with_suffix(".zst")
    seconds, cpu, _, _ = timed(["zstd", "-q", "-f", "-1", str(files), "-o", str(out)], {})
    report.add(f"{FILES}, to file", "zstd -1", "CPU s/GB", cpu / files.stat().st_size * 1e9)
    report.add(f"{FILES}, to file", "zstd -1", "MB/s", files.stat().st_size / seconds / 1e6)
    out.unlink()
