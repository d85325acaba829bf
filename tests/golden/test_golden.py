"""A store and a host's directory of the first version whose formats stay readable, opened by this one.

**The files here are never made again.** A version that cannot open them, or reads other data, is wrong.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from fork_rig import MIB, PREFIX, Node
from golden_make import PARTS, SECTOR, Writes, expected
from mutation_world import start_node

from glidefs.exports.requests import AttachRequest
from glidefs.formats.hot_set import decode_hot_set
from glidefs.formats.manifest import decode_root
from glidefs.names import hot_set_key, manifest_key, parse_source
from glidefs.offline.export import export_image
from glidefs.offline.inspect import inspect, open_source
from glidefs.store.file import FileStore
from glidefs.volume.logs import export_log

HERE = Path(__file__).parent
CONTENTS = json.loads((HERE / "contents.json").read_text(encoding="ascii"))
STORED: dict[str, tuple[int, Writes]] = CONTENTS["store"]
SERVED: dict[str, tuple[int, Writes]] = CONTENTS["host"]
PATIENCE = 60.0
FOR_EVER = 1e12
"""A grace, in seconds: the host has a fork that was not put when these files were made."""


class Golden(NamedTuple):
    """Copies of the store and of the host's directory."""

    store: FileStore
    home: Path
    tmp: Path


@pytest.fixture
def golden(tmp_path: Path) -> Golden:
    for part in PARTS:
        subprocess.run(["tar", "-xJf", HERE / f"{part}.tar.xz"], cwd=tmp_path, check=True)
    return Golden(FileStore(tmp_path / "store"), tmp_path / "host", tmp_path)


@pytest.fixture
def node(golden: Golden) -> Iterator[Node]:
    node = start_node(golden.home, golden.store, grace=FOR_EVER)
    node.router.start()
    assert node.router.wait_tried(PATIENCE)
    yield node
    node.close()


def places(size: int, writes: Writes) -> list[tuple[int, int]]:
    """All of a small volume; of a large one what was written, and what is around that."""
    if size <= 64 * MIB:
        return [(at, min(MIB, size - at)) for at in range(0, size, MIB)]
    spots = {at // MIB * MIB for start, length, _ in writes for at in (start, start + length)}
    return [(at, MIB) for at in sorted(spots | {0, size - MIB})]


def check_served(node: Node, name: str, size: int, writes: Writes) -> None:
    status = node.router.show(name)
    assert (status.state, status.size) == ("serving", size), f"{name}: {status.reason}"
    for at, length in places(size, writes):
        assert node.core(name).pread(at, length) == expected(size, writes, at, length), f"{name} at {at}"


def check_exported(golden: Golden, source: str, size: int, writes: Writes) -> None:
    target = golden.tmp / "image"
    assert export_image(golden.store, PREFIX, source, target, force=True).size == size
    with target.open("rb") as file:
        for at, length in places(size, writes):
            file.seek(at)
            assert file.read(length) == expected(size, writes, at, length), f"{source} at {at}"


def test_the_files_say_what_they_have() -> None:
    assert set(SERVED) == {"origin", "plain", "wide", "fork", "unsent"}
    assert {"base:image", "plain@1", "tag:release", "tag:of-fork", "wide"} <= set(STORED)
    assert sum((HERE / f"{part}.tar.xz").stat().st_size for part in PARTS) < 300 << 10
    for size, writes in SERVED.values():
        assert writes
        assert all(at % SECTOR == 0 and at + length <= size for at, length, _ in writes)


def test_the_host_serves_what_it_had_and_uploads_the_rest(golden: Golden, node: Node) -> None:
    for name, (size, writes) in SERVED.items():
        check_served(node, name, size, writes)
    for name in SERVED:
        node.router.drain(name, PATIENCE)
    for name, (size, writes) in SERVED.items():
        check_exported(golden, name, size, writes)
    for number, source in enumerate(("base:image", "plain@1", "tag:release", "tag:of-fork")):
        node.fork(f"new{number}", source)
        check_served(node, f"new{number}", *STORED[source])


def test_the_store_alone_is_read_and_taken_over(golden: Golden) -> None:
    for source, (size, writes) in STORED.items():
        check_exported(golden, source, size, writes)
    other = start_node(golden.tmp / "other", golden.store)
    try:
        for source, (size, writes) in STORED.items():
            if parse_source(source).kind == "volume":
                other.router.attach(source, AttachRequest(transport="nbd", take_over=True))
                check_served(other, source, size, writes)
        blocks = list(other.bases.hot_set(PREFIX, "image").blocks())
        assert blocks == [3, 4, 0, 7]
    finally:
        other.close()


def test_the_logs_are_read_offline(golden: Golden) -> None:
    for name, (size, writes) in SERVED.items():
        if name not in STORED:
            continue
        root = decode_root(key := manifest_key(PREFIX, name), golden.store.get(key).data)
        target = golden.tmp / "image"
        export_image(golden.store, PREFIX, name, target, force=True)
        log = golden.home / "logs" / root.volume_id.hex() / root.log_id.hex()
        export_log(log, root.volume_id, root.log_id, target)
        with target.open("rb") as file:
            for at, length in places(size, writes):
                file.seek(at)
                assert file.read(length) == expected(size, writes, at, length), f"{name} at {at}"


def test_every_object_can_be_inspected(golden: Golden) -> None:
    key = hot_set_key(PREFIX, "image")
    assert decode_hot_set(key, golden.store.get(key).data).block_count == 4
    for info in golden.store.list(f"{PREFIX}/"):
        if not info.key.endswith("gc/clock"):
            assert inspect(open_source(golden.store, info.key))
    for pattern in ("exports/*.json", "logs/*/*/*.seg"):
        found = list(golden.home.glob(pattern))
        assert found
        assert all(inspect(open_source(None, str(path))) for path in found)
