"""Below the log and the block cache is a disk that loses writes, fails, or lies: never a wrong byte.

An error is right only for data that the store does not have. ``--long`` does 51 rounds.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from bad_disk import KINDS, BadDisk, Guest, why_not
from figures import Figures
from node import Node
from waiting import wait_for

pytest.importorskip("glidefs.core._core")
pytestmark = [pytest.mark.skipif(bool(why_not()), reason=why_not()), pytest.mark.timeout(1800)]

ROUNDS = 17 if os.environ.get("GLIDEFS_TEST_LENGTH") == "long" else 1
BLOCKS = 96
STEPS = 80


def drained(node: Node) -> bool:
    return node.run("drain", "v", "--timeout", "3", check=False).returncode == 0


def work(guest: Guest, disk: BadDisk, node: Node) -> None:
    for _ in range(STEPS):
        what = guest.random.random()
        block = guest.random.randrange(BLOCKS)
        if what < 0.35:
            guest.write(block)
        elif what < 0.9:
            guest.check(block)
        elif what < 0.96:
            disk.write_back()
        elif what < 0.98:
            guest.flush()
        elif drained(node):
            guest.unsent.clear()


def one_round(node: Node, disk: BadDisk, seed: int) -> tuple[Guest, bool]:
    """What became of it: the guest, and whether all could be uploaded at the end."""
    node.start()
    node.run("create", "v", "--size", "64MiB", "--transport", "nbd")
    with node.nbd("v") as client:
        guest = Guest(client, BLOCKS, seed)
        for block in range(BLOCKS):
            if block % 3:
                guest.write(block)
        wait_for(lambda: drained(node), "all is in the store")
        guest.unsent.clear()
    node.stop()
    node.start()  # what was sent is read from the store now, into the cache
    node.wait_served("v")
    with node.nbd("v") as guest.client:
        for block in range(0, BLOCKS, 2):
            assert guest.check(block)
        disk.go_bad(guest.random)
        work(guest, disk, node)
        disk.be_well()
        guest.check_gone()
        work(guest, disk, node)
        whole = drained(node)
        if whole:
            guest.unsent.clear()
        disk.write_back()
        for block in range(BLOCKS):
            assert guest.check(block) or not whole
        if whole:
            wait_for(lambda: node.total("glidefs_cache_errno") == 0, "the cache is used again", 20)
    node.kill()
    return guest, whole


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_disk_never_gives_wrong_data(
    make_node: Callable[..., Node], tmp_path: Path, figure: Figures, kind: str
) -> None:
    guests: list[Guest] = []
    whole = 0
    for number in range(ROUNDS):
        disk = KINDS[kind](tmp_path / f"disk{number}")
        with disk.mount():
            node = make_node(
                f"n{number}",
                settings={
                    "cache": {
                        "dir": '"cache"',
                        "log_dir": f'"{disk.at}/log"',
                        "block_cache_dir": f'"{disk.at}/cache"',
                        "log_size": '"64MiB"',
                        "segment_size": '"4MiB"',
                        "block_cache_size": '"64MiB"',
                    }
                },
            )
            try:
                guest, all_sent = one_round(node, disk, number)
            except BaseException:
                print(node.log_text)
                raise
            finally:
                if node.process is not None and node.process.poll() is None:
                    node.kill()
            guests.append(guest)
            whole += all_sent
    figure("rounds", len(guests))
    figure("rounds after which all was uploaded", whole)
    figure("reads", sum(guest.reads for guest in guests))
    figure("writes", sum(guest.writes for guest in guests))
    figure("reads of unsent data that failed", sum(guest.lost for guest in guests))
