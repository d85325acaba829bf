"""What a store has, read by the formats alone: without anything of what serves volumes."""

from __future__ import annotations

from collections.abc import Iterator

from fork_rig import PREFIX
from gc_rig import ClockStore
from history import SECTOR

from glidefs import names
from glidefs.formats.manifest import (
    EMPTY_PAGE,
    NO_ID,
    PAGE_CHUNKS,
    PackRef,
    Page,
    Root,
    decode_page,
    decode_root,
)
from glidefs.formats.pack import BLOCK, CHUNK_BLOCKS, PackEntry, PackIndex, decode_index, decode_payload

SECTORS = BLOCK // SECTOR


class Stored:
    """The objects of ``store`` under the prefix, without a request.

    Packs never change, so they are decoded once.
    """

    def __init__(self, store: ClockStore) -> None:
        self.store = store
        self._indices: dict[str, PackIndex] = {}
        self._payloads: dict[tuple[str, int], bytes] = {}

    def forget(self) -> None:
        """The store was emptied."""
        self._indices.clear()
        self._payloads.clear()

    def root(self, key: str) -> Root:
        return decode_root(key, self.store.data(key))

    def root_keys(self) -> list[str]:
        found = []
        for key in sorted(self.store.key_set()):
            match key.split("/"):
                case [_, "volumes", _, "manifest"] | [_, "volumes", _, "snapshots", _] | [_, "tags", _]:
                    found.append(key)
                case [_, "bases", _, "manifest"]:
                    found.append(key)
        return found

    def ages(self, keys: set[str]) -> dict[str, float]:
        return {key: self.store.now - self.store.head(key).last_modified for key in keys}

    def root_etags(self) -> dict[str, str | None]:
        return {key: self.store.etag_of(key) for key in self.root_keys()}

    def pages(self, root: Root) -> Iterator[tuple[int, Page]]:
        if root.inline_page is not None:
            yield 0, root.inline_page
        for number, page_id in enumerate(root.page_ids):
            if page_id:
                key = names.page_key(PREFIX, page_id.hex())
                yield number, decode_page(key, self.store.data(key), page_id)

    def named(self) -> set[str]:
        """The keys of what the roots name. A page that is gone raises KeyError."""
        found: set[str] = set()
        for key in self.root_keys():
            root = self.root(key)
            found |= {names.page_key(PREFIX, page_id.hex()) for page_id in root.page_ids if page_id}
            for _, page in self.pages(root):
                found |= {names.pack_key(PREFIX, ref.id.hex()) for ref in page.packs}
        return found

    def objects(self) -> set[str]:
        """The keys of packs and pages."""
        return self.store.key_set(f"{PREFIX}/packs/") | self.store.key_set(f"{PREFIX}/pages/")

    def check_named(self) -> None:
        """Nothing that a root names is gone; copies of roots belong to nobody."""
        lost = self.named() - self.objects()
        assert not lost, f"deleted, and still named: {lost}"
        for key in self.root_keys():
            root = self.root(key)
            if "/snapshots/" in key or "/tags/" in key or "/bases/" in key:
                assert (root.log_id, root.owner_node) == (NO_ID, ""), f"{key} has an owner"

    def stored(self, key: str, sectors: list[int]) -> dict[int, bytes]:
        """What the root under ``key`` says that these sectors hold."""
        return self.contents(self.root(key), sectors)

    def contents(self, root: Root, sectors: list[int]) -> dict[int, bytes]:
        """The same of a root that need not be in the store any more, what it names must be."""
        pages = dict(self.pages(root))
        found: dict[int, bytes] = {}
        for sector in sectors:
            block = sector // SECTORS
            number, chunk = divmod(block // CHUNK_BLOCKS, PAGE_CHUNKS)
            page = pages.get(number, EMPTY_PAGE)
            refs = [page.packs[index] for index in page.chunks.get(chunk, ())]
            found[sector] = self._sector(refs, block, sector % SECTORS)
        return found

    def _sector(self, refs: list[PackRef], block: int, at: int) -> bytes:
        for ref in reversed(refs):
            key = names.pack_key(PREFIX, ref.id.hex())
            for entry in self._index(key, ref).range(block, 1):
                if entry.mask >> at & 1:
                    payload = self._payload(key, entry)
                    skip = (entry.mask & ((1 << at) - 1)).bit_count() * SECTOR
                    return payload[skip : skip + SECTOR]
                if entry.zero_mask >> at & 1:
                    return bytes(SECTOR)
        return bytes(SECTOR)

    def _index(self, key: str, ref: PackRef) -> PackIndex:
        data = self.store.data(key)
        if key not in self._indices:
            self._indices[key] = decode_index(key, data[-ref.index_length :], len(data), ref.id)
        return self._indices[key]

    def _payload(self, key: str, entry: PackEntry) -> bytes:
        found = self._payloads.get((key, entry.block))
        if found is None:
            data = self.store.data(key)[entry.offset : entry.offset + entry.stored]
            found = self._payloads[key, entry.block] = bytes(decode_payload(key, entry, data))
        return found
