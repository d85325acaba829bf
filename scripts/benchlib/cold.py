"""Cold reads from a store that is near and from one that is far, beside a client that only receives.

The store is SeaweedFS behind ``far_store.c``, which answers each request so much later, and ranges of packs
by itself: SeaweedFS takes a millisecond of CPU time for each of those. The other client is ``raw_get.c`` with
as many connections as GlideFS has requests in flight.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchlib.common import BLOCK, MIB, BenchError, Child, Settings, need, say
from benchlib.report import Report
from benchlib.targets import METRICS_AGE, WEED_ENVIRONMENT, GlideFS, fill, on_seaweedfs

PIECE = 2 * MIB
RAW = "raw GETs"
DELAYS = (0, 20, 100)
"""Milliseconds."""
CHUNK = 128 * MIB


class Pack(NamedTuple):
    """An object with payloads: its size, and path and query to get it by."""

    size: int
    target: str


def run(settings: Settings) -> Report:
    """Measure. Raises BenchError."""
    need("fio", "cc")
    report = Report("cold")
    size = (64 if settings.short else 512) * MIB
    with contextlib.ExitStack() as stack:
        weed, glide = on_seaweedfs(stack, settings.work)
        glide.start()
        glide.create(size, transport="nbd")
        say("cold: filling")
        fill(glide, size)
        glide.drain()
        for name in ("far_store", "raw_get"):
            build(settings.work, name)
        packs = copy_packs(weed.endpoint, settings.work / "packs")
        for number in range(settings.rounds):
            for delay in DELAYS:
                say(f"cold: {delay} ms, round {number + 1} of {settings.rounds}")
                with far(settings.work, weed.endpoint, delay) as port:
                    measure(report, glide, settings.work, port, delay, packs, size)
    for delay in DELAYS:
        report.compare(f"sequential, {delay} ms away", glide.name, RAW, "MB/s", 0.85)
        for depth in (32, 256):
            report.compare(f"4 KiB random x{depth}, {delay} ms away", glide.name, RAW, "blocks/s", 0.85)
    return report


def build(work: Path, name: str) -> None:
    """Compile a program of this directory."""
    source = Path(__file__).with_name(f"{name}.c")
    command: list[str | Path] = ["cc", "-O2", "-pthread", "-o", work / name, source]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchError(f"{name} cannot be compiled: {done.stderr[-500:]}")


def copy_packs(endpoint: str, to: Path) -> list[Pack]:
    """Copies of all packs in a directory, by the last part of their keys."""
    import boto3

    os.environ.update(WEED_ENVIRONMENT)
    client: Any = boto3.client("s3", endpoint_url=endpoint)
    to.mkdir()
    found = []
    for item in client.list_objects_v2(Bucket="bench", Prefix="glidefs/")["Contents"]:
        if "/packs/" in item["Key"]:
            client.download_file("bench", item["Key"], str(to / item["Key"].rpartition("/")[2]))
            found.append(Pack(item["Size"], f"/bench/{item['Key']}"))
    return found


@contextlib.contextmanager
def far(work: Path, endpoint: str, delay: int) -> Iterator[int]:
    """The store, `delay` milliseconds away: its port."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = int(probe.getsockname()[1])
    upstream = endpoint.rpartition(":")[2]
    child = Child(
        [work / "far_store", str(port), upstream, str(delay), work / "packs"], work / "far_store.log"
    )

    def listens() -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return True
        return False

    try:
        child.wait_until(listens, "listening")
        yield port
    finally:
        child.stop()


def raw(
    work: Path, port: int, connections: int, length: int, mode: str, packs: list[Pack]
) -> tuple[int, float]:
    """GETs and seconds of the client that only receives."""
    targets = "".join(f"{pack.size} {pack.target}\n" for pack in packs)
    command = [str(work / "raw_get"), str(port), str(connections), str(length), "3", mode]
    done = subprocess.run(command, input=targets, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchError(f"raw_get failed: {done.stderr.strip()}")
    gets, seconds, _ = done.stdout.split()
    return int(gets), float(seconds)


def begin_empty(glide: GlideFS, port: int, *, read_ahead: bool = True) -> None:
    """Start a daemon that has nothing on this host."""
    changes: dict[str, dict[str, str]] = {
        "daemon": {"on_stop": '"remove"'},
        "store": {"endpoint_url": f'"http://127.0.0.1:{port}"'},
    }
    if not read_ahead:
        changes["reader"] = {"read_ahead": '"0"'}
    glide.stop()
    shutil.rmtree(glide.base / "cache", ignore_errors=True)
    glide.configure(changes)
    glide.start()


def begin(glide: GlideFS, port: int, read_ahead: bool) -> None:
    """Nothing of the volume is on this host."""
    begin_empty(glide, port, read_ahead=read_ahead)
    glide.command("attach", "bench", "--take-over", "--transport", "nbd")
    glide.restart()


def measure(
    report: Report, glide: GlideFS, work: Path, port: int, delay: int, packs: list[Pack], size: int
) -> None:
    """One round: sequential, then random with two depths, the other client before each."""
    load = f"sequential, {delay} ms away"
    gets, seconds = raw(work, port, 8, PIECE, "sequential", packs)
    report.add(load, RAW, "MB/s", sum(pack.size for pack in packs) / seconds / 1e6)
    begin(glide, port, read_ahead=True)
    report.add(load, glide.name, "MB/s", glide.fio(rw="read", bs="128k", iodepth=8, size=size).mb_per_second)
    for depth in (32, 256):
        load = f"4 KiB random x{depth}, {delay} ms away"
        gets, seconds = raw(work, port, depth, BLOCK, "random", packs)
        report.add(load, RAW, "blocks/s", gets / seconds)
        begin(glide, port, read_ahead=False)
        os.sync()  # the cache of the run before must not be written back during this one
        for chunk in range(0, size, CHUNK):  # with the indices here, as the other client has its list
            glide.fio(rw="read", bs="4k", offset=chunk, size=MIB, number_ios=1)
        fetched = fetches(glide)
        result = glide.fio(
            rw="randread", bs="4k", blockalign="128k", iodepth=depth, size=size, number_ios=size // BLOCK
        )
        fetched = max(1.0, fetches(glide) - fetched)
        report.add(load, glide.name, "blocks/s", fetched / result.seconds)
        report.add(load, glide.name, "us CPU/block", result.cpu / fetched * 1e6)


def fetches(glide: GlideFS) -> float:
    """Faults that the store was asked for, once the metrics are no older than this call."""
    time.sleep(METRICS_AGE)
    return glide.metrics()["glidefs_fault_fetches_total"]
