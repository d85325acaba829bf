"""Manifests and hot sets: round trips, determinism, damage, and structure that cannot be."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glidefs.errors import CorruptObject, NewerFormat, OlderFormat, WrongObject
from glidefs.formats import blessing, envelope, gc_state, hot_set, manifest
from glidefs.formats.manifest import NO_ID, PAGE_BYTES, PackRef, Page, Root

KEY = "p/volumes/v/manifest"
ids = st.binary(min_size=16, max_size=16)


@st.composite
def pages(draw: st.DrawFn, chunks: int = manifest.PAGE_CHUNKS) -> Page:
    refs = st.builds(
        PackRef,
        id=ids,
        size=st.integers(10**6, 2**32 - 1),
        index_length=st.integers(60, 10**6),
        level=st.integers(0, 9),
    )
    packs = draw(st.lists(refs, max_size=6))
    if not packs:
        return Page()
    indices = st.lists(st.integers(0, len(packs) - 1), min_size=1, unique=True).map(tuple)
    table = draw(st.dictionaries(st.integers(0, chunks - 1), indices, max_size=20))
    return Page(packs=tuple(packs), chunks=table)


@st.composite
def roots(draw: st.DrawFn) -> Root:
    size = draw(st.integers(1, 2**45 // 512)) * 512
    count = manifest.page_count(size)
    inline = None
    if count == 1 and draw(st.booleans()):
        inline = draw(pages(chunks=manifest.chunk_count(size)))
        page_ids: tuple[bytes, ...] = (b"",)
    else:
        page_ids = tuple(draw(st.sampled_from([b"", os.urandom(16)])) for _ in range(count))
    return Root(
        volume_id=draw(ids),
        name=draw(st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")),
        size=size,
        page_ids=page_ids,
        inline_page=inline,
        sequence=draw(st.integers(0, 2**63)),
        log_id=draw(ids),
        nonce=draw(ids),
        owner_host=draw(ids),
        last_segment=draw(st.integers(0, 2**63)),
        owner_node=draw(st.text(max_size=20)),
        epoch=draw(st.integers(0, 2**40)),
        source=draw(st.text(max_size=20)),
        transport=draw(st.sampled_from(["auto", "nbd", "ublk"])),
        read_only=draw(st.booleans()),
        flush=draw(st.sampled_from(["local", "store"])),
        content_hash=draw(st.sampled_from([b"", b"c" * 32])),
    )


@settings(max_examples=80, deadline=None)
@given(roots())
def test_root_round_trip(root: Root) -> None:
    data = manifest.encode_root(root, KEY)
    assert manifest.decode_root(KEY, data) == root
    assert manifest.encode_root(manifest.decode_root(KEY, data), KEY) == data
    assert len(manifest.manifest_hash(data)) == 32


@settings(max_examples=80, deadline=None)
@given(pages(), st.randoms())
def test_page_round_trip_and_determinism(page: Page, random: Any) -> None:
    data = manifest.encode_page(page, VOLUME, NONCE)
    assert manifest.decode_page(KEY, data, manifest.page_id(data)) == page
    items = list(page.chunks.items())
    random.shuffle(items)
    assert manifest.encode_page(Page(packs=page.packs, chunks=dict(items)), VOLUME, NONCE) == data
    other = manifest.encode_page(page, VOLUME, bytes(16))
    assert manifest.page_id(other) != manifest.page_id(data)


VOLUME, NONCE = b"v" * 16, b"n" * 16
REF = PackRef(id=b"p" * 16, size=1000, index_length=100)
PAGE = Page(packs=(REF, msgspec.structs.replace(REF, level=1)), chunks={0: (0, 1), 7: (1,)})
ROOT = Root(volume_id=b"v" * 16, name="vol", size=10 << 30, page_ids=(b"",), inline_page=PAGE)
HOT = hot_set.make_hot_set(b"m" * 32, [5, 6, 7, 100, 6, 99])
BLESSING = blessing.make_blessing(1000, [blessing.PutPack(REF, 1001)], 1002)
STATE = gc_state.make_state(b"r" * 16, {b"p" * 16: 1.0}, {})
PAGE_DATA = manifest.encode_page(PAGE, VOLUME, NONCE)


def decode_page(key: str, data: bytes) -> Page:
    return manifest.decode_page(key, data, manifest.page_id(PAGE_DATA))


ENCODED: dict[str, tuple[bytes, Callable[[str, bytes], Any], Any]] = {
    "root": (manifest.encode_root(ROOT, KEY), manifest.decode_root, ROOT),
    "page": (PAGE_DATA, decode_page, PAGE),
    "hot set": (hot_set.encode_hot_set(HOT, KEY), hot_set.decode_hot_set, HOT),
    "blessing": (blessing.encode_blessing(BLESSING, KEY), blessing.decode_blessing, BLESSING),
    "gc state": (gc_state.encode_state(STATE, KEY), gc_state.decode_state, STATE),
}
OTHERS = {
    "root": manifest.encode_root(ROOT, "p/volumes/other/manifest"),
    "page": manifest.encode_page(PAGE, VOLUME, bytes(16)),
    "hot set": hot_set.encode_hot_set(HOT, "p/bases/other/hot-set"),
    "blessing": blessing.encode_blessing(BLESSING, "p/bases/other/blessing"),
    "gc state": gc_state.encode_state(STATE, "q/gc/state"),
}


@pytest.mark.parametrize("kind", ENCODED)
def test_another_object_of_the_kind_is_not_taken_for_this_one(kind: str) -> None:
    """! A whole and valid object in the place of another is an error that says so, never its content."""
    with pytest.raises(WrongObject) as caught:
        ENCODED[kind][1](KEY, OTHERS[kind])
    assert caught.value.key == KEY
    assert "not the object that belongs here" in str(caught.value)


@pytest.mark.parametrize("kind", ENCODED)
def test_every_bit_flip_and_every_truncation(kind: str) -> None:
    data, decode, value = ENCODED[kind]
    assert decode(KEY, data) == value
    for bit in range(len(data) * 8):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptObject) as caught:
            decode(KEY, bytes(damaged))
        assert caught.value.key == KEY
    for length in range(len(data)):
        with pytest.raises(CorruptObject):
            decode(KEY, data[:length])
    with pytest.raises(CorruptObject):
        decode(KEY, data + b"\0")


@pytest.mark.parametrize("kind", ENCODED)
def test_one_kind_is_not_read_as_another(kind: str) -> None:
    data = ENCODED[kind][0]
    for other, (_, decode, _) in ENCODED.items():
        if other != kind:
            with pytest.raises(CorruptObject, match="magic"):
                decode(KEY, data)


def reseal(document: dict[str, Any] | list[Any], magic: bytes, major: int = 2, flags: int = 0) -> bytes:
    return envelope.seal(magic, major, 0, flags, msgspec.msgpack.encode(document), KEY.encode())


def root_fields(**changes: Any) -> dict[str, Any]:
    return {**msgspec.to_builtins(ROOT, builtin_types=(bytes,)), **changes}


@pytest.mark.parametrize(
    "changes",
    [
        {"size": 0},
        {"size": 1000},
        {"size": 2**61},
        {"size": -512},
        {"size": PAGE_BYTES + 512},
        {"page_ids": []},
        {"page_ids": [b"", b""]},
        {"page_ids": [b"short"]},
        {"page_ids": [b"x" * 16]},
        {"volume_id": b"short"},
        {"log_id": b""},
        {"nonce": b"short"},
        {"owner_host": b""},
        {"name": "../etc"},
        {"name": "a\n"},
        {"name": ""},
        {"flush": "sometimes"},
        {"block_size": 4096},
        {"format": 3},
        {"flags": 1},
        {"content_hash": b"short"},
        {"content_hash": b"c" * 33},
        {"sequence": -1},
        {"inline_page": [[[b"p" * 16, 1000, 100]], {0: [1]}]},
        {"inline_page": [[[b"p" * 16, 1000, 100]], {0: [-1]}]},
        {"inline_page": [[[b"p" * 16, 1000, 100]], {0: [0, 0]}]},
        {"inline_page": [[[b"p" * 16, 1000, 100]], {0: []}]},
        {"inline_page": [[[b"p" * 16, 1000, 100]], {80: [0]}]},
        {"inline_page": [[[b"p" * 16, 50, 100]], {}]},
        {"inline_page": [[[b"p", 1000, 100]], {}]},
    ],
    ids=str,
)
def test_impossible_roots_are_refused(changes: dict[str, Any]) -> None:
    good = reseal(root_fields(), manifest.ROOT_MAGIC)
    assert manifest.decode_root(KEY, good) == ROOT
    with pytest.raises(CorruptObject):
        manifest.decode_root(KEY, reseal(root_fields(**changes), manifest.ROOT_MAGIC))


def test_impossible_page_is_refused_and_never_written() -> None:
    bad = Page(packs=(REF,), chunks={manifest.PAGE_CHUNKS: (0,)})
    with pytest.raises(ValueError, match="1023"):
        manifest.encode_page(bad, VOLUME, NONCE)
    data = reseal([[], {1: [0]}], manifest.PAGE_MAGIC)
    with pytest.raises(CorruptObject):
        manifest.decode_page(KEY, data, manifest.page_id(data))
    with pytest.raises(ValueError, match="pages"):
        manifest.encode_root(msgspec.structs.replace(ROOT, size=2 * PAGE_BYTES), KEY)


def test_newer_formats_are_refused_and_newer_fields_skipped() -> None:
    with pytest.raises(OlderFormat, match="format 1; this one reads format 2"):
        manifest.decode_root(KEY, reseal(root_fields(), manifest.ROOT_MAGIC, 1))
    for major, flags in ((3, 0), (2, 1), (2, 1 << 31)):
        with pytest.raises(NewerFormat, match="newer"):
            manifest.decode_root(KEY, reseal(root_fields(), manifest.ROOT_MAGIC, major, flags))
    assert manifest.decode_root(KEY, reseal(root_fields(novelty=1), manifest.ROOT_MAGIC)) == ROOT


def test_no_memory_for_a_length_that_lies() -> None:
    plain = msgspec.msgpack.encode(root_fields())
    frame = envelope.compression.compress(bytes(64 << 20))
    for length in (0, len(plain) + 1, manifest.MAX_DOCUMENT + 1, 2**32 - 1):
        head = envelope._PREFIX.pack(manifest.ROOT_MAGIC, 2, 0, 0, length)
        body = head + len(KEY).to_bytes(2, "little") + KEY.encode() + frame
        with pytest.raises(CorruptObject):
            manifest.decode_root(KEY, body + manifest.manifest_hash(body))


def test_hot_set() -> None:
    assert list(HOT.blocks()) == [5, 6, 7, 100, 99]
    assert HOT.block_count == 5
    with pytest.raises(CorruptObject, match="two runs"):
        hot_set.decode_hot_set(KEY, reseal([b"m" * 32, [[5, 3], [7, 1]]], hot_set.HOT_SET_MAGIC))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 300)))
def test_hot_set_keeps_first_touch_order(blocks: list[int]) -> None:
    made = hot_set.make_hot_set(b"m" * 32, blocks)
    assert list(made.blocks()) == list(dict.fromkeys(blocks))
    assert hot_set.decode_hot_set(KEY, hot_set.encode_hot_set(made, KEY)) == made


def test_a_root_from_before_content_hashes() -> None:
    """Roots are read by versions on both sides of a field that was added."""
    old = root_fields()
    del old["content_hash"]
    assert manifest.decode_root(KEY, reseal(old, manifest.ROOT_MAGIC)) == ROOT
    blessed = msgspec.structs.replace(ROOT, content_hash=b"c" * 32)
    fields = msgspec.msgpack.decode(
        envelope.unseal(
            KEY, manifest.encode_root(blessed, KEY), manifest.ROOT_MAGIC, 2, 0, 1 << 20, KEY.encode()
        )
    )
    assert fields.pop("content_hash") == b"c" * 32
    assert fields == msgspec.msgpack.decode(msgspec.msgpack.encode(old))


def test_content_hash() -> None:
    def digest(pairs: list[tuple[int, bytes]], size: int) -> bytes:
        content = manifest.ContentHash()
        for block, payload in pairs:
            content.add([block], [payload])
        return content.digest(size)

    pairs = [(0, b"a" * 16), (5, b"b" * 16)]
    together = manifest.ContentHash()
    together.add([0, 5], [b"a" * 16, b"b" * 16])
    assert together.digest(1 << 20) == digest(pairs, 1 << 20)
    assert together.blocks == 2
    others = [
        digest(pairs, 1 << 21),
        digest(pairs[:1], 1 << 20),
        digest([(0, b"b" * 16), (5, b"a" * 16)], 1 << 20),
        digest([(1, b"a" * 16), (5, b"b" * 16)], 1 << 20),
    ]
    assert len({*others, together.digest(1 << 20)}) == 5


def test_defaults() -> None:
    root = Root(volume_id=b"v" * 16, name="v", size=512, page_ids=(b"",))
    assert root.log_id == NO_ID
    assert manifest.decode_root(KEY, manifest.encode_root(root, KEY)) == root
    assert manifest.page_count(PAGE_BYTES) == 1
    assert manifest.page_count(PAGE_BYTES + 512) == 2
