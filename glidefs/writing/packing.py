"""Payloads and entries of a pack of an upload."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from glidefs.core import heap
from glidefs.core.payloads import compress_payloads
from glidefs.formats.pack import EMPTY_HASH, HEADER_SIZE, SECTOR, PackEntry, payload_hash
from glidefs.store.base import Buffer

SAMPLES = 32
SHRINKS = 0.97
"""A sample that keeps more than this part of its bytes says that a pack is not worth compressing."""


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
