"""Compaction's work: the runs of some chunks become new packs, streamed with bounded memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from glidefs.compaction.plan import ChunkRun, MergedBlock, merge_blocks
from glidefs.core.payloads import extract, overlay
from glidefs.errors import CorruptObject
from glidefs.formats.manifest import PackRef
from glidefs.formats.pack import (
    BLOCK,
    EMPTY_HASH,
    HEADER_SIZE,
    MAX_ENTRIES,
    SECTOR,
    PackEntry,
    decode_payload,
    encode_payload,
    payload_hash,
)
from glidefs.manifest.commit import Replace
from glidefs.reading.fetch import Payloads, Wanted, fetch, plan_ranges
from glidefs.store.base import Buffer, ObjectStore
from glidefs.store.packs import BuiltPack

log = logging.getLogger(__name__)

WINDOW = 8 << 20
"""Stored bytes of input that are in memory at once."""
READ_GAP = 256 << 10
READ_LIMIT = 4 << 20

PutPack = Callable[[bytearray, list[PackEntry]], BuiltPack]


class Merged(NamedTuple):
    """Packs that the store has, and what they replace once committed."""

    packs: list[BuiltPack]
    replaces: list[Replace]

    @property
    def nbytes(self) -> int:
        """Bytes put."""
        return sum(pack.ref.size for pack in self.packs)


class _Output:
    """The pack being filled, and those put since the last :meth:`take`."""

    def __init__(self, put: PutPack, pack_bytes: int) -> None:
        self._put = put
        self._limit = pack_bytes
        self._area = bytearray()
        self._entries: list[PackEntry] = []
        self.packs: list[BuiltPack] = []

    def add(self, block: int, mask: int, zero_mask: int, stored: Buffer, digest: bytes) -> None:
        full = len(self._area) + len(stored) > self._limit or len(self._entries) >= MAX_ENTRIES
        if self._entries and full:
            self.flush()
        offset = HEADER_SIZE + len(self._area) if mask else 0
        self._entries.append(PackEntry(block, mask, zero_mask, offset, len(stored), digest))
        self._area += stored

    def flush(self) -> None:
        if self._entries:
            self.packs.append(self._put(self._area, self._entries))
            self._area, self._entries = bytearray(), []


class Merger:
    """Merges chunk runs of one volume. ``before_read`` is told the bytes of each read, and may wait."""

    def __init__(
        self,
        store: ObjectStore,
        put: PutPack,
        *,
        pack_bytes: int,
        level: int,
        before_read: Callable[[int], None],
    ) -> None:
        self._store = store
        self._level = level
        self._before_read = before_read
        self._put = put
        self._pack_bytes = pack_bytes

    def merge(self, runs: Sequence[ChunkRun]) -> Merged:
        """Put the merged packs of ``runs`` (ascending by chunk). Raises CorruptObject, StoreError."""
        output = _Output(self._put, self._pack_bytes)
        for run in runs:
            self._chunk(run, output)
        output.flush()
        return Merged(output.packs, [_replace(run, output.packs) for run in runs])

    def _chunk(self, run: ChunkRun, output: _Output) -> None:
        blocks, entries = merge_blocks(run)
        for window in _windows(blocks, entries):
            wanted = [
                Wanted(run.indices[part.source].key, entries[part.source][merged.block])
                for merged in window
                for part in merged.parts
            ]
            ranges = plan_ranges(wanted, READ_GAP, READ_LIMIT)
            self._before_read(sum(r.length for r in ranges))
            payloads = fetch(self._store, ranges, None)
            for merged in window:
                try:
                    self._block(run, merged, entries, payloads, output)
                except CorruptObject as error:
                    # Nothing of a block is in the output before all of it was verified.
                    again = self._fetch_again(run, merged, entries)
                    self._block(run, merged, entries, again, output)
                    log.warning("a block to compact verified when it was fetched again: %s", error)

    def _fetch_again(
        self, run: ChunkRun, merged: MergedBlock, entries: Sequence[dict[int, PackEntry]]
    ) -> Payloads:
        """The payloads of one block, fetched without anything kept about where they are."""
        wanted = [
            Wanted(run.indices[part.source].key, entries[part.source][merged.block]) for part in merged.parts
        ]
        for key in {part.key for part in wanted}:
            self._store.forget(key)
        return fetch(self._store, plan_ranges(wanted, READ_GAP, READ_LIMIT), None)

    def _block(
        self,
        run: ChunkRun,
        merged: MergedBlock,
        entries: Sequence[dict[int, PackEntry]],
        payloads: Payloads,
        output: _Output,
    ) -> None:
        block, parts, mask, zero_mask = merged
        if not parts:
            output.add(block, 0, zero_mask, b"", EMPTY_HASH)
            return
        inputs = [(run.indices[part.source].key, entries[part.source][block]) for part in parts]
        if len(parts) == 1 and parts[0].take == inputs[0][1].mask:
            key, entry = inputs[0]
            stored = payloads[key, entry.offset]
            decode_payload(key, entry, stored)  # never carry damage on under a new name
            output.add(block, mask, zero_mask, stored, entry.hash)
            return
        image = bytearray(BLOCK)
        raw = True
        for key, entry in reversed(inputs):
            overlay(image, entry.mask, 0, decode_payload(key, entry, payloads[key, entry.offset]))
            raw = raw and entry.stored == entry.plain
        plain = memoryview(bytearray(mask.bit_count() * SECTOR))
        extract(image, mask, plain)
        # What did not shrink in any of its parts is not tried again.
        stored_form: Buffer = plain if raw else encode_payload(plain, self._level)
        output.add(block, mask, zero_mask, stored_form, payload_hash(plain))


def _windows(
    blocks: Sequence[MergedBlock], entries: Sequence[dict[int, PackEntry]]
) -> Iterator[list[MergedBlock]]:
    window: list[MergedBlock] = []
    size = 0
    for merged in blocks:
        length = sum(entries[part.source][merged.block].stored for part in merged.parts)
        if window and size + length > WINDOW:
            yield window
            window, size = [], 0
        window.append(merged)
        size += length
    if window:
        yield window


def _replace(run: ChunkRun, packs: Sequence[BuiltPack]) -> Replace:
    new: tuple[PackRef, ...] = tuple(pack.ref for pack in packs if run.chunk in pack.chunks)
    return Replace(run.chunk, tuple(ref.id for ref in run.refs), new)
