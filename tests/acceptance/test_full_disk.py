"""A cache disk of 300 MB or few inodes, under a log that may be larger: all is written, and detach works.

``--long`` writes 2 GB.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from bad_disk import mounted, run, why_not
from figures import Figures
from nbd_client import RawClient
from node import GIB, MIB, Node, stopwatch

pytest.importorskip("glidefs.core._core")
pytestmark = [pytest.mark.skipif(bool(why_not()), reason=why_not()), pytest.mark.timeout(900)]

BYTES = 2 * GIB if os.environ.get("GLIDEFS_TEST_LENGTH") == "long" else 512 * MIB


@pytest.fixture(params=["bytes", "inodes"])
def cache_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """Where the cache directory is: a tmpfs of 300 MB, or an ext4 of that size with hardly any inodes."""
    at = tmp_path / "disk"
    if request.param == "bytes":
        with mounted(at, "-t", "tmpfs", "-o", "size=300m", "tmpfs"):
            yield at
        return
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(300 * MIB)
    run("mkfs.ext4", "-q", "-N", "128", image)
    with mounted(at, "-o", "loop", image):
        yield at


def data(at: int) -> bytes:
    return (at.to_bytes(8, "little") + bytes(504)) * 2048


def write(client: RawClient) -> None:
    for at in range(0, BYTES, MIB):
        client.pwrite(at, data(at))
        if at % (64 * MIB) == 0:
            client.flush()


def fill(at: Path) -> None:
    """Other files take what is left: every byte, and every inode."""
    room = os.statvfs(at)
    with (at / "foreign").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, room.f_bavail * room.f_frsize - MIB))
    for i in range(min(int(os.statvfs(at).f_favail), 500)):
        (at / f"foreign{i}").touch()


def test_more_is_written_than_the_disk_holds(
    make_node: Callable[..., Node], cache_disk: Path, figure: Figures, request: pytest.FixtureRequest
) -> None:
    few = "inodes" in request.node.name
    cache = {
        "dir": f'"{cache_disk}/cache"',
        "log_size": '"1GiB"',
        "segment_size": '"2MiB"' if few else '"64MiB"',
        "block_cache_size": '"64MiB"',
    }
    node = make_node(settings={"cache": cache})
    node.start()
    assert "lower them" in node.log_text, "the sizes do not fit"
    node.run("create", "v", "--size", "4GiB", "--transport", "nbd")
    with node.nbd("v", timeout=120) as client:
        with stopwatch() as took:
            write(client)
        figure("MB/s while the disk is full", BYTES / 1e6 / took[0])
        client.flush()
        for at in range(0, BYTES, 16 * MIB):
            assert client.pread(at, MIB) == data(at)
        fill(cache_disk)
        for at in range(0, 64 * MIB, MIB):  # others have the rest: what is uploaded makes room
            client.pwrite(at, data(at + 1))
        client.flush()
    with stopwatch() as took:
        node.run("drain", "v", "--timeout", "60")
        node.run("detach", "v")
    figure("seconds of drain and detach", took[0])
    node.stop()
