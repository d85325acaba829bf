"""A store behind something that answers for it: any status, with any body, for a share of all requests.

Under it: a guest that writes, one that reads what is only in the store, forks, and gc. Nobody is fenced, no
guest sees an error, no byte is lost, and all is in the store seconds after the end.
``GLIDEFS_STORM_SECONDS`` is for how long a round of the whole matrix lasts.
"""

from __future__ import annotations

import itertools
import os
import random
import secrets
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from figures import Figures
from node import MIB, Node, servers, stopwatch
from waiting import DEADLINE

from glidefs.api.client import CommandError
from glidefs.formats.manifest import encode_root
from glidefs.manifest import lease
from glidefs.names import manifest_key

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bad_s3 import BUCKET, METHODS, BadS3, Stored, Storm
from stored_roots import owner_of

pytest.importorskip("glidefs.core._core")
ROOT = Path(__file__).resolve().parents[2]

BLOCK = 128 << 10
COLD_BLOCKS = 768
"""Of random bytes: more than log and block cache take."""
CLASSES = {"2xx": range(200, 300), "3xx": range(300, 400), "4xx": range(400, 500), "5xx": range(500, 600)}
SHARES = (0.1, 0.5, 1.0)
CALM = 1 << 29
"""Where nobody else writes."""
TOMBSTONES = 100
"""For gc to delete in each round."""
SHORT = 4.0
LONG = float(os.environ.get("GLIDEFS_STORM_SECONDS", 20))
DRAINED = 10.0
"""Seconds after the end until all that is dirty is in the store, beside what a drain takes without faults."""


def cold_data(block: int) -> bytes:
    return random.Random(block).randbytes(BLOCK)


class Writer(threading.Thread):
    """Writes 4 KiB at new places, now and then over old ones, and flushes."""

    def __init__(self, node: Node, written: dict[int, int], stop: threading.Event) -> None:
        super().__init__(daemon=True)
        self._node, self._until = node, stop
        self.written = written
        """What is at which 4 KiB, by the count of the write."""
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            with self._node.nbd("hot") as client:
                while not self._until.wait(0.02):
                    count = len(self.written) + 1
                    place = count if count % 3 else random.Random(count).randrange(1, count)
                    client.pwrite(place * 4096, hot_data(count))
                    self.written[place] = count
                    if count % 10 == 0:
                        client.flush()
        except BaseException as error:
            self.error = error


def hot_data(count: int) -> bytes:
    return struct.pack("<Q", count) * 512


class Reader(threading.Thread):
    """Reads cold blocks, however long each takes."""

    def __init__(self, node: Node, blocks: Iterator[int], stop: threading.Event) -> None:
        super().__init__(daemon=True)
        self._node, self._blocks, self._until = node, blocks, stop
        self.done = 0
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            with self._node.nbd("cold", timeout=DEADLINE * 3) as client:
                while not self._until.wait(0.02):
                    block = next(self._blocks)
                    assert client.pread(block * BLOCK, BLOCK) == cold_data(block)
                    self.done += 1
        except BaseException as error:
            self.error = error


class Forker(threading.Thread):
    """Forks the base again and again; a fork that could not be made is tried again under another name."""

    def __init__(self, node: Node, names: Iterator[int], stop: threading.Event) -> None:
        super().__init__(daemon=True)
        self._node, self._names, self._until = node, names, stop
        self.forks: list[str] = []
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            while not self._until.wait(1.5):
                name = f"fork-{next(self._names)}"
                body = {"source": "base:b", "transport": "nbd"}
                try:
                    self._node.client.call("PUT", f"/api/exports/{name}", body, timeout=DEADLINE)
                except CommandError:
                    continue  # the store kept it waiting for too long
                self.forks.append(name)
                with self._node.nbd(name, timeout=DEADLINE * 3) as client:
                    assert client.pread(0, BLOCK) == cold_data(0)
        except BaseException as error:
            self.error = error


class World:
    """A daemon, its store, and what is known to be in it."""

    def __init__(self, node: Node, s3: BadS3) -> None:
        self.node, self.s3 = node, s3
        self.written: dict[int, int] = {}
        self.blocks = iter(itertools.cycle(random.Random(1).sample(range(COLD_BLOCKS), COLD_BLOCKS)))
        self.names = itertools.count()

    def prepare(self) -> None:
        self.node.start()
        for name in ("cold", "hot"):
            self.node.json("create", name, "--size", "1GiB", "--transport", "nbd")
        with self.node.nbd("cold") as client:
            for block in range(COLD_BLOCKS):
                client.pwrite(block * BLOCK, cold_data(block))
        self.node.json("drain", "cold")
        self.node.json("promote", "cold", "--base", "b")

    def calm(self) -> float:
        """Seconds that a write and a drain take now, without faults: more on a busy machine."""
        with stopwatch() as took:
            with self.node.nbd("hot") as client:
                client.pwrite(CALM, hot_data(0))
            self.node.client.call("POST", "/api/exports/hot/drain", {}, timeout=DEADLINE)
        return took[0]

    def leave_garbage(self) -> None:
        """Tombstones of volumes that were removed long ago, for gc to delete."""
        with self.s3.lock:
            for i in range(TOMBSTONES):
                root = lease.empty_root(f"gone-{i}", MIB, owner_of("gone"))
                key = manifest_key("default", root.name)
                data = encode_root(lease.tombstone(root, doomed=False), key)
                self.s3.objects[f"root/{key}"] = Stored(
                    data, f'"{secrets.token_hex(16)}"', time.time() - 3600
                )

    def storm(self, storm: Storm, seconds: float) -> Round:
        """One round; what was seen."""
        self.leave_garbage()
        stop = threading.Event()
        writer = Writer(self.node, self.written, stop)
        reader = Reader(self.node, self.blocks, stop)
        forker = Forker(self.node, self.names, stop)
        threads: tuple[Writer | Reader | Forker, ...] = (writer, reader, forker)
        hit = sum(self.s3.faults.values())
        self.s3.fault = storm
        gc = subprocess.Popen(
            [sys.executable, "-m", "glidefs", "gc"],
            cwd=self.node.base,
            env={**os.environ, "PYTHONPATH": str(ROOT), "GLIDEFS_CONFIG": str(self.node.config)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for thread in threads:
            thread.start()
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            assert [t.error for t in threads if t.error] == [], self.node.log_text[-5000:]
            time.sleep(0.1)
        self.s3.fault = None
        ended = time.monotonic()
        stop.set()
        writer.join(DEADLINE)
        self.node.client.call("POST", "/api/exports/hot/drain", {}, timeout=DEADLINE)
        drained = time.monotonic() - ended
        for thread in threads:
            thread.join(DEADLINE * 2)
            assert thread.error is None, repr(thread.error)
            assert not thread.is_alive()
        gc.wait(DEADLINE * 2)
        self.check(forker.forks)
        return Round(sum(self.s3.faults.values()) - hit, drained, reader.done, len(forker.forks))

    def check(self, forks: list[str]) -> None:
        """Nothing is fenced, no guest saw an error, what was written is there; forks are taken away."""
        states = {export["name"]: export for export in self.node.client.call("GET", "/api/exports")}
        assert {name: e["state"] for name, e in states.items() if e["state"] != "serving"} == {}
        assert self.node.total("glidefs_operation_errors_total") == 0
        text = self.node.log_text
        assert "fenced" not in text
        assert "Traceback" not in text
        with self.node.nbd("hot") as client:
            for place in list(self.written)[-200:]:
                assert client.pread(place * 4096, 4096) == hot_data(self.written[place])
        for name in forks:
            self.node.client.call("DELETE", f"/api/exports/{name}", timeout=DEADLINE)

    def check_store(self) -> None:
        """Every byte is in the store, without this host."""
        self.node.stop()
        for name in ("hot", "cold"):
            self.node.run("export-image", name, f"{name}.image")
            with (self.node.base / f"{name}.image").open("rb") as image:
                if name == "hot":
                    for place, count in self.written.items():
                        image.seek(place * 4096)
                        assert image.read(4096) == hot_data(count)
                else:
                    for block in range(COLD_BLOCKS):
                        assert image.read(BLOCK) == cold_data(block)


class Round:
    """What one round was like."""

    def __init__(self, hits: int, drained: float, reads: int, forks: int) -> None:
        self.hits, self.drained, self.reads, self.forks = hits, drained, reads, forks


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    cache = {"log_size": '"32MiB"', "segment_size": '"4MiB"', "block_cache_size": '"16MiB"'}
    settings = {
        "cache": cache,
        "reader": {"read_ahead": '"0"'},
        "upload": {"sync_interval": '"1s"'},
    }
    with servers.s3_environment(), BadS3() as s3:
        # The first root of a fork has a quarter of the grace to get into the store.
        store = {"url": f'"s3://{BUCKET}/root"', "gc_grace": '"4m"', "endpoint_url": f'"{s3.endpoint}"'}
        base: Path = tmp_path_factory.mktemp("bad-store")
        node = Node(base / "a", settings={**settings, "store": store})
        world = World(node, s3)
        try:
            world.prepare()
            yield world
            world.check_store()
        finally:
            s3.fault = None
            if node.process is not None and node.process.poll() is None:
                node.process.kill()
                node.process.wait()


def storm(world: World, figure: Figures, seconds: float, storm: Storm) -> None:
    calm = world.calm()
    with stopwatch() as took:
        seen = world.storm(storm, seconds)
    figure("drain without faults", calm, "s")
    figure("requests that were hit", seen.hits, at_least=1)
    figure("drained after the end", seen.drained, "s", below=DRAINED + calm)
    figure("cold reads", seen.reads)
    figure("forks", seen.forks)
    figure("round", took[0], "s")


@pytest.mark.parametrize(("group", "share"), [("2xx", 0.5), ("3xx", 0.5), ("4xx", 1.0), ("5xx", 0.1)])
def test_a_store_that_answers_anything(world: World, figure: Figures, group: str, share: float) -> None:
    storm(world, figure, SHORT, Storm(CLASSES[group], share=share))


@pytest.mark.slow
@pytest.mark.timeout(14400)
@pytest.mark.parametrize("methods", ["all", *METHODS])
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("group", CLASSES)
def test_the_whole_matrix(world: World, figure: Figures, group: str, share: float, methods: str) -> None:
    chosen = frozenset(METHODS) if methods == "all" else frozenset({methods})
    storm(world, figure, LONG, Storm(CLASSES[group], chosen, share))
