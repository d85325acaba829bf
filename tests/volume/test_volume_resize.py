"""What discards and new sizes leave in the manifest."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest
from volume_rig import BLOCK, MIB, PREFIX, Rig

from glidefs.core.check import CoreError
from glidefs.formats.manifest import PackRef, Page, Root, encode_root
from glidefs.formats.pack import CHUNK
from glidefs.manifest import lease
from glidefs.manifest.cache import MetaCache
from glidefs.manifest.commit import Change, edit
from glidefs.manifest.view import Manifest
from glidefs.names import manifest_key
from glidefs.store.memory import MemoryStore


def test_zeroed_chunks_leave_the_manifest(rig: Rig) -> None:
    host = rig.host()
    volume = rig.create(host, 4 * CHUNK)
    for chunk in range(4):
        volume.core.pwrite(chunk * CHUNK, os.urandom(2 * BLOCK))
    volume.drain(20)
    volume.core.zero(CHUNK, CHUNK)
    volume.core.zero(2 * CHUNK + 4096, BLOCK)
    volume.drain(20)
    page = volume.root.inline_page
    assert page is not None
    assert sorted(page.chunks) == [0, 2, 3]
    assert len(page.chunks[2]) == 2
    keep = volume.core.pread(2 * CHUNK, 2 * BLOCK)
    volume.retire_committed()
    host.engine.cache.evict_all()
    assert volume.core.pread(CHUNK, 2 * BLOCK) == bytes(2 * BLOCK)
    assert volume.core.pread(2 * CHUNK, 2 * BLOCK) == keep
    assert keep[4096 : 4096 + BLOCK] == bytes(BLOCK)
    packs = len(rig.packs())
    volume.core.zero(0, 4 * CHUNK)
    volume.drain(20)
    assert volume.root.inline_page is not None
    assert not volume.root.inline_page.chunks
    assert len(rig.packs()) == packs


def test_discard_of_an_empty_volume_is_nothing(rig: Rig) -> None:
    host = rig.host()
    volume = rig.create(host, 2 << 40)
    started = time.monotonic()
    volume.core.zero(0, 2 << 40)
    volume.drain(20)
    assert time.monotonic() - started < 10
    assert not rig.packs()
    assert volume.core.pread(1 << 40, 4096) == bytes(4096)


def test_the_chunks_of_an_extent_are_found_without_a_look_at_the_page() -> None:
    """A discard among scattered writes leaves hundreds of thousands of extents: a scan each took minutes."""

    class NoScan(dict[int, tuple[int, ...]]):
        def __iter__(self) -> Iterator[int]:
            raise AssertionError("a scan of the page")

        keys = items = __iter__  # type: ignore[assignment]

    ref = PackRef(bytes(16), 1 << 20, 100, 0)
    chunks = NoScan(dict.fromkeys((0, 5, 6, 900, 1023), (0,)))
    root = Root(
        volume_id=bytes(16),
        name="v",
        size=128 << 30,
        page_ids=(b"",),
        inline_page=Page(packs=(ref,), chunks=chunks),
    )
    manifest = Manifest(root, PREFIX, MetaCache(1 << 20, 1), MemoryStore())
    assert list(manifest.present(1, 5)) == [5]
    assert list(manifest.present(0, 1023)) == [0, 5, 6, 900, 1023]
    assert list(manifest.present(6, 5000)) == [6, 900, 1023]
    assert list(manifest.present(2000, 2001)) == []


def test_resize_is_committed(rig: Rig) -> None:
    host = rig.host()
    volume = rig.create(host, 64 * MIB)
    volume.core.pwrite(63 * MIB, b"z" * MIB)
    volume.drain(20)
    volume.resize(32 * MIB)
    volume.drain(20)
    assert lease.read_root(host.store, PREFIX, volume.name)[0].size == 32 * MIB
    with pytest.raises(CoreError):
        volume.core.pread(63 * MIB, 4096)
    volume.resize(300 << 30)  # three pages: the inline page moves out
    volume.core.pwrite(200 << 30, b"y" * 4096)
    volume.core.pwrite(0, b"w" * 4096)
    volume.drain(20)
    root = lease.read_root(host.store, PREFIX, volume.name)[0]
    assert root.size == 300 << 30
    assert root.inline_page is None
    assert [bool(page) for page in root.page_ids] == [True, True, False]
    name = volume.name
    other = rig.attach(rig.host("b"), name, take_over=True)
    assert other.core.pread(63 * MIB, MIB) == bytes(MIB)
    assert other.core.pread(200 << 30, 4096) == b"y" * 4096
    assert other.core.pread(0, 4096) == b"w" * 4096


def test_what_a_shrink_cuts_off_is_gone_from_the_manifest(rig: Rig) -> None:
    host = rig.host()
    volume = rig.create(host, 4 * CHUNK)
    for chunk in range(4):
        volume.core.pwrite(chunk * CHUNK, os.urandom(BLOCK))
    volume.drain(20)
    volume.resize(CHUNK + 4096)
    volume.resize(4 * CHUNK)
    volume.drain(20)
    page = volume.root.inline_page
    assert page is not None
    assert sorted(page.chunks) == [0, 1]
    volume.retire_committed()
    host.engine.cache.evict_all()
    assert volume.core.pread(CHUNK + 4096, BLOCK) == bytes(BLOCK)
    assert volume.core.pread(2 * CHUNK, BLOCK) == bytes(BLOCK)
    manifest = volume.manifest(host.store)
    shrunk = edit(manifest, Change(size=CHUNK)).root
    assert shrunk.inline_page is not None
    assert sorted(shrunk.inline_page.chunks) == [0]
    encode_root(shrunk, manifest_key(PREFIX, shrunk.name))


@pytest.mark.parametrize("zeroes", [False, True])
def test_what_a_grow_brought_does_not_count_as_the_old_chunk(rig: Rig, zeroes: bool) -> None:
    """Blocks behind the end that the manifest knows are not those that it has: these stay."""
    host = rig.host()
    volume = rig.create(host, 2 * BLOCK)
    volume.core.pwrite(0, b"a" * 2 * BLOCK)
    volume.drain(20)
    host.pause(20)  # so that size and blocks go with one commit
    volume.resize(4 * CHUNK)
    if zeroes:
        volume.core.zero(8 * BLOCK, CHUNK)
    for block in (2, 3):
        volume.core.pwrite(block * BLOCK, b"b" * 4096)
    host.resume()
    volume.drain(20)
    volume.retire_committed()
    host.engine.cache.evict_all()
    want = b"a" * 2 * BLOCK + (b"b" * 4096 + bytes(BLOCK - 4096)) * 2
    assert volume.core.pread(0, 4 * BLOCK) == want
