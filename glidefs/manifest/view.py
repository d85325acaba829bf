"""A manifest with its pages and pack indices, loaded on demand through caches.

All of it is immutable, so it is cached by id for the whole host and shared by every fork.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from glidefs.errors import CorruptObject
from glidefs.formats.atomic import write_file_atomic
from glidefs.formats.manifest import EMPTY_PAGE, PAGE_CHUNKS, PackRef, Page, Root, decode_page
from glidefs.formats.pack import BLOCK, CHUNK_BLOCKS, PackIndex, decode_index
from glidefs.manifest.index_files import IndexFiles
from glidefs.manifest.lru import LoadingCache
from glidefs.names import pack_key, page_key
from glidefs.store.base import ObjectStore
from glidefs.store.checked import fetch_checked

_INDEX_OVERHEAD = 256


class MetaCache:
    """Pages and pack indices of the host, by id; ``files`` keeps copies of indices on the local disk."""

    def __init__(self, index_bytes: int, pages: int, files: IndexFiles | None = None) -> None:
        self._files = files
        self.indices: LoadingCache[bytes, PackIndex] = LoadingCache(
            index_bytes, lambda index: index.nbytes + _INDEX_OVERHEAD
        )
        self.pages: LoadingCache[bytes, Page] = LoadingCache(pages, lambda _: 1)

    def index(self, store: ObjectStore, prefix: str, ref: PackRef) -> PackIndex:
        """The index of a pack. Raises CorruptObject, NotFound, StoreError."""
        key = pack_key(prefix, ref.id.hex())
        return self.indices.get(
            ref.id, lambda: fetch_checked(store, key, lambda: self._load_index(store, prefix, ref))
        )

    def forget_index(self, ref: PackRef) -> None:
        """Keep no copy of the index of a pack, here or on the disk."""
        self.indices.discard(ref.id)
        if self._files is not None:
            self._files.forget(ref)

    def add_index(self, ref: PackRef, index: PackIndex, tail: bytes) -> None:
        """Keep the index of a pack that was just put; ``tail`` holds the pack's last bytes."""
        self.indices.put(ref.id, index)
        if self._files is not None:
            self._files.put(ref, tail)

    def page(self, store: ObjectStore, prefix: str, page_id: bytes, local: Path | None = None) -> Page:
        """A manifest page, from the copy in directory ``local`` if it is there."""
        key = page_key(prefix, page_id.hex())
        return self.pages.get(
            page_id, lambda: fetch_checked(store, key, lambda: _load_page(store, prefix, page_id, local))
        )

    def forget_page(self, page_id: bytes, local: Path | None) -> None:
        """Keep no copy of a page, here or in directory ``local``."""
        self.pages.discard(page_id)
        if local is not None:
            with contextlib.suppress(OSError):
                (local / page_id.hex()).unlink()

    def _load_index(self, store: ObjectStore, prefix: str, ref: PackRef) -> PackIndex:
        key = pack_key(prefix, ref.id.hex())
        kept = self._files.get(key, ref) if self._files is not None else None
        if kept is not None:
            return kept
        tail, size = store.get_suffix(key, ref.index_length)
        if size != ref.size:
            raise CorruptObject(key, size, f"the pack has {size} bytes, its manifest says {ref.size}")
        index = decode_index(key, tail, size, ref.id)
        if self._files is not None:
            self._files.put(ref, bytes(tail))
        return index


def _load_page(store: ObjectStore, prefix: str, page_id: bytes, local: Path | None) -> Page:
    name = page_id.hex()
    if local is not None:
        path = local / name
        try:
            return decode_page(str(path), path.read_bytes(), page_id)
        except (OSError, CorruptObject):
            pass  # the store has it
    key = page_key(prefix, name)
    data = store.get(key).data
    page = decode_page(key, data, page_id)
    if local is not None and local.parent.exists():
        with contextlib.suppress(OSError):  # a copy for a start while the store is away
            local.mkdir(exist_ok=True)
            write_file_atomic(local / name, data)
    return page


class Manifest:
    """A frozen root with its pages loaded as needed. Cheap to make: one per fault or commit."""

    __slots__ = ("_local", "_meta", "_store", "prefix", "root")

    def __init__(
        self, root: Root, prefix: str, meta: MetaCache, store: ObjectStore, local: Path | None = None
    ) -> None:
        self.root = root
        self.prefix = prefix
        self._meta = meta
        self._store = store
        self._local = local

    def page(self, number: int) -> Page:
        """Page ``number``; an absent one is empty."""
        root = self.root
        if root.inline_page is not None:
            return root.inline_page if number == 0 else EMPTY_PAGE
        if number >= len(root.page_ids) or not root.page_ids[number]:
            return EMPTY_PAGE
        return self._meta.page(self._store, self.prefix, root.page_ids[number], self._local)

    def packs(self, chunk: int) -> tuple[PackRef, ...]:
        """The packs of a chunk, oldest first; empty for a chunk of zeros."""
        page = self.page(chunk // PAGE_CHUNKS)
        return tuple(page.packs[i] for i in page.chunks.get(chunk % PAGE_CHUNKS, ()))

    def index(self, ref: PackRef) -> PackIndex:
        """The index of one of the packs."""
        return self._meta.index(self._store, self.prefix, ref)

    def cached_index(self, ref: PackRef) -> PackIndex | None:
        """The index of one of the packs, if no request is needed for it."""
        return self._meta.indices.peek(ref.id)

    def forget(self, chunk: int) -> None:
        """Keep nothing here of what a chunk is read by: its page, the indices of its packs, signed URLs.

        Raises as :meth:`packs`.
        """
        for ref in self.packs(chunk):
            self._meta.forget_index(ref)
            self._store.forget(pack_key(self.prefix, ref.id.hex()))
        number = chunk // PAGE_CHUNKS
        if self.root.inline_page is None and number < len(self.root.page_ids):
            self._meta.forget_page(self.root.page_ids[number], self._local)

    def present(self, first: int, last: int) -> Iterator[int]:
        """The chunks from ``first`` to ``last``, inclusive, that are not all zeros, ascending."""
        pages = 1 if self.root.inline_page is not None else len(self.root.page_ids)
        for number in range(first // PAGE_CHUNKS, min(last // PAGE_CHUNKS, pages - 1) + 1):
            start, chunks = number * PAGE_CHUNKS, self.page(number).chunks
            # Asked for every extent of an upload, most of them within one chunk: no look at the whole page.
            for chunk in range(max(first, start), min(last, start + PAGE_CHUNKS - 1) + 1):
                if chunk - start in chunks:
                    yield chunk

    def blocks_of(self, chunk: int) -> int:
        """Blocks of a chunk, fewer than usual in the last one of the volume."""
        return min(CHUNK_BLOCKS, block_count(self.root.size) - chunk * CHUNK_BLOCKS)


def block_count(size: int) -> int:
    """Blocks in a volume of ``size`` bytes; the last may be partial."""
    return -(-size // BLOCK)
