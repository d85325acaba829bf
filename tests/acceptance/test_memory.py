"""What a daemon costs: memory when idle and full, and disk within what is configured."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from figures import Figures
from node import GIB, MIB, TIB, Node, allocated, fio, fio_command, servers
from waiting import wait_for

pytest.importorskip("glidefs.core._core")
pytestmark = [
    pytest.mark.skipif(shutil.which("fio") is None, reason="fio is not installed"),
    pytest.mark.slow,
    pytest.mark.timeout(1200),
]

IDLE_RSS_MIB = 120
EXPORTS = 1000
PER_EXPORT_KIB = 256
SCATTERED = 655_360
MAP_BUDGET_MIB = 256
"""The default of map_budget."""
INDEX_CACHE_MIB = 32
"""Pack indices that are kept in memory (index_cache_bytes); empty while nothing was uploaded."""


def test_idle_daemon_and_a_thousand_exports(make_node: Callable[..., Node], figure: Figures) -> None:
    node = make_node().start()
    node.json("create", "first", "--size", "10GiB", "--transport", "nbd")
    figure("RSS with one idle export", node.rss() / MIB, "MiB", below=IDLE_RSS_MIB)
    logs, blocks = allocated(node.cache / "logs"), allocated(node.cache / "blocks")
    state = allocated(node.cache)
    rss, anonymous = node.rss(), node.anonymous()

    def create(number: int) -> None:
        body = {"size": 10 * GIB, "transport": "nbd", "wait": True}
        node.client.call("PUT", f"/api/exports/idle-{number}", body)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(create, range(EXPORTS)))
    assert len(node.client.call("GET", "/api/exports")) == EXPORTS + 1
    figure("RSS of a further idle export", (node.rss() - rss) / EXPORTS / 1024, "KiB", below=PER_EXPORT_KIB)
    growth = (node.anonymous() - anonymous) / EXPORTS / 1024
    figure("anonymous memory of one", growth, "KiB", below=PER_EXPORT_KIB)
    assert allocated(node.cache / "logs") == logs
    assert allocated(node.cache / "blocks") == blocks
    figure("records and roots of one on disk", (allocated(node.cache) - state) / EXPORTS / 1024, "KiB")
    figure("threads", len(os.listdir(f"/proc/{node.pid}/task")), below=200)

    node.stop()
    node.start()
    node.wait_served("first", *(f"idle-{i}" for i in range(EXPORTS)))
    figure("RSS with 1,001 exports after a restart", node.rss() / MIB, "MiB", below=IDLE_RSS_MIB + 250)


@pytest.mark.parametrize("store", ["up", "down"])
def test_scattered_writes_over_ten_terabytes(
    store: str, make_node: Callable[..., Node], figure: Figures
) -> None:
    """With the store down nothing is uploaded and retired meanwhile: the map holds all of them at once."""
    endpoint = "" if store == "up" else f"http://127.0.0.1:{servers.free_port()}"
    node = make_node(endpoint=endpoint).start()
    node.json("create", "disk", "--size", "10TiB", "--transport", "nbd")
    baseline = node.anonymous()
    job = ["--rw=randwrite", "--bs=4k", "--iodepth=32", "--norandommap", f"--size={10 * TIB}"]
    peak = Peak(node)
    report = fio(node.uri("disk"), *job, f"--number_ios={SCATTERED}", f"--io_size={SCATTERED * 4096}")
    after, highest = node.anonymous(), peak.stop()
    figure("writes", report["write"]["total_ios"], at_least=SCATTERED)
    figure("write rate", report["write"]["iops"], "1/s")
    assert node.total("glidefs_map_budget_bytes") == MAP_BUDGET_MIB * MIB
    figure("maps", node.total("glidefs_map_bytes") / MIB, "MiB", below=MAP_BUDGET_MIB + 1)
    figure("baseline", baseline / MIB, "MiB")
    limit = MAP_BUDGET_MIB + (INDEX_CACHE_MIB if store == "up" else 0)
    if store == "up":  # packs in the making are beside the maps, and gone when all is uploaded
        figure("while uploading, over the baseline", (max(after, highest) - baseline) / MIB, "MiB")
        node.json("drain", "disk")
        with contextlib.suppress(AssertionError):
            wait_for(lambda: node.anonymous() - baseline < limit * MIB, "the heap shrinks", 10)
        after = node.anonymous()
    figure("anonymous memory over the baseline", (after - baseline) / MIB, "MiB", below=limit)
    figure("maps after it", node.total("glidefs_map_bytes") / MIB, "MiB")


class Peak:
    """The highest figures of a daemon, looked at now and then from a thread."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._stop = threading.Event()
        self.anonymous = self.logs = self.blocks = 0
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(0.1):
            self.anonymous = max(self.anonymous, self._node.anonymous())
            self.logs = max(self.logs, allocated(self._node.cache / "logs"))
            self.blocks = max(self.blocks, allocated(self._node.cache / "blocks"))

    def stop(self) -> int:
        self._stop.set()
        self._thread.join()
        return self.anonymous


def test_disk_stays_within_what_is_configured(make_node: Callable[..., Node], figure: Figures) -> None:
    """Several times as much as log and block cache hold is written and read, by three guests at once."""
    log_size, cache_size = 128 * MIB, 64 * MIB
    node = make_node(
        settings={
            "cache": {
                "log_size": str(log_size),
                "block_cache_size": str(cache_size),
                "segment_size": str(8 * MIB),
            }
        }
    ).start()
    names = ["a", "b", "c"]
    for name in names:
        node.json("create", name, "--size", "1GiB", "--transport", "nbd")
    peak = Peak(node)
    jobs = []
    for seed, name in enumerate(names):
        options = ["--rw=randrw", "--rwmixread=40", "--bsrange=4k-128k", "--iodepth=16", "--size=512M"]
        options += [f"--randseed={seed}", "--refill_buffers"]
        command = fio_command(node.uri(name), *options)
        jobs.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    for job in jobs:
        output = job.communicate(timeout=900)[0]
        assert job.returncode == 0, output
    peak.stop()
    used = allocated(node.cache / "blocks")
    figure("write log at most", peak.logs / MIB, "MiB", below=log_size / MIB * 1.001)
    figure("block cache at most", max(peak.blocks, used) / MIB, "MiB", below=cache_size / MIB * 1.02)
    assert node.total("glidefs_operation_errors_total") == 0
    for name in names:
        node.json("drain", name)
    wait_for(lambda: node.total("glidefs_dirty_bytes") == 0, "all of it is in the store")
    figure("anonymous memory at most", peak.anonymous / MIB, "MiB")
