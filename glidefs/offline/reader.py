"""Blocks of a manifest, read with formats and store only: no engine, no cache except that of pack indices.

Every payload is verified. Export reads whole images with it; shadow verify (host/shadow.py) compares
what the engine reads with it, so it shares no code with the engine's reader above the formats.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

from glidefs import names
from glidefs.errors import CorruptObject
from glidefs.formats.manifest import EMPTY_PAGE, PAGE_CHUNKS, PackRef, Page, Root, decode_page
from glidefs.formats.pack import (
    BLOCK,
    CHUNK_BLOCKS,
    FULL_MASK,
    SECTOR,
    Buffer,
    PackEntry,
    PackIndex,
    decode_index,
    decode_payload,
)
from glidefs.store.base import ObjectStore
from glidefs.store.checked import fetch_checked, get_checked

INDEX_BUDGET = 64 << 20
"""Bytes of pack indices kept."""
PAGES_KEPT = 2
MAX_GAP = 64 << 10
"""Unwanted bytes between two payloads that one request may read."""
MAX_READ = 16 << 20


class Piece(NamedTuple):
    """The part of a block that one pack has."""

    ref: PackRef
    entry: PackEntry


class BlockReader:
    """Reads blocks of ``root``. Thread-safe: ``_lock`` guards the indices and pages that are kept."""

    def __init__(self, store: ObjectStore, prefix: str, root: Root) -> None:
        self._store = store
        self._prefix = prefix
        self._root = root
        self._indices: OrderedDict[bytes, PackIndex] = OrderedDict()
        self._index_bytes = 0
        self._pages: OrderedDict[int, Page] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def page_count(self) -> int:
        """Pages of the manifest; absent ones count."""
        return 1 if self._root.inline_page is not None else len(self._root.page_ids)

    def page(self, number: int) -> Page:
        """Page ``number``; an absent one is empty. Raises CorruptObject, NotFound, StoreError."""
        if self._root.inline_page is not None:
            return self._root.inline_page if number == 0 else EMPTY_PAGE
        if number >= len(self._root.page_ids) or not self._root.page_ids[number]:
            return EMPTY_PAGE
        with self._lock:
            if number in self._pages:
                self._pages.move_to_end(number)
                return self._pages[number]
        key = names.page_key(self._prefix, self._root.page_ids[number].hex())
        page_id = self._root.page_ids[number]
        page, _ = get_checked(self._store, key, lambda key, data: decode_page(key, data, page_id))
        with self._lock:
            self._pages[number] = page
            while len(self._pages) > PAGES_KEPT:
                self._pages.popitem(last=False)
        return page

    def packs(self, chunk: int) -> list[PackRef]:
        """The packs that may have data in a chunk, oldest first. Raises as :meth:`page`."""
        page = self.page(chunk // PAGE_CHUNKS)
        return [page.packs[index] for index in page.chunks.get(chunk % PAGE_CHUNKS, ())]

    def read(self, first: int, count: int) -> bytearray:
        """``count`` blocks from ``first``, 128 KiB each. Raises CorruptObject, NotFound, StoreError."""
        out = bytearray()
        while count:
            here = min(count, CHUNK_BLOCKS - first % CHUNK_BLOCKS)
            window = self.window(first, here, self.packs(first // CHUNK_BLOCKS))
            out += bytes(here * BLOCK) if window is None else window
            first, count = first + here, count - here
        return out

    def pieces(self, block: int) -> list[Piece]:
        """The parts of a block in all packs, newest first, hidden ones too. Raises as :meth:`read`."""
        found: list[Piece] = []
        for ref in reversed(self.packs(block // CHUNK_BLOCKS)):
            found += [Piece(ref, entry) for entry in self._index(ref).range(block, 1)]
        return found

    def window(self, first: int, count: int, refs: Sequence[PackRef]) -> bytearray | None:
        """Blocks of one chunk, whose packs are ``refs``; None if all are zeros. Raises as :meth:`read`."""
        layers: dict[int, list[Piece]] = {}
        covered: dict[int, int] = {}
        for ref in reversed(refs):
            for entry in self._index(ref).range(first, count):
                seen = covered.get(entry.block, 0)
                if (entry.mask | entry.zero_mask) & ~seen:
                    layers.setdefault(entry.block, []).append(Piece(ref, entry))
                    covered[entry.block] = seen | entry.mask | entry.zero_mask
        if not layers:
            return None
        window = bytearray(count * BLOCK)
        payloads = self._fetch([piece for pieces in layers.values() for piece in pieces if piece.entry.mask])
        for block, pieces in layers.items():
            at = (block - first) * BLOCK
            for piece in reversed(pieces):
                _overlay(window, at, piece.entry, payloads.get((piece.ref.id, block), b""))
        return window

    def _index(self, ref: PackRef) -> PackIndex:
        with self._lock:
            if ref.id in self._indices:
                self._indices.move_to_end(ref.id)
                return self._indices[ref.id]
        key = names.pack_key(self._prefix, ref.id.hex())
        index = fetch_checked(self._store, key, lambda: self._load_index(key, ref))
        with self._lock:
            if ref.id not in self._indices:
                self._indices[ref.id] = index
                self._index_bytes += index.nbytes
            while self._index_bytes > INDEX_BUDGET and len(self._indices) > 1:
                self._index_bytes -= self._indices.popitem(last=False)[1].nbytes
        return index

    def _load_index(self, key: str, ref: PackRef) -> PackIndex:
        tail, size = self._store.get_suffix(key, ref.index_length)
        if size != ref.size:
            raise CorruptObject(key, size, f"the pack has {size} bytes, the manifest says {ref.size}")
        return decode_index(key, tail, size, ref.id)

    def _fetch(self, pieces: list[Piece]) -> dict[tuple[bytes, int], Buffer]:
        """Read and verify payloads, neighbours in one pack with one request."""
        payloads: dict[tuple[bytes, int], Buffer] = {}
        pieces.sort(key=lambda piece: (piece.ref.id, piece.entry.offset))
        for run in _runs(pieces):
            key = names.pack_key(self._prefix, run[0].ref.id.hex())
            payloads.update(fetch_checked(self._store, key, partial(self._fetch_run, key, run)))
        return payloads

    def _fetch_run(self, key: str, run: list[Piece]) -> dict[tuple[bytes, int], Buffer]:
        start = run[0].entry.offset
        length = max(piece.entry.offset + piece.entry.stored for piece in run) - start
        data = memoryview(self._store.get_range(key, start, length))
        payloads: dict[tuple[bytes, int], Buffer] = {}
        for piece in run:
            at = piece.entry.offset - start
            stored = data[at : at + piece.entry.stored]
            payloads[piece.ref.id, piece.entry.block] = decode_payload(key, piece.entry, stored)
        return payloads


def _overlay(window: bytearray, at: int, entry: PackEntry, payload: Buffer) -> None:
    """Lay the sectors of `entry` over the block at `at`, its zero sectors too."""
    if entry.mask == FULL_MASK:
        window[at : at + BLOCK] = payload
        return
    taken = 0
    for sector in range(BLOCK // SECTOR):
        where = slice(at + sector * SECTOR, at + (sector + 1) * SECTOR)
        if entry.mask >> sector & 1:
            window[where] = payload[taken : taken + SECTOR]
            taken += SECTOR
        elif entry.zero_mask >> sector & 1:
            window[where] = bytes(SECTOR)


def _runs(pieces: list[Piece]) -> Iterator[list[Piece]]:
    """Split sorted pieces where the pack changes, the gap is wide or the request would be long."""
    run: list[Piece] = []
    for piece in pieces:
        if run:
            last, entry = run[-1], piece.entry
            gap = entry.offset - (last.entry.offset + last.entry.stored)
            long = entry.offset + entry.stored - run[0].entry.offset > MAX_READ
            if piece.ref.id != last.ref.id or gap > MAX_GAP or long:
                yield run
                run = []
        run.append(piece)
    if run:
        yield run
