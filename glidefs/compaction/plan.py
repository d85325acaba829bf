"""What compaction merges: the shape of one chunk decides, newest packs first. No I/O, no clock.

Size-tiered, as Cassandra's strategy of that name: what is merged is of similar size, so a byte is
rewritten about once per factor of growth. The packs of a chunk form *layers*: neighbours in age
whose blocks are disjoint (as those of one commit are) are one layer, since a block is in at most one
of them. The number of layers is what a read may have to look through.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from glidefs.formats.manifest import PackRef
from glidefs.formats.pack import CHUNK_BLOCKS, FULL_MASK, PackEntry, PackIndex

KEEP_UPPER = 2
"""Upper layers that stay as they are beside the merged one, where sizes do not say otherwise.

Fewer where the width asks for fewer: bottom, these and the merged one are less than the width."""
GROWTH = 4
"""An older layer joins a run that is at least this many times its size."""
BOTTOM_SHARE = 0.5
"""The bottom is rewritten when more than this part of its bytes is superseded."""


class Layer(NamedTuple):
    """Packs ``first`` up to ``stop`` of a chunk (oldest first): sectors in all, sectors that still show."""

    first: int
    stop: int
    sectors: int
    live: int


class ChunkRun(NamedTuple):
    """Merge these packs, oldest first, in ``chunk``; ``bottom``: nothing is below them.

    ``sectors``: how many all of them hold there.
    """

    chunk: int
    sectors: int
    refs: tuple[PackRef, ...]
    indices: tuple[PackIndex, ...]
    bottom: bool


def layers_of(chunk: int, indices: Sequence[PackIndex]) -> list[Layer]:
    """The layers of a chunk whose packs (oldest first) have these indices."""
    first_block = chunk * CHUNK_BLOCKS
    total, live = [0] * len(indices), [0] * len(indices)
    covered: dict[int, int] = {}
    blocks: list[set[int]] = []
    for i in range(len(indices) - 1, -1, -1):
        mine: set[int] = set()
        for block, mask, zero_mask, *_ in indices[i].range(first_block, CHUNK_BLOCKS):
            above = covered.get(block, 0)
            total[i] += mask.bit_count()
            live[i] += (mask & ~above).bit_count()
            covered[block] = above | mask | zero_mask
            mine.add(block)
        blocks.append(mine)
    blocks.reverse()
    layers: list[Layer] = []
    seen: set[int] = set()
    first = 0
    for i in range(len(indices) + 1):
        if i == len(indices) or not seen.isdisjoint(blocks[i]):
            if i > first or i == len(indices):
                layers.append(Layer(first, i, sum(total[first:i]), sum(live[first:i])))
            first, seen = i, set()
        if i < len(indices):
            seen |= blocks[i]
    return [layer for layer in layers if layer.stop > layer.first]


def choose_run(layers: Sequence[Layer], width: int) -> tuple[int, bool] | None:
    """Which packs to merge where a chunk has at least ``width`` layers: from this pack to the newest.

    Returns (index of the oldest pack, whether that is the bottom), or None.
    """
    if len(layers) < max(width, 2):
        return None
    keep = max(0, min(KEEP_UPPER, width - 3))
    start = len(layers) - 1
    size = layers[start].sectors
    while start > 1:
        older = layers[start - 1].sectors
        # After the merge there are the bottom, start - 1 upper layers, and the new one.
        if start - 1 <= keep and older * GROWTH > size:
            break
        start -= 1
        size += older
    bottom = layers[0]
    dead = bottom.sectors - bottom.live
    between = sum(layer.sectors for layer in layers[1:start])
    if dead > bottom.sectors * BOTTOM_SHARE and dead >= between:
        return 0, True
    if start == 1 and bottom.sectors * GROWTH <= size:
        return 0, True
    if start == len(layers) - 1:
        return None
    return layers[start].first, False


def runs_of(
    chunk: int, refs: tuple[PackRef, ...], indices: Sequence[PackIndex], width: int
) -> ChunkRun | None:
    """The run to merge in a chunk, or None if it is in shape."""
    layers = layers_of(chunk, indices)
    chosen = choose_run(layers, width)
    if chosen is None:
        return None
    first, bottom = chosen
    sectors = sum(layer.sectors for layer in layers if layer.first >= first)
    return ChunkRun(chunk, sectors, refs[first:], tuple(indices[first:]), bottom)


class Part(NamedTuple):
    """Sectors that one input gives to a merged block: ``take`` of those its payload has."""

    source: int
    take: int


class MergedBlock(NamedTuple):
    """A block of the output. ``parts`` newest first; ``mask`` and ``zero_mask`` of all together."""

    block: int
    parts: tuple[Part, ...]
    mask: int
    zero_mask: int


def merge_blocks(run: ChunkRun) -> tuple[list[MergedBlock], list[dict[int, PackEntry]]]:
    """The blocks of the output, ascending, without those that say nothing.

    The second value gives, per input of the run, its entries by block.
    """
    first = run.chunk * CHUNK_BLOCKS
    entries: list[dict[int, PackEntry]] = [
        {entry.block: entry for entry in index.range(first, CHUNK_BLOCKS)} for index in run.indices
    ]
    merged: list[MergedBlock] = []
    for block in sorted(set().union(*entries)):
        mask = zero_mask = 0
        parts: list[Part] = []
        for i in range(len(entries) - 1, -1, -1):
            entry = entries[i].get(block)
            if entry is None:
                continue
            rest = FULL_MASK & ~(mask | zero_mask)
            take, zeros = entry.mask & rest, entry.zero_mask & rest
            if take:
                parts.append(Part(i, take))
            mask |= take
            zero_mask |= zeros
        if run.bottom:
            zero_mask = 0
        if mask or zero_mask:
            merged.append(MergedBlock(block, tuple(parts), mask, zero_mask))
    return merged, entries
