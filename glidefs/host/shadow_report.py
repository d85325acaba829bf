"""Describes a difference that shadow verify found: which bytes, and where the wrong ones came from.

The core names the source of the read: a position in the log, a slot of the block cache, or zeros. Here each
is looked at: is the record intact, does the slot's content match its hash, what do the packs hold, does the
log have newer data that the maps do not know?
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from glidefs.core.cache import BlockCache
from glidefs.core.gather import Gather, log_record, log_segments
from glidefs.core.shadow import ShadowDifference, Source
from glidefs.errors import GlideError
from glidefs.formats.pack import BLOCK, SECTOR, SECTORS_PER_BLOCK, payload_hash
from glidefs.manifest.keys import scoped_key
from glidefs.offline.reader import BlockReader, Piece
from glidefs.reading.reader import block_key
from glidefs.store.base import ObjectStore
from glidefs.volume import log_damage

if TYPE_CHECKING:
    from glidefs.volume.volume import Volume

PACKS_NAMED = 8
LOG_SEARCHED = 1 << 30
"""Bytes of log that are searched for newer data."""


class Reporter:
    """Describes differences. ``scope`` is that of the block cache's keys."""

    def __init__(self, cache: BlockCache, store: ObjectStore, scope: str) -> None:
        self._cache = cache
        self._store = store
        self._scope = scope

    def text(self, volume: Volume, found: ShadowDifference) -> str:
        """One line. Raises nothing that a store or a disk may do."""
        parts = [_where(found), f"read {found.got.hex()}, expected {found.want.hex()}"]
        if found.source in (Source.LOG, Source.LOG_ZERO):
            parts.append(_guarded(lambda: _log_source(volume, found)))
        else:
            if found.source is Source.CACHE:
                parts.append(_guarded(lambda: self._slot(volume, found)))
            else:
                parts.append("read as zeros of the base")
            parts.append(_guarded(lambda: self._packs(volume, found)))
            parts.append(_guarded(lambda: _log_lost(volume, found)))
        return "; ".join(part for part in parts if part)

    def _slot(self, volume: Volume, found: ShadowDifference) -> str:
        text = f"read from block cache slot {found.slot} (generation {found.generation}"
        if not found.key:
            return f"{text}), which was used for another block since"
        text += f", key {found.key.hex()})"
        (slot,) = self._cache.lookup([found.key])
        if slot is None:
            return f"{text}, which was evicted since"
        try:
            good = payload_hash(self._cache.read(slot)) == found.hash
        finally:
            self._cache.unpin(slot)
        if not good:
            return f"{text}: its content is not that of its hash, the cache's file is damaged"
        wanted = block_key(volume.manifest(self._store), found.sector // SECTORS_PER_BLOCK)
        if wanted is not None and self._scope == "prefix":
            wanted = scoped_key(wanted, volume.prefix)
        right = "the one" if wanted == found.key else "not the one"
        return f"{text}: its content is that of its hash, and it is {right} of the manifest in use"

    def _packs(self, volume: Volume, found: ShadowDifference) -> str:
        block, sector = divmod(found.sector, SECTORS_PER_BLOCK)
        reader = BlockReader(self._store, volume.prefix, volume.root)
        pieces = reader.pieces(block)
        if not pieces:
            return f"no pack of the manifest (sequence {volume.root.sequence}) has the block"
        named = ", ".join(_pack(piece, sector) for piece in pieces[:PACKS_NAMED])
        more = f" and {len(pieces) - PACKS_NAMED} more" if len(pieces) > PACKS_NAMED else ""
        at = found.offset - block * BLOCK
        stored = bytes(reader.read(block, 1)[at : at + len(found.want)])
        held = (
            "the expected bytes"
            if stored == found.want
            else "the bytes that were read"
            if stored == found.got
            else stored.hex()
        )
        return f"the store holds {held}; packs of the block, newest first: {named}{more}"


def _where(found: ShadowDifference) -> str:
    block, sector = divmod(found.sector, SECTORS_PER_BLOCK)
    many = f" and {found.count - 1} more after it" if found.count > 1 else ""
    return (
        f"block {block}, sector {sector} of it (sector {found.sector} of the volume){many}, "
        f"first at byte {found.offset % SECTOR} of the sector (offset {found.offset})"
    )


def _pack(piece: Piece, sector: int) -> str:
    if piece.entry.mask >> sector & 1:
        what = "has the sector"
    elif piece.entry.zero_mask >> sector & 1:
        what = "zeroes it"
    else:
        what = "others only"
    return f"{piece.ref.id.hex()} ({what})"


def _log_source(volume: Volume, found: ShadowDifference) -> str:
    if found.source is Source.LOG_ZERO and not found.segment:
        return "read as zeros, of which the log map says that the whole block is zero"
    zero = "read as zeros of" if found.source is Source.LOG_ZERO else "read from"
    text = f"{zero} log segment {found.segment} ({found.segment:016x}.seg), position {found.index}"
    record = log_record(volume.log_dir, volume.id, volume.log_id, found.segment, found.index)
    if record is None:
        return f"{text}, where the segment has no valid record now"
    text += f", record {record.index} of sectors {record.sector}+{record.count}"
    if not record.intact:
        return f"{text}: its data is not that of its hash, the segment's file is damaged"
    if not record.sector <= found.sector < record.sector + record.count:
        return f"{text}: it is intact, but of other sectors, the log map is wrong"
    return f"{text}: it is intact, so the log map names an old record, or this was written wrong"


def _log_lost(volume: Volume, found: ShadowDifference) -> str:
    """Whether the log has the sector, where the maps did not say so. What the store has is not looked at."""
    block, sector = divmod(found.sector, SECTORS_PER_BLOCK)
    seqs = [seq for seq in log_segments(volume.log_dir) if seq > volume.root.last_segment]
    if not seqs:
        return ""
    if volume.core.info().dirty_bytes > LOG_SEARCHED:
        return "the log is too long to be searched for it"
    with Gather(None, volume.log_dir, volume.id, volume.log_id, seqs[0], sent=seqs[0] - 1) as gather:
        log_damage.check(gather.damage, volume.log_dir)
        masks = (entry.mask | entry.zero_mask for entry in gather.entries() if entry.block == block)
        held = any(mask >> sector & 1 for mask in masks)
        held |= any(extent.block <= block < extent.block + extent.count for extent in gather.extents())
    text = f"segments {seqs[0]} to {seqs[-1]} of the log"
    return f"{text} have the sector, but the log map did not" if held else f"{text} do not have the sector"


def _guarded(look: Callable[[], str]) -> str:
    try:
        return look()
    except (GlideError, OSError) as error:
        return f"nothing more is known: {error}"
