"""Discard of whole large devices: fast, and cheap in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("glidefs.core._core")
import device_rig as rig
from figures import Figures
from node import GIB, MIB, Node, fio, stopwatch

pytestmark = [
    pytest.mark.skipif(rig.REASON is not None, reason=str(rig.REASON)),
    pytest.mark.root,
    pytest.mark.timeout(3600 if rig.EMULATED else 600),
]

SCATTERED = GIB  # a quarter of it before the volume is opened again
SECONDS = 5.0
MEMORY = 64 * MIB
SETTINGS = {"cache": {"log_size": '"2GiB"', "block_cache_size": '"1GiB"'}}


@pytest.fixture
def node(place: Path) -> Iterator[Node]:
    with rig.no_leftovers(), rig.ended(Node(place / "n", settings=SETTINGS)) as made:
        yield made.start()


def discard(node: Node, device: str, what: str, figure: Figures) -> None:
    memory = node.anonymous()
    before = rig.counters(device)[13]
    with stopwatch() as took:
        rig.run("blkdiscard", device)
    assert rig.counters(device)[13] - before == 2 << 40 >> 9
    figure(f"discard of 2 TiB, {what}", took[0], "s", below=SECONDS)
    figure(f"anonymous memory, {what}", (node.anonymous() - memory) / MIB, "MiB", below=MEMORY / MIB)


def test_discard_of_two_terabytes(node: Node, place: Path, figure: Figures) -> None:
    device = rig.create(node, "disk", "2TiB")
    largest = rig.queue_limit(device, "discard_max_bytes")
    figure("discard_max_bytes", largest / MIB, "MiB", at_least=1024)
    assert rig.queue_limit(device, "write_zeroes_max_bytes") >= MIB
    discard(node, device, "empty", figure)

    job = ["--rw=randwrite", "--bs=4k", "--iodepth=32", "--norandommap", "--size=2T"]
    report = fio(device, *job, f"--io_size={SCATTERED}", timeout=rig.STEP)
    figure("scattered writes", report["write"]["io_bytes"] / MIB, "MiB")
    discard(node, device, "after scattered writes", figure)
    assert not any_data(device)

    fio(device, *job, f"--io_size={SCATTERED // 4}", "--randseed=9", timeout=rig.STEP)
    node.json("drain", "disk")
    node.stop()
    node.start()
    assert node.json("show", "disk")["device"] == device
    discard(node, device, "reopened", figure)
    node.json("drain", "disk")

    with stopwatch() as took:
        rig.run("mkfs.ext4", device)
    figure("mkfs.ext4 of 2 TiB", took[0], "s")
    with rig.mounted(device, place / "mnt") as at:
        (at / "file").write_bytes(b"data" * MIB)
        rig.run("sync")
    with rig.mounted(device, place / "mnt") as at:
        assert (at / "file").read_bytes() == b"data" * MIB
    node.json("remove", "disk")
    assert not Path(device).exists()


def any_data(device: str) -> bool:
    """Whether the start, the middle or the end reads as other than zeros."""
    size = rig.device_size(device)
    with open(device, "rb", buffering=0) as file:
        for start in (0, size // 2, size - 16 * MIB):
            file.seek(start)
            if any(file.read(16 * MIB)):
                return True
    return False
