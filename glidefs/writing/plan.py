"""Plans an upload: compares the sealed log with the manifest, cuts it into packs. Loads pages, no other I/O.

Zeros are cheap in both directions: a chunk that is covered whole by this upload loses its
older packs, in the others zeroed sectors become mask bits, and over nothing they are nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import msgspec

from glidefs.core.gather import Gather, GatherExtent
from glidefs.formats.pack import BLOCK, CHUNK_BLOCKS, FULL_MASK, MAX_ENTRIES, SECTOR
from glidefs.manifest.view import Manifest, block_count
from glidefs.writing.packing import Item


class PackJob(msgspec.Struct, frozen=True):
    """One pack: gather entries ``first`` up to ``first + count`` hold its data, ``items`` its index."""

    first: int
    count: int
    items: list[Item]


class UploadPlan(NamedTuple):
    """``drops``: chunks whose older packs are covered whole; ``jobs``: packs, ascending by block."""

    drops: frozenset[int]
    jobs: list[PackJob]


def plan_upload(gather: Gather, manifest: Manifest, pack_bytes: int) -> UploadPlan:
    """Plan the upload of all of ``gather`` over ``manifest``; packs of ``pack_bytes`` plain bytes."""
    extents = gather.extents()
    drops = covered_chunks(gather, extents, manifest)
    present = _Present(manifest, drops)
    zeros = _zero_items(extents, manifest, drops)
    return UploadPlan(drops, list(_cut(gather, zeros, present, pack_bytes)))


def covered_chunks(gather: Gather, extents: Sequence[GatherExtent], manifest: Manifest) -> frozenset[int]:
    """The chunks of the manifest of which ``gather`` has every sector.

    Counted is what lies within the manifest's size: blocks that a grow brought since are in no pack.
    """
    size = manifest.root.size
    blocks_end = block_count(size)
    covered: Counter[int] = Counter()
    for extent in extents:
        end = min(extent.block + extent.count, blocks_end)
        if extent.block >= end:
            continue
        for chunk in manifest.present(extent.block // CHUNK_BLOCKS, (end - 1) // CHUNK_BLOCKS):
            start, stop = chunk * CHUNK_BLOCKS, (chunk + 1) * CHUNK_BLOCKS
            covered[chunk] += min(stop, end) - max(start, extent.block)
    for block, mask, zero_mask in gather.entries():
        valid = _valid(block, size)
        if block < blocks_end and (mask | zero_mask) & valid == valid:
            covered[block // CHUNK_BLOCKS] += 1
    return frozenset(
        chunk
        for chunk, blocks in covered.items()
        if blocks >= manifest.blocks_of(chunk) > 0 and manifest.packs(chunk)
    )


def _valid(block: int, size: int) -> int:
    """The sectors of a block, not one behind the end, that are within the volume."""
    sectors = -(-(size - block * BLOCK) // SECTOR)
    return FULL_MASK if sectors >= 32 else (1 << max(sectors, 0)) - 1


class _Present:
    """Whether zeros in a chunk hide anything."""

    def __init__(self, manifest: Manifest, drops: frozenset[int]) -> None:
        self._manifest = manifest
        self._drops = drops
        self._known: dict[int, bool] = {}

    def __call__(self, chunk: int) -> bool:
        known = self._known.get(chunk)
        if known is None:
            known = chunk not in self._drops and bool(self._manifest.packs(chunk))
            self._known[chunk] = known
        return known


def _zero_items(extents: Sequence[GatherExtent], manifest: Manifest, drops: frozenset[int]) -> Iterator[Item]:
    """Zero-mask items for whole zero blocks in chunks that keep older packs, ascending."""
    for extent in sorted(extents):
        end = extent.block + extent.count
        for chunk in manifest.present(extent.block // CHUNK_BLOCKS, (end - 1) // CHUNK_BLOCKS):
            if chunk not in drops:
                stop = min(end, chunk * CHUNK_BLOCKS + manifest.blocks_of(chunk))
                for block in range(max(extent.block, chunk * CHUNK_BLOCKS), stop):
                    yield Item(block, 0, FULL_MASK)


def _cut(gather: Gather, zeros: Iterator[Item], present: _Present, pack_bytes: int) -> Iterator[PackJob]:
    """Merge data and zero items by block and cut them where a pack is full."""
    items: list[Item] = []
    first = count = size = 0
    zero = next(zeros, None)
    for i, (block, mask, zero_mask) in enumerate(gather.entries()):
        while zero is not None and zero.block < block:
            items.append(zero)
            zero = next(zeros, None)
        length = mask.bit_count() * SECTOR
        if items and (size + length > pack_bytes or len(items) >= MAX_ENTRIES - 1):
            yield PackJob(first, count, items)
            items, first, count, size = [], i, 0, 0
        count += 1
        size += length
        if zero_mask and not present(block // CHUNK_BLOCKS):
            zero_mask = 0
        if mask or zero_mask:
            items.append(Item(block, mask, zero_mask))
    while zero is not None:
        if len(items) >= MAX_ENTRIES - 1:
            yield PackJob(first, count, items)
            items, first, count = [], first + count, 0
        items.append(zero)
        zero = next(zeros, None)
    if items:
        yield PackJob(first, count, items)
