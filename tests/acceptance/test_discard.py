"""Discard of a whole 2 TiB volume over NBD: fast, and cheap in memory."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import nbd_client
import pytest
from figures import Figures
from node import GIB, MIB, TIB, Node, fio, servers, stopwatch

pytest.importorskip("glidefs.core._core")
pytestmark = [
    pytest.mark.skipif(shutil.which("fio") is None, reason="fio is not installed"),
    pytest.mark.slow,
]

SIZE = 2 * TIB
REQUEST = GIB
DEPTH = 16
SECONDS = 1.0
MEMORY_MIB = 64


def discard_all(node: Node, name: str) -> None:
    """TRIM in requests of 1 GiB, several in flight."""
    with node.nbd(name) as client:
        waiting = 0
        for offset in range(0, SIZE, REQUEST):
            client.submit(nbd_client.TRIM, offset, REQUEST)
            waiting += 1
            if waiting == DEPTH:
                assert client.reply()[1] == 0
                waiting -= 1
        for _ in range(waiting):
            assert client.reply()[1] == 0
        client.disconnect()


def timed(node: Node, what: str, figure: Figures) -> None:
    before = node.anonymous()
    with stopwatch() as took:
        discard_all(node, "disk")
    growth = (node.anonymous() - before) / MIB
    figure(f"2 TiB {what}", took[0], "s", below=SECONDS)
    figure(f"anonymous memory, {what}", growth, "MiB", below=MEMORY_MIB)


WRITES = ["--rw=randwrite", "--bs=4k", "--iodepth=32", "--norandommap", "--size=2T", "--randseed=7"]


def test_discard_of_two_terabytes(make_node: Callable[..., Node], figure: Figures) -> None:
    node = make_node().start()
    node.json("create", "disk", "--size", "2TiB", "--transport", "nbd")
    timed(node, "empty", figure)

    fio(node.uri("disk"), *WRITES, "--io_size=1G")
    node.json("drain", "disk")  # what an upload takes is not what the discard takes
    timed(node, "after 1 GiB of scattered writes, drained", figure)
    with node.nbd("disk") as client:
        for offset in range(0, SIZE, SIZE // 64):
            assert not any(client.pread(offset, MIB))

    fio(node.uri("disk"), *WRITES, "--io_size=1G")
    node.json("drain", "disk")
    node.stop()
    node.start()
    timed(node, "reopened", figure)
    fio(node.uri("disk"), *WRITES, "--io_size=64M")
    node.kill()
    node.start()
    timed(node, "reopened after a crash", figure)
    node.json("remove", "disk")


def test_discard_of_what_is_not_uploaded(make_node: Callable[..., Node], figure: Figures) -> None:
    """The store is down, so that all of it is in the log and its map, before and after a restart."""
    node = make_node(endpoint=f"http://127.0.0.1:{servers.free_port()}").start()
    node.json("create", "disk", "--size", "2TiB", "--transport", "nbd")
    fio(node.uri("disk"), *WRITES, "--io_size=1G")
    timed(node, "after 1 GiB of scattered writes", figure)
    with node.nbd("disk") as client:
        for offset in range(0, SIZE, SIZE // 64):
            assert not any(client.pread(offset, MIB))
    fio(node.uri("disk"), *WRITES, "--io_size=1G")
    node.kill()
    node.start()
    timed(node, "after 1 GiB of scattered writes and a crash", figure)
