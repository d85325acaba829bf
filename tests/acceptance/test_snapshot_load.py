"""Snapshots every second under a full write load: each one is a prefix of what was acknowledged."""

from __future__ import annotations

import os
import struct
import threading
import time
from collections.abc import Callable

import pytest
from figures import Figures
from node import MIB, Node, stopwatch

pytest.importorskip("glidefs.core._core")
pytestmark = pytest.mark.slow

SECONDS = 60
WRITERS = 4
SLOTS = 256
"""Places of 128 KiB that a writer stamps one after another, again and again."""
STRIDE = 131072


class Writer(threading.Thread):
    """Stamps an increasing counter over its own connection; ``acknowledged`` is the last one answered."""

    def __init__(self, node: Node, name: str, number: int, stop: threading.Event) -> None:
        super().__init__()
        self._node, self._name, self._number, self._stopping = node, name, number, stop
        self.acknowledged = 0
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            with self._node.nbd(self._name) as client:
                count = 0
                while not self._stopping.is_set():
                    count += 1
                    at = (self._number * SLOTS + count % SLOTS) * STRIDE
                    client.pwrite(at, struct.pack("<Q", count) * 512)
                    self.acknowledged = count
        except BaseException as error:
            self.error = error


def test_snapshots_of_a_busy_volume(make_node: Callable[..., Node], figure: Figures) -> None:
    seconds = int(os.environ.get("GLIDEFS_SNAPSHOT_SECONDS", SECONDS))
    node = make_node()
    node.start()
    node.json("create", "busy", "--size", "1GiB", "--transport", "nbd")
    stop = threading.Event()
    writers = [Writer(node, "busy", number, stop) for number in range(WRITERS)]
    for writer in writers:
        writer.start()
    kept: list[tuple[str, list[int], list[int]]] = []
    slowest = 0.0
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        before = [writer.acknowledged for writer in writers]
        with stopwatch() as took:
            made = node.client.call("POST", "/api/exports/busy/snapshot", {})
        slowest = max(slowest, took[0])
        kept.append((made["source"], before, [writer.acknowledged for writer in writers]))
        time.sleep(max(0.0, 1.0 - took[0]))
    stop.set()
    for writer in writers:
        writer.join()
        assert writer.error is None
    figure("snapshots", len(kept))
    figure("slowest snapshot", slowest, "s")
    figure("writes in all", sum(writer.acknowledged for writer in writers))
    assert len({source for source, _, _ in kept}) == len(kept)
    for source, before, after in kept:
        check(node, source, before, after)


def check(node: Node, source: str, before: list[int], after: list[int]) -> None:
    """A fork of the snapshot holds all that was acknowledged before it, and no gap."""
    node.json("create", "look", "--from", source, "--transport", "nbd")
    with node.nbd("look") as client:
        for number in range(WRITERS):
            found = {}
            for slot in range(SLOTS):
                block = client.pread((number * SLOTS + slot) * STRIDE, 4096)
                assert block == block[:8] * 512
                found[slot] = struct.unpack("<Q", block[:8])[0]
            newest = max(found.values())
            assert before[number] <= newest <= after[number] + 1, source
            first = max(1, newest - SLOTS + 1)
            assert {count % SLOTS: count for count in range(first, newest + 1)} == {
                slot: count for slot, count in found.items() if count
            }, source
    node.client.call("DELETE", "/api/exports/look")


assert WRITERS * SLOTS * STRIDE <= 1024 * MIB
