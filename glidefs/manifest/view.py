"""A manifest with its pages and pack indices, which are loaded on demand through the caches of the host."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from glidefs.formats.manifest import EMPTY_PAGE, PAGE_CHUNKS, PackRef, Page, Root
from glidefs.formats.pack import BLOCK, CHUNK_BLOCKS, PackIndex
from glidefs.manifest.cache import MetaCache
from glidefs.names import pack_key
from glidefs.store.base import ObjectStore


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

    def beside(self, root: Root) -> Manifest:
        """The manifest of another root under the same prefix; no copy of its pages is kept on the disk."""
        return Manifest(root, self.prefix, self._meta, self._store)

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

    def ready(self, chunk: int) -> list[PackIndex] | None:
        """The indices of a chunk's packs, newest first, if no request is needed for any of it."""
        number = chunk // PAGE_CHUNKS
        root = self.root
        page: Page | None = EMPTY_PAGE
        if root.inline_page is not None:
            page = root.inline_page if number == 0 else EMPTY_PAGE
        elif number < len(root.page_ids) and root.page_ids[number]:
            page = self._meta.pages.peek(root.page_ids[number])
        if page is None:
            return None
        found: list[PackIndex] = []
        for i in reversed(page.chunks.get(chunk % PAGE_CHUNKS, ())):
            index = self._meta.indices.peek(page.packs[i].id)
            if index is None:
                return None
            found.append(index)
        return found

    def forget(self, chunk: int) -> None:
        """Drop everything here that a chunk is read with: its page, the indices of its packs, signed URLs.

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
