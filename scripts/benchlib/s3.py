"""The same SeaweedFS server behind GlideFS and behind s3backer, the same incompressible data.

Cold means: nothing on this host. GlideFS starts with an empty cache directory, s3backer is mounted anew.
s3backer is a file (FUSE), so its depth is threads; GlideFS is an NBD export, its depth is requests.
"""

from __future__ import annotations

import contextlib
import time
from typing import Any

from benchlib.common import BLOCK, MIB, Run, Settings, need, say
from benchlib.report import Report
from benchlib.targets import GlideFS, S3backer, Weed, fill, on_seaweedfs

SEQUENTIAL = "cold sequential read"
DEPTHS = (8, 32)
WRITES = "4k random write until drained"
PLAIN = ("--readAhead=0", "--blockCacheSize=10000")
"""How s3backer reads nothing ahead and forgets nothing, as GlideFS."""


def run(settings: Settings) -> Report:
    """Measure. Raises BenchError."""
    need("fio", "s3backer")
    report = Report("s3")
    size = (64 if settings.short else 512) * MIB
    writes = 1024 if settings.short else 8192
    with contextlib.ExitStack() as stack:
        weed, glide = on_seaweedfs(stack, settings.work)
        glide.start()
        glide.create(size, transport="nbd")
        say("s3: filling")
        fill(glide, size)
        glide.drain()
        peer = S3backer(settings.work, weed.endpoint, size)
        stack.callback(peer.stop)
        peer.start()
        peer.fio(rw="write", bs="1m", size=size, refill_buffers=1, end_fsync=1)
        # All reads first: they are of the same data in the same places, whole blocks, in both.
        for number in range(settings.rounds):
            say(f"s3: reads, round {number + 1} of {settings.rounds}")
            cold_reads(report, glide, peer, weed, size)
        glide_cold(glide, weed, read_ahead=True)
        for number in range(settings.rounds):
            say(f"s3: writes, round {number + 1} of {settings.rounds}")
            random_writes(report, glide, peer, size, writes)
        glide_cold(glide, weed, read_ahead=True)
        report.add(
            f"{SEQUENTIAL}, after the writes",
            glide.name,
            "MB/s",
            glide.fio(rw="read", bs="128k", iodepth=8, size=size).mb_per_second,
        )
    report.compare(SEQUENTIAL, glide.name, peer.name, "MB/s", 4.0)
    for depth in DEPTHS:
        report.compare(f"cold 128k random read x{depth}", glide.name, peer.name, "MB/s", 1.0)
        report.compare(f"cold 4k random read x{depth}", glide.name, peer.name, "IOPS", 1.0)
    report.compare(WRITES, glide.name, peer.name, "IOPS", 10.0)
    return report


def glide_cold(glide: GlideFS, weed: Weed, read_ahead: bool) -> None:
    """An empty cache directory."""
    changes: dict[str, dict[str, str]] = {
        "daemon": {"on_stop": '"remove"'},
        "store": {"endpoint_url": f'"{weed.endpoint}"'},
    }
    if not read_ahead:
        changes["reader"] = {"read_ahead": '"0"'}
    glide.configure(changes)
    glide.restart(wipe=True)


def cold_reads(report: Report, glide: GlideFS, peer: S3backer, weed: Weed, size: int) -> None:
    """Sequential with what each does by default, random without read-ahead."""

    def add(load: str, server: str, result: Run) -> None:
        report.add(load, server, "MB/s", result.mb_per_second)

    glide_cold(glide, weed, read_ahead=True)
    add(SEQUENTIAL, glide.name, glide.fio(rw="read", bs="128k", iodepth=8, size=size))
    glide_cold(glide, weed, read_ahead=True)
    add(f"{SEQUENTIAL}, depth 1", glide.name, glide.fio(rw="read", bs="128k", iodepth=1, size=size))
    again(peer)
    add(SEQUENTIAL, peer.name, peer.fio(rw="read", bs="128k", size=size))
    # Eight threads, each with its own eighth: the best that its file interface gives.
    threads: dict[str, Any] = {"numjobs": 8, "size": size // 8, "offset_increment": size // 8}
    again(peer)
    add(f"{SEQUENTIAL}, 8 threads", peer.name, peer.fio(rw="read", bs="128k", **threads))

    for depth in DEPTHS:
        shares: dict[str, Any] = {"numjobs": depth, "size": size // depth, "offset_increment": size // depth}
        load: dict[str, Any] = {"rw": "randread", "bs": "128k"}
        glide_cold(glide, weed, read_ahead=False)
        add(f"cold 128k random read x{depth}", glide.name, glide.fio(**load, iodepth=depth, size=size))
        again(peer, *PLAIN)
        add(f"cold 128k random read x{depth}", peer.name, peer.fio(**load, fadvise_hint=0, **shares))
        # As many requests as there are blocks, each in a random one: some are read again, from the cache.
        load |= {"bs": "4k", "blockalign": "128k", "norandommap": 1}
        glide_cold(glide, weed, read_ahead=False)
        found = glide.fio(**load, iodepth=depth, size=size, number_ios=size // BLOCK)
        report.add(f"cold 4k random read x{depth}", glide.name, "IOPS", found.iops)
        again(peer, *PLAIN)
        found = peer.fio(**load, fadvise_hint=0, **shares, number_ios=size // BLOCK // depth)
        report.add(f"cold 4k random read x{depth}", peer.name, "IOPS", found.iops)


def again(peer: S3backer, *options: str) -> None:
    """Mount anew: nothing cached."""
    peer.stop()
    peer.start(*options)


def random_writes(report: Report, glide: GlideFS, peer: S3backer, size: int, count: int) -> None:
    """Random 4 KiB writes over the data that is there, timed until the store has them."""
    common: dict[str, Any] = {
        "rw": "randwrite",
        "bs": "4k",
        "size": size,
        "norandommap": 1,
        "refill_buffers": 1,
    }
    began = time.monotonic()
    glide.fio(**common, iodepth=32, io_size=count * 4096)
    glide.drain()
    report.add(WRITES, glide.name, "IOPS", count / (time.monotonic() - began))
    again(peer)
    began = time.monotonic()
    peer.fio(**common, numjobs=32, io_size=count // 32 * 4096, end_fsync=1)
    peer.stop()
    report.add(WRITES, peer.name, "IOPS", count / (time.monotonic() - began))
    peer.start()
