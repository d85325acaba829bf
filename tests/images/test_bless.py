"""Images become bases: what is read back, what is not written, what is refused."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from images_rig import (
    PREFIX,
    DyingStore,
    entries_of,
    noise,
    pages_of,
    pipe_of,
    read_back,
    root_of,
    text,
    write_image,
)

from glidefs import names
from glidefs.bases.stored import load_base
from glidefs.bless import pack_writer, pipeline
from glidefs.bless.bless import bless
from glidefs.errors import ConfigError, ExportExists, InvalidName, StoreUnavailable
from glidefs.formats.hot_set import decode_hot_set
from glidefs.formats.manifest import NO_ID, PAGE_BYTES
from glidefs.formats.pack import BLOCK, FULL_MASK
from glidefs.offline.export import export_image
from glidefs.store.base import ObjectStore
from glidefs.store.memory import MemoryStore
from glidefs.store.resilient import ResilientStore

ROOT = Path(__file__).resolve().parents[2]
SIZES = [1, 511, 512, 4096, BLOCK - 512, BLOCK, BLOCK + 1, 3 * BLOCK + 777, 40 * BLOCK + 4096]


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


@pytest.mark.parametrize("how", ["file", "pipe"])
@pytest.mark.parametrize("size", SIZES)
def test_dense_images_read_back(store: ObjectStore, tmp_path: Path, size: int, how: str) -> None:
    data = noise(size, size // 2) + text(size, size - size // 2)
    if how == "file":
        path = tmp_path / "image"
        path.write_bytes(data)
        result = bless(store, PREFIX, "b", path, pack_bytes=1 << 20)
    else:
        with pipe_of(data) as fd:
            result = bless(store, PREFIX, "b", fd, pack_bytes=1 << 20)
    assert read_back(store, "b", tmp_path) == padded(data)
    assert (result.created, result.size) == (True, len(padded(data)))
    assert bool(result.note) == bool(size % 512)
    assert result.data_bytes == min(result.size, -(-size // BLOCK) * BLOCK)


def test_sparse_images_read_back(store: ObjectStore, tmp_path: Path) -> None:
    parts = {0: b"x", 5 * BLOCK + 100: noise(1), 9 * BLOCK - 1: b"ab", 300 * BLOCK: text(2)}
    path = write_image(tmp_path / "image", 1000 * BLOCK, parts)
    result = bless(store, PREFIX, "b", path)
    assert read_back(store, "b", tmp_path) == path.read_bytes()
    assert [e.block for pack in entries_of(store, "b") for e in pack] == [0, 5, 6, 8, 9, 300]
    assert result.data_bytes == 6 * BLOCK


def test_more_than_one_page(tmp_path: Path, memory: DyingStore) -> None:
    size = PAGE_BYTES + (2 << 30)
    parts = {0: b"first", PAGE_BYTES - BLOCK: noise(1), PAGE_BYTES + 5: noise(2), size - 3: b"end"}
    path = write_image(tmp_path / "image", size, parts)
    bless(memory, PREFIX, "b", path)
    root = root_of(memory, "b")
    assert root.inline_page is None
    assert all(root.page_ids)
    assert [len(page.packs) for page in pages_of(memory, root)] == [1, 1]
    export_image(memory, PREFIX, "base:b", tmp_path / "copy")
    with (tmp_path / "copy").open("rb") as copy:
        assert copy.seek(0, os.SEEK_END) == size
        for offset, data in parts.items():
            copy.seek(offset)
            assert copy.read(len(data)) == data


def test_an_empty_page_has_no_object(tmp_path: Path, memory: DyingStore) -> None:
    path = write_image(tmp_path / "image", PAGE_BYTES + BLOCK, {PAGE_BYTES: b"x"})
    bless(memory, PREFIX, "b", path)
    assert [bool(page) for page in root_of(memory, "b").page_ids] == [False, True]


@pytest.mark.parametrize("holes", [True, False])
def test_zeros_cost_nothing(tmp_path: Path, memory: DyingStore, holes: bool) -> None:
    size = 100 * BLOCK + 512
    path = tmp_path / "image"
    if holes:
        write_image(path, size, {})
    else:
        path.write_bytes(bytes(size))
    result = bless(memory, PREFIX, "b", path)
    assert (result.packs, result.stored_bytes, result.data_bytes) == (0, 0, 0)
    assert memory.pack_puts == 0
    assert read_back(memory, "b", tmp_path) == bytes(size)


def test_zero_blocks_among_data_are_left_out(tmp_path: Path, memory: DyingStore) -> None:
    """Also those that begin or end like zeros must be told from those that are."""
    blocks = [
        bytes(BLOCK),
        noise(1),
        bytes(BLOCK),
        bytes(BLOCK - 1) + b"x",
        bytes(BLOCK),
        b"x" + bytes(BLOCK - 1),
    ]
    data = b"".join(blocks * 20)
    (tmp_path / "image").write_bytes(data)
    bless(memory, PREFIX, "b", tmp_path / "image")
    found = [e.block for pack in entries_of(memory, "b") for e in pack]
    assert found == [i for i in range(120) if i % 6 in (1, 3, 5)]
    assert read_back(memory, "b", tmp_path) == data


def test_what_a_base_is(tmp_path: Path, memory: DyingStore) -> None:
    data = noise(1, 3 * BLOCK) + bytes(BLOCK) + text(2, 700)
    (tmp_path / "debian.raw").write_bytes(data)
    result = bless(memory, PREFIX, "b", tmp_path / "debian.raw")
    found = load_base(memory, PREFIX, "b")
    root = found.root
    assert (root.name, root.size, root.read_only) == ("b", 4 * BLOCK + 1024, True)
    assert (root.log_id, root.owner_node, root.last_segment, root.removed_at) == (NO_ID, "", 0, 0)
    assert root.source == "image:debian.raw"
    assert root.created_at > 0
    assert found.manifest_hash.hex() == result.manifest_hash
    hasher = blake3()
    image = padded(data) + bytes(BLOCK)
    for block in (0, 1, 2, 4):
        plain = image[block * BLOCK : (block + 1) * BLOCK].ljust(BLOCK, b"\0")
        hasher.update(struct.pack("<Q", block) + blake3(plain).digest(length=16))
    hasher.update(struct.pack("<Q", root.size))
    assert root.content_hash == hasher.digest()
    assert result.content_hash == root.content_hash.hex()


def test_packs_are_in_order_and_of_the_size_that_was_asked_for(tmp_path: Path, memory: DyingStore) -> None:
    (tmp_path / "image").write_bytes(noise(1, 50 * BLOCK) + text(1, 200 * BLOCK))
    result = bless(memory, PREFIX, "b", tmp_path / "image", pack_bytes=1 << 20)
    packs = entries_of(memory, "b")
    blocks = [entry.block for pack in packs for entry in pack]
    assert blocks == list(range(250))
    assert {entry.mask for pack in packs for entry in pack} == {FULL_MASK}
    assert [len(pack) for pack in packs[:6]] == [8] * 6
    assert len(packs) == result.packs == 7
    stored = [entry.stored for pack in packs for entry in pack]
    assert set(stored[:50]) == {BLOCK}  # noise is not stored as a longer frame
    assert max(stored[50:]) < BLOCK // 10
    assert all(sum(entry.stored for entry in pack) <= 1 << 20 for pack in packs)


def test_a_pack_smaller_than_a_block_holds_one(tmp_path: Path, memory: DyingStore) -> None:
    (tmp_path / "image").write_bytes(noise(1, 5 * BLOCK))
    assert bless(memory, PREFIX, "b", tmp_path / "image", pack_bytes=1).packs == 5
    assert read_back(memory, "b", tmp_path) == noise(1, 5 * BLOCK)


def test_again_is_a_no_op(tmp_path: Path, memory: DyingStore) -> None:
    parts = {0: noise(1, 3 * BLOCK), 50 * BLOCK: text(2)}
    sparse = write_image(tmp_path / "sparse", 100 * BLOCK, parts)
    first = bless(memory, PREFIX, "b", sparse)
    dense = tmp_path / "dense"
    dense.write_bytes(sparse.read_bytes())
    before = list(memory.keys)
    again = bless(memory, PREFIX, "b", dense, pack_bytes=BLOCK, level=3)
    with pipe_of(sparse.read_bytes()) as fd:
        piped = bless(memory, PREFIX, "b", fd)
    assert memory.keys == before
    for result in (again, piped):
        assert not result.created
        assert result.manifest_hash == first.manifest_hash
        assert (result.size, result.data_bytes, result.packs) == (first.size, first.data_bytes, first.packs)


@pytest.mark.parametrize(
    "change",
    [
        {50 * BLOCK: b"!"},  # in a block that has data
        {70 * BLOCK: b"!"},  # in a hole
        {0: bytes(3 * BLOCK)},  # data becomes zeros
        {100 * BLOCK: bytes(512)},  # longer by zeros
        {0: noise(1, 3 * BLOCK)[BLOCK:] + noise(1, 3 * BLOCK)[:BLOCK]},  # the same blocks elsewhere
    ],
)
@pytest.mark.parametrize("how", ["file", "pipe"])
def test_other_content_is_refused(
    tmp_path: Path, memory: DyingStore, change: dict[int, bytes], how: str
) -> None:
    parts = {0: noise(1, 3 * BLOCK), 50 * BLOCK: text(2)}
    bless(memory, PREFIX, "b", write_image(tmp_path / "image", 100 * BLOCK, parts))
    with (tmp_path / "image").open("r+b") as file:
        for offset, data in change.items():
            file.seek(offset)
            file.write(data)
    before = list(memory.keys)
    expected = r"b: prefix default .* other content.* choose another name"
    with pipe_of((tmp_path / "image").read_bytes()) as fd, pytest.raises(ExportExists, match=expected):
        bless(memory, PREFIX, "b", fd if how == "pipe" else tmp_path / "image")
    assert memory.keys == before


def test_the_hot_set_comes_before_the_manifest(tmp_path: Path, memory: DyingStore) -> None:
    (tmp_path / "image").write_bytes(noise(1, 9 * BLOCK))
    result = bless(memory, PREFIX, "b", tmp_path / "image", hot_set=[7, 8, 2])
    key = names.hot_set_key(PREFIX, "b")
    assert memory.keys[-2:] == [key, names.base_manifest_key(PREFIX, "b")]
    found = decode_hot_set(key, memory.get(key).data)
    assert found.manifest_hash.hex() == result.manifest_hash
    assert list(found.blocks()) == [7, 8, 2]
    bless(memory, PREFIX, "b", tmp_path / "image", hot_set=[1])
    found = decode_hot_set(key, memory.get(key).data)
    assert (found.manifest_hash.hex(), list(found.blocks())) == (result.manifest_hash, [1])


@pytest.mark.parametrize("same", [True, False])
def test_two_at_once(tmp_path: Path, memory: DyingStore, same: bool) -> None:
    """The other one gets its manifest in just before ours."""
    (tmp_path / "image").write_bytes(noise(1, 3 * BLOCK))
    (tmp_path / "other").write_bytes(noise(1 if same else 2, 3 * BLOCK))
    results = []

    def race(key: str) -> None:
        if key == names.base_manifest_key(PREFIX, "b"):
            memory.before_put = lambda key: None
            results.append(bless(memory, PREFIX, "b", tmp_path / "other"))

    memory.before_put = race
    if same:
        result = bless(memory, PREFIX, "b", tmp_path / "image")
        assert not result.created
        assert result.manifest_hash == results[0].manifest_hash
    else:
        with pytest.raises(ExportExists, match="other content"):
            bless(memory, PREFIX, "b", tmp_path / "image")
    assert results[0].created
    assert read_back(memory, "b", tmp_path) == (tmp_path / "other").read_bytes()
    assert list(memory.list(names.blessing_key(PREFIX, "b"))) == []


def test_a_lost_answer_to_the_manifest_is_our_own(tmp_path: Path, memory: DyingStore) -> None:
    (tmp_path / "image").write_bytes(noise(1))
    key = names.base_manifest_key(PREFIX, "b")
    memory.before_put = lambda put: (
        memory.lose_answers("put") if put == key and key not in memory.keys[:-1] else None
    )
    result = bless(ResilientStore(memory, deadline=20), PREFIX, "b", tmp_path / "image")
    assert memory.keys.count(key) == 2
    assert result.created


def test_a_store_that_is_away(tmp_path: Path, memory: DyingStore) -> None:
    (tmp_path / "image").write_bytes(noise(1))
    memory.set_down(True)
    with pytest.raises(StoreUnavailable):
        bless(memory, PREFIX, "b", tmp_path / "image")
    memory.set_down(False)
    memory.fail_next("put", StoreUnavailable("full"))
    with pytest.raises(StoreUnavailable, match="full"):
        bless(memory, PREFIX, "b", tmp_path / "image")
    assert list(memory.list(f"{PREFIX}/bases/")) == []


def refused(memory: MemoryStore, source: Path | int, name: str = "b") -> str:
    with pytest.raises(ConfigError) as caught:
        bless(memory, PREFIX, name, source)
    assert list(memory.list(f"{PREFIX}/bases/b/manifest")) == []
    return str(caught.value)


def test_what_is_no_image(tmp_path: Path, memory: DyingStore) -> None:
    assert "No such file" in refused(memory, tmp_path / "absent")
    assert "directory" in refused(memory, tmp_path)
    assert "character device" in refused(memory, Path("/dev/zero"))
    (tmp_path / "empty").touch()
    assert "nothing in it" in refused(memory, tmp_path / "empty")
    with pipe_of(b"") as fd:
        assert "nothing in it" in refused(memory, fd)
    (tmp_path / "q").write_bytes(b"QFI\xfb" + bytes(5000))
    assert "qemu-img convert" in refused(memory, tmp_path / "q")
    with pipe_of(b"\xfd7zXZ\0" + noise(1)) as fd:
        assert "xz -dc" in refused(memory, fd)
    for name in ("", "../x", "a/b", "x" * 129):
        with pytest.raises(InvalidName):
            bless(memory, PREFIX, name, tmp_path / "q")
    assert memory.keys == []


def test_an_image_that_changes_while_it_is_read(tmp_path: Path, memory: DyingStore) -> None:
    path = tmp_path / "image"

    def attempt(change: object) -> str:
        path.write_bytes(noise(1, 100 * BLOCK))
        calls = []

        def once(done: int, total: int) -> None:
            assert total == 100 * BLOCK
            if not calls:
                calls.append(done)
                change()  # type: ignore[operator]

        with pytest.raises(ConfigError) as caught:
            bless(memory, PREFIX, "b", path, progress=once)
        return str(caught.value)

    assert "became shorter" in attempt(lambda: os.truncate(path, 90 * BLOCK + 7))
    assert "changed while" in attempt(lambda: os.truncate(path, 101 * BLOCK))
    assert "changed while" in attempt(lambda: os.utime(path, ns=(1, 1)))
    assert list(memory.list(f"{PREFIX}/bases/b/manifest")) == []


def test_an_image_that_shrinks_into_a_hole(tmp_path: Path, memory: DyingStore) -> None:
    path = write_image(tmp_path / "image", 500 * BLOCK, {0: noise(1, 20 * BLOCK), 400 * BLOCK: noise(2)})
    with pytest.raises(ConfigError, match="changed while"):
        bless(memory, PREFIX, "b", path, progress=lambda done, total: os.truncate(path, 300 * BLOCK))


def test_progress(tmp_path: Path, memory: DyingStore) -> None:
    path = write_image(tmp_path / "image", 500 * BLOCK, {0: noise(1, 20 * BLOCK), 400 * BLOCK: noise(2)})
    calls: list[tuple[int, int]] = []
    bless(memory, PREFIX, "b", path, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (500 * BLOCK, 500 * BLOCK)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    with pipe_of(noise(1, 20 * BLOCK)) as fd:
        bless(memory, PREFIX, "p", fd, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (20 * BLOCK, 0)


def test_a_descriptor_in_the_middle_of_a_file_is_read_from_there(tmp_path: Path, memory: DyingStore) -> None:
    (tmp_path / "image").write_bytes(b"header" + noise(1, BLOCK * 2))
    with (tmp_path / "image").open("rb", buffering=0) as file:
        file.read(6)
        bless(memory, PREFIX, "b", file.fileno())
    assert read_back(memory, "b", tmp_path) == noise(1, BLOCK * 2)


kinds = st.sampled_from(["zero", "text", "noise", "almost zero"])


@settings(max_examples=60, deadline=None)
@given(
    blocks=st.lists(kinds, max_size=40),
    # No format that is refused begins so.
    tail=st.just(b"") | st.binary(max_size=1500).map(lambda more: b"t" + more),
    pack_bytes=st.integers(1, 5 * BLOCK),
    piped=st.booleans(),
    workers=st.integers(1, 3),
)
def test_any_image(blocks: list[str], tail: bytes, pack_bytes: int, piped: bool, workers: int) -> None:
    made = {"zero": bytes(BLOCK), "almost zero": bytes(BLOCK - 1) + b"z"}
    data = b"".join(
        made.get(kind) or (noise if kind == "noise" else text)(i) for i, kind in enumerate(blocks)
    )
    data += tail
    store = MemoryStore()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "image"
        path.write_bytes(data)
        if not data:
            refused(store, path)
            return
        with pipe_of(data) as fd:
            result = bless(store, PREFIX, "b", fd if piped else path, pack_bytes=pack_bytes, workers=workers)
        assert read_back(store, "b", Path(directory)) == padded(data)
    assert result.data_bytes <= result.size == len(padded(data))


def test_a_slow_store_holds_the_reader_up(
    tmp_path: Path, memory: DyingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packs that wait for the store take no more memory than those few that are being put."""
    sizes = []

    def buffer(size: int) -> memoryview:
        sizes.append(size)
        return memoryview(bytearray(size))

    monkeypatch.setattr(pipeline.heap, "buffer", buffer)
    memory.latency = 0.02
    (tmp_path / "image").write_bytes(noise(1, 40 * 5 * BLOCK))
    assert bless(memory, PREFIX, "b", tmp_path / "image", pack_bytes=5 * BLOCK, workers=2).packs == 40
    assert sizes.count(5 * BLOCK) == pack_writer.PUTS + 1
    assert sizes.count(pipeline.BATCH_BLOCKS * BLOCK) == 2 * (2 + pipeline.SPARE)


MEASURE = """
import sys
from pathlib import Path
from glidefs.bless.bless import bless
from glidefs.store import open_store
bless(open_store(sys.argv[1], create=True), "default", "b", Path(sys.argv[2]), workers=4)
# Not getrusage, which begins with what the parent of a vfork had.
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.parametrize("kind", ["noise", "text"])
def test_memory_is_bounded(tmp_path: Path, kind: str) -> None:
    """Noise fills the buffers of packs, text their indices."""
    path = tmp_path / "image"
    with path.open("wb") as file:
        for i in range(24):
            file.write(noise(i, 16 << 20) if kind == "noise" else text(i, 16 << 20))
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, f"file://{tmp_path}/store", str(path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) < 250_000
