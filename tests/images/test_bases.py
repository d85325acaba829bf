"""Bases in the store: published once, listed, removed."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from images_rig import PREFIX, DyingStore, noise, read_back

from glidefs import names
from glidefs.bases.stored import base_root, list_bases, load_base, publish_base, read_base, remove_base
from glidefs.bless.bless import bless
from glidefs.errors import Conflict, ExportExists, StoreUnavailable, UnknownExport
from glidefs.formats.manifest import NO_ID, Page, Root, decode_root, encode_root, manifest_hash
from glidefs.formats.pack import BLOCK
from glidefs.offline.export import export_image

VOLUME = Root(
    volume_id=b"v" * 16,
    name="vm1",
    size=1 << 30,
    page_ids=(b"",),
    inline_page=Page(),
    log_id=b"l" * 16,
    last_segment=7,
    owner_node="node-1",
    epoch=3,
    sequence=9,
    source="base:debian",
    transport="nbd",
    flush="store",
    created_at=1000,
    content_hash=b"c" * 32,
)
KEY = names.base_manifest_key(PREFIX, "b")


def test_a_base_of_any_root() -> None:
    root = base_root(VOLUME, "b")
    assert (root.name, root.size, root.source, root.created_at) == ("b", 1 << 30, "base:debian", 1000)
    assert (root.log_id, root.last_segment, root.owner_node, root.epoch) == (NO_ID, 0, "", 0)
    assert (root.read_only, root.transport, root.flush, root.content_hash) == (True, "auto", "local", b"")
    assert root.volume_id != VOLUME.volume_id
    assert root == base_root(VOLUME, "b")
    assert root.volume_id != base_root(VOLUME, "c").volume_id
    assert base_root(VOLUME, "b", created_at=5).created_at == 5


def test_publish_once(memory: DyingStore) -> None:
    root = base_root(VOLUME, "b")
    etag = publish_base(memory, PREFIX, root)
    assert publish_base(memory, PREFIX, root) == etag
    with pytest.raises(ExportExists, match=r"b: .*other content"):
        publish_base(memory, PREFIX, base_root(VOLUME, "b", created_at=6))
    found = read_base(memory, PREFIX, "b")
    assert found == (root, etag, manifest_hash(encode_root(root, KEY)))


def test_publish_through_trouble(memory: DyingStore) -> None:
    root = base_root(VOLUME, "b")
    memory.fail_next("put", Conflict(key=KEY))
    memory.lose_answers("put")
    with pytest.raises(StoreUnavailable):
        publish_base(memory, PREFIX, root)
    assert publish_base(memory, PREFIX, root) == memory.get(KEY).etag


def test_absent(memory: DyingStore) -> None:
    for call in (load_base, read_base, remove_base):
        with pytest.raises(UnknownExport, match="b: no base of that name in prefix default"):
            call(memory, PREFIX, "b")
    assert list_bases(memory, PREFIX) == []


def test_remove_leaves_a_tombstone_with_all_content(memory: DyingStore, tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(noise(1, 3 * BLOCK))
    bless(memory, PREFIX, "b", tmp_path / "image")
    before = load_base(memory, PREFIX, "b").root
    info = remove_base(memory, PREFIX, "b")
    after = load_base(memory, PREFIX, "b")
    assert after.root == msgspec.structs.replace(before, removed_at=info.removed_at)
    assert (info.etag, info.manifest_hash) == (after.etag, after.manifest_hash.hex())
    assert info.removed_at > 0
    assert remove_base(memory, PREFIX, "b") == info
    assert load_base(memory, PREFIX, "b") == after
    with pytest.raises(UnknownExport, match="this base was removed on"):
        read_base(memory, PREFIX, "b")
    assert read_back(memory, "b", tmp_path) == noise(1, 3 * BLOCK)
    assert export_image(memory, PREFIX, "base:b", tmp_path / "copy").removed_at == info.removed_at


def test_a_removed_name_stays_taken(memory: DyingStore, tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(noise(1))
    bless(memory, PREFIX, "b", tmp_path / "image")
    remove_base(memory, PREFIX, "b")
    puts = len(memory.keys)
    with pytest.raises(ExportExists, match=r"was removed on .*until gc has deleted it"):
        bless(memory, PREFIX, "b", tmp_path / "image")
    assert len(memory.keys) == puts
    memory.delete(KEY)
    assert bless(memory, PREFIX, "b", tmp_path / "image").created


def test_a_base_that_was_not_blessed_cannot_be_compared(memory: DyingStore, tmp_path: Path) -> None:
    publish_base(memory, PREFIX, base_root(VOLUME, "b"))
    (tmp_path / "image").write_bytes(noise(1))
    with pytest.raises(ExportExists, match="cannot be compared"):
        bless(memory, PREFIX, "b", tmp_path / "image")


def test_remove_is_conditional(memory: DyingStore) -> None:
    """Another host removes it between our read and our put: its time stands."""
    publish_base(memory, PREFIX, base_root(VOLUME, "b"))
    theirs = encode_root(msgspec.structs.replace(base_root(VOLUME, "b"), removed_at=77), KEY)

    def race(key: str) -> None:
        memory.before_put = lambda key: None
        memory.put(KEY, theirs)

    memory.before_put = race
    assert remove_base(memory, PREFIX, "b").removed_at == 77
    assert decode_root(KEY, memory.get(KEY).data).removed_at == 77


def test_list(memory: DyingStore, tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(noise(1, 3 * BLOCK))
    result = bless(memory, PREFIX, "blessed", tmp_path / "image")
    for number in range(20):
        publish_base(memory, PREFIX, base_root(VOLUME, f"b{number:02}"))
    remove_base(memory, PREFIX, "b03")
    memory.put(names.blessing_key(PREFIX, "under-way"), b"x")
    memory.put(f"{PREFIX}/bases/.odd/manifest", b"x")
    found = list_bases(memory, PREFIX)
    assert [base.name for base in found] == [*(f"b{number:02}" for number in range(20)), "blessed"]
    assert [base.name for base in found if base.removed_at] == ["b03"]
    last = found[-1]
    assert (last.packs, last.stored_bytes) == (result.packs, result.stored_bytes)
    assert (last.manifest_hash, last.content_hash) == (result.manifest_hash, result.content_hash)
    assert (last.size, last.source) == (3 * BLOCK, "image:image")
    assert list_bases(memory, "other") == []
