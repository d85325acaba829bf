"""Packs: what is written is read back, and whatever happened to the bytes is noticed."""

from __future__ import annotations

import os
import struct
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glidefs.errors import CorruptObject, OlderFormat, WrongObject
from glidefs.formats import compression, pack
from glidefs.formats.pack import BLOCK, SECTOR, PackEntry

KEY = "p/packs/aa/x"
VOLUME, NONCE = b"v" * 16, b"n" * 16


def build(blocks: dict[int, tuple[int, int, bytes]]) -> tuple[bytes, int]:
    """A whole pack of {block: (mask, zero mask, plain)}, and its index length."""
    out = bytearray(pack.encode_header())
    entries = []
    for block, (mask, zero_mask, plain) in blocks.items():
        stored = pack.encode_payload(plain) if mask else b""
        offset = len(out) if mask else 0
        entries.append(PackEntry(block, mask, zero_mask, offset, len(stored), pack.payload_hash(plain)))
        out += stored
    index = pack.encode_index(entries)
    trailer = pack.encode_trailer(index, len(entries), VOLUME, NONCE)
    return bytes(out + index + trailer), pack.index_length(index)


def id_of(data: bytes, length: int) -> bytes:
    return pack.pack_id(pack.payload_hash(data[-length : -pack.TRAILER_SIZE]), VOLUME, NONCE)


def read(data: bytes, length: int, own: bytes | None = None) -> dict[int, tuple[int, int, bytes]]:
    """The blocks of a pack, through the reader's functions."""
    pack.check_header(KEY, data[: pack.HEADER_SIZE])
    index = pack.decode_index(KEY, data[-length:], len(data), own)
    result = {}
    for entry in index.entries():
        stored = data[entry.offset : entry.offset + entry.stored]
        plain = pack.decode_payload(KEY, entry, stored) if entry.mask else b""
        result[entry.block] = (entry.mask, entry.zero_mask, plain)
    return result


@st.composite
def block_content(draw: st.DrawFn) -> tuple[int, int, bytes]:
    bits = draw(st.integers(1, 2**32 - 1))
    zero_mask = draw(st.integers(0, 2**32 - 1)) & ~bits & (2**32 - 1)
    kind = draw(st.sampled_from(["zero", "text", "random"]))
    if kind == "zero":
        return 0, bits, b""
    seed = draw(st.integers(0, 2**32 - 1)).to_bytes(4, "little")
    count = bits.bit_count()
    if kind == "text":
        return bits, zero_mask, (seed * 1024) * count
    return bits, zero_mask, b"".join(os.urandom(SECTOR) for _ in range(count))


contents = st.dictionaries(st.integers(0, pack.MAX_BLOCK - 1), block_content(), max_size=6)


@settings(max_examples=60, deadline=None)
@given(contents)
def test_round_trip(blocks: dict[int, tuple[int, int, bytes]]) -> None:
    data, length = build(blocks)
    assert read(data, length) == blocks
    # A tail that is longer than the index is as good (inspect reads the whole object).
    assert len(pack.decode_index(KEY, data, len(data), None)) == len(blocks)


def test_find_and_range() -> None:
    blocks = {n * 3: (0, 1, b"") for n in range(200)}
    data, length = build(blocks)
    index = pack.decode_index(KEY, data[-length:], len(data), None)
    assert len(index) == 200
    assert index.nbytes == 200 * pack.ENTRY_SIZE
    for block in range(-1, 610):
        found = index.find(block)
        assert (found.block if found else None) == (block if block in blocks else None)
    assert [entry.block for entry in index.range(7, 10)] == [9, 12, 15]
    assert list(index.range(598, 100)) == []
    assert list(index.range(0, 0)) == []


def sample() -> tuple[bytes, int]:
    return build(
        {
            1: (0b11, 0b100, b"ab" * SECTOR),
            5: (0, 0xFF, b""),
            9: (pack.FULL_MASK, 0, os.urandom(BLOCK)),
        }
    )


SAMPLE, SAMPLE_INDEX = sample()
GOOD = read(SAMPLE, SAMPLE_INDEX)


@settings(max_examples=400, deadline=None)
@given(st.integers(0, len(SAMPLE) * 8 - 1) | st.integers(-(SAMPLE_INDEX * 8), -1))
def test_bit_flips_are_noticed(bit: int) -> None:
    damaged = bytearray(SAMPLE)
    at = bit // 8 % len(SAMPLE)
    damaged[at] ^= 1 << bit % 8
    try:
        assert read(bytes(damaged), SAMPLE_INDEX, id_of(SAMPLE, SAMPLE_INDEX)) == GOOD
    except CorruptObject as error:
        caught = error
    else:
        # The minor version, and the bits of a zstd frame that carry nothing.
        assert at in (6, 7) or pack.HEADER_SIZE <= at < len(SAMPLE) - SAMPLE_INDEX
        return
    assert caught.key == KEY
    assert 0 <= caught.offset <= len(SAMPLE)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, SAMPLE_INDEX), st.integers(0, 2**33))
def test_truncated_tail(length: int, size: int) -> None:
    tail = SAMPLE[len(SAMPLE) - length :]
    for claimed in (size, len(SAMPLE)):
        try:
            index = pack.decode_index(KEY, tail, claimed, None)
        except CorruptObject:
            continue
        assert length == SAMPLE_INDEX
        assert [entry.block for entry in index.entries()] == [1, 5, 9]


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_noise_is_refused(noise: bytes) -> None:
    with pytest.raises(CorruptObject):
        pack.decode_index(KEY, noise, max(len(noise), 128), None)
    with pytest.raises(CorruptObject):
        pack.check_header(KEY, noise)


def forge(records: bytes, count: int, payload: int = 3 * BLOCK) -> tuple[bytes, int]:
    """A tail with a correct checksum over records that no writer makes; and an object size."""
    index = compression.compress(records)
    trailer = pack.encode_trailer(index, count, VOLUME, NONCE)
    return index + trailer, pack.HEADER_SIZE + payload + len(index) + pack.TRAILER_SIZE


def record(block: int, mask: int, zero_mask: int, offset: int, stored: int) -> bytes:
    return struct.pack("<QIIII16s", block, mask, zero_mask, offset, stored, b"h" * 16)


FAULTS = {
    "unsorted": record(2, 1, 0, 16, 9) + record(1, 1, 0, 16, 9),
    "twice": record(2, 1, 0, 16, 9) * 2,
    "overlap": record(2, 3, 2, 16, 9),
    "nothing": record(2, 0, 0, 0, 0),
    "payload without sectors": record(2, 0, 1, 16, 9),
    "no payload": record(2, 1, 0, 16, 0),
    "too long": record(2, 1, 0, 16, SECTOR + 1),
    "in the header": record(2, 1, 0, 8, 9),
    "in the index": record(2, 1, 0, 16 + 3 * BLOCK - 8, 9),
    "beyond": record(2, 1, 0, 2**32 - 1, 9),
    "block number": record(2**63, 1, 0, 16, 9),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_well_summed_nonsense_is_refused(fault: str) -> None:
    records = FAULTS[fault]
    tail, size = forge(records, len(records) // pack.ENTRY_SIZE)
    with pytest.raises(CorruptObject):
        pack.decode_index(KEY, tail, size, None)


def test_count_and_size_must_agree_before_memory_is_taken() -> None:
    good = record(2, 1, 0, 16, 9)
    tail, size = forge(good, 1)
    assert len(pack.decode_index(KEY, tail, size, None)) == 1
    frame = compression.compress(bytes(64 << 20))
    small = compression.compress(bytes(8 << 20))
    tracemalloc.start()
    try:
        for records, count in ((good, 2), (good, 0), (good, 2**32 - 1)):
            tail, size = forge(records, count)
            with pytest.raises(CorruptObject):
                pack.decode_index(KEY, tail, size, None)
        tail = frame + pack.encode_trailer(frame, pack.MAX_ENTRIES, VOLUME, NONCE)
        with pytest.raises(CorruptObject):
            pack.decode_index(KEY, tail, 1 << 20, None)
        entry = PackEntry(1, 1, 0, 16, len(frame), b"h" * 16)
        with pytest.raises(CorruptObject):
            pack.decode_payload(KEY, entry, frame)
        with pytest.raises(CorruptObject, match="plain bytes where"):
            pack.decode_payload(KEY, entry._replace(stored=len(small)), small)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_payload_of_another_block_is_refused() -> None:
    first, second = os.urandom(SECTOR), os.urandom(SECTOR)
    entry = PackEntry(1, 1, 0, 16, SECTOR, pack.payload_hash(first))
    assert pack.decode_payload(KEY, entry, memoryview(first)) == first
    with pytest.raises(CorruptObject, match="checksum"):
        pack.decode_payload(KEY, entry, second)
    with pytest.raises(CorruptObject):
        pack.decode_payload(KEY, entry, first[:-1])


def test_header_of_a_newer_version() -> None:
    good = pack.encode_header()
    pack.check_header(KEY, good)
    for at in (4, 8, 12):
        newer = bytearray(good)
        newer[at] ^= 2
        with pytest.raises(CorruptObject) as caught:
            pack.check_header(KEY, newer)
        assert caught.value.offset == at


def test_the_id_names_the_index() -> None:
    """! The pack of another volume in the place of this one is refused, whole and valid as it is."""
    mine, length = build({1: (1, 0, b"a" * SECTOR)})
    own = id_of(mine, length)
    assert len(pack.decode_index(KEY, mine[-length:], len(mine), own)) == 1
    theirs, their_length = build({1: (1, 0, b"b" * SECTOR)})
    with pytest.raises(WrongObject, match="made for volume"):
        pack.decode_index(KEY, theirs[-their_length:], len(theirs), own)
    renamed, parts = pack.rename(mine, VOLUME, bytes(16))
    again = b"".join(parts)
    assert renamed != own
    assert read(again, length) == read(mine, length)
    assert len(pack.decode_index(KEY, again[-length:], len(again), renamed)) == 1


def test_a_pack_of_the_first_format_is_refused_by_name() -> None:
    data, length = build({1: (1, 0, b"a" * SECTOR)})
    with pytest.raises(OlderFormat, match="format 1"):
        pack.decode_index(KEY, data[-length:-4] + b"GLIX", len(data), None)
    with pytest.raises(OlderFormat, match="format 1"):
        pack.check_header(KEY, data[:4] + (1).to_bytes(2, "little") + data[6 : pack.HEADER_SIZE])


def test_encode_index_refuses_what_decode_would() -> None:
    good = PackEntry(1, 1, 0, 16, 9, b"h" * 16)
    for bad in (
        good._replace(zero_mask=1),
        good._replace(stored=0),
        good._replace(mask=0),
        good._replace(hash=b"short"),
        good._replace(offset=3),
    ):
        with pytest.raises(ValueError, match="block 1"):
            pack.encode_index([bad])
    with pytest.raises(ValueError, match="twice"):
        pack.encode_index([good, good])


def test_ids_are_never_reused() -> None:
    nonces = [os.urandom(16) for _ in range(50)]
    ids = {pack.pack_id(b"i" * 16, b"v" * 16, nonce) for nonce in nonces}
    assert len(ids) == 50
    assert {len(one) for one in ids} == {16}
    assert pack.pack_id(b"i" * 16, b"v" * 16, nonces[0]) != pack.pack_id(b"i" * 16, b"w" * 16, nonces[0])
    with pytest.raises(ValueError, match="nonce"):
        pack.pack_id(b"i" * 16, b"v" * 16, b"")
