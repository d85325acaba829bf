"""Which pack entries make up a block, and assembling the block from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from glidefs.core import payloads as core
from glidefs.formats.pack import BLOCK, FULL_MASK, Buffer, PackIndex, decode_payload
from glidefs.manifest.keys import merged_key
from glidefs.reading.fetch import Payloads, Wanted


class BlockPlan(NamedTuple):
    """The entries that show in a block, newest first, and the sectors that they give.

    ``covered`` are the sectors that one of them holds or zeroes; the others are zeros or, in a plan
    over some of the packs only, come from below.
    """

    block: int
    parts: tuple[Wanted, ...]
    mask: int
    zero_mask: int

    @property
    def whole(self) -> bool:
        """Whether the block is one payload as it is."""
        return len(self.parts) == 1 and self.parts[0].entry.mask == FULL_MASK

    def key(self) -> bytes:
        """The key in the block cache, in the scope of the host."""
        if self.whole:
            return self.parts[0].entry.hash
        return merged_key(part.entry for part in self.parts)

    def payloads(self) -> list[Wanted]:
        """What must be fetched."""
        return [part for part in self.parts if part.entry.mask]


def plan_block(block: int, indices: Sequence[PackIndex]) -> BlockPlan:
    """Look through ``indices``, newest first, until every sector is covered."""
    parts: list[Wanted] = []
    mask = zero_mask = 0
    for index in indices:
        entry = index.find(block)
        if entry is None:
            continue
        rest = FULL_MASK & ~(mask | zero_mask)
        data, zeros = entry.mask & rest, entry.zero_mask & rest
        if data or zeros:
            parts.append(Wanted(index.key, entry))
            mask |= data
            zero_mask |= zeros
            if mask | zero_mask == FULL_MASK:
                break
    return BlockPlan(block, tuple(parts), mask, zero_mask)


def assemble(plan: BlockPlan, payloads: Payloads) -> Buffer:
    """The 128 KiB of a block, every payload verified. Raises CorruptObject."""
    if plan.whole:
        part = plan.parts[0]
        return decode_payload(part.key, part.entry, payloads[part.key, part.entry.offset])
    out = bytearray(BLOCK)
    for part in reversed(plan.parts):
        entry = part.entry
        plain: Buffer = b""
        if entry.mask:
            plain = decode_payload(part.key, entry, payloads[part.key, entry.offset])
        core.overlay(out, entry.mask, entry.zero_mask, plain)
    return out
