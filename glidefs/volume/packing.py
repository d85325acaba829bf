"""Packs in the making: payloads in, one object in the store out."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec

from glidefs.core.payloads import compress_payloads
from glidefs.formats.manifest import PackRef
from glidefs.formats.pack import (
    CHUNK_BLOCKS,
    EMPTY_HASH,
    HEADER_SIZE,
    ID_SIZE,
    SECTOR,
    TRAILER_SIZE,
    PackEntry,
    PackIndex,
    decode_index,
    encode_header,
    encode_index,
    encode_trailer,
    pack_id,
    payload_hash,
)
from glidefs.names import pack_key
from glidefs.store.base import Buffer
from glidefs.volume import heap

SAMPLES = 32
SHRINKS = 0.97
"""A sample that keeps more than this part of its bytes says that a pack is not worth compressing."""


class BuiltPack(msgspec.Struct, frozen=True):
    """A pack that the store has: its reference, the chunks it has blocks of, its index.

    ``tail`` holds its last bytes: the index as it is stored, and the trailer.
    """

    ref: PackRef
    chunks: tuple[int, ...]
    index: PackIndex
    tail: bytes


class Item(NamedTuple):
    """What a pack will say of a block; its payload has the sectors of ``mask``."""

    block: int
    mask: int
    zero_mask: int


def compress_items(plain: memoryview, items: Sequence[Item], level: int) -> tuple[Buffer, list[PackEntry]]:
    """Payload area and entries for consecutive plain payloads of ``items`` (those with a mask)."""
    lengths = [item.mask.bit_count() * SECTOR for item in items if item.mask]
    stored: Sequence[int] = lengths
    area: Buffer = plain
    if lengths and worth_compressing(plain, lengths, level):
        out = heap.buffer(len(plain))
        stored = compress_payloads(plain, lengths, out, level)
        area = out[: sum(stored)]
    entries: list[PackEntry] = []
    sizes = iter(stored)
    at, offset = 0, HEADER_SIZE
    for block, mask, zero_mask in items:
        if not mask:
            entries.append(PackEntry(block, 0, zero_mask, 0, 0, EMPTY_HASH))
            continue
        length, size = mask.bit_count() * SECTOR, next(sizes)
        entries.append(PackEntry(block, mask, zero_mask, offset, size, payload_hash(plain[at : at + length])))
        at += length
        offset += size
    return area, entries


def worth_compressing(plain: memoryview, lengths: Sequence[int], level: int) -> bool:
    """Whether a sample of the payloads shrinks; spares the CPU where data is random already."""
    if len(lengths) <= SAMPLES:
        return True
    step = len(lengths) // SAMPLES
    sample, sizes, at = bytearray(), [], 0
    for i, length in enumerate(lengths):
        if i % step == 0:
            sample += plain[at : at + min(length, 4 * SECTOR)]
            sizes.append(min(length, 4 * SECTOR))
        at += length
    return sum(compress_payloads(sample, sizes, bytearray(len(sample)), level)) < SHRINKS * len(sample)


def put_pack(
    put: Callable[[str, list[Buffer]], object],
    prefix: str,
    volume_id: bytes,
    area: Buffer,
    entries: Sequence[PackEntry],
    level: int,
) -> BuiltPack:
    """Put a pack of these entries, whose payloads are back to back in the bytes ``area``.

    ``level`` is the compaction tier. ``put`` stores an object, with whatever patience it has.
    """
    index = encode_index(entries)
    trailer = encode_trailer(index, len(entries))
    new = pack_id(index, volume_id, secrets.token_bytes(ID_SIZE))
    key = pack_key(prefix, new.hex())
    size = HEADER_SIZE + len(area) + len(index) + TRAILER_SIZE
    put(key, [encode_header(), area, index, trailer])
    tail = index + trailer
    decoded = decode_index(key, tail, size)
    chunks = tuple(sorted({entry.block // CHUNK_BLOCKS for entry in entries}))
    return BuiltPack(PackRef(new, size, len(index) + TRAILER_SIZE, level), chunks, decoded, tail)
