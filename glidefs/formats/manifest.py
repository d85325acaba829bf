"""The manifest: which packs hold each chunk of a volume.

A manifest is a *root* and up to one *page* per 128 GiB of volume. Both are MessagePack documents in
the wrapping of :mod:`glidefs.formats.envelope` (magic ``GLMR`` and ``GLMP``). Field by field, a root
is a map of the names in :class:`Root`, a page an array of the fields of :class:`Page`, and a pack
reference an array of the fields of :class:`PackRef`. A reader skips root fields that it does not
know; what a reader must not skip is announced by a flag. Encoding is deterministic: equal manifests
are equal bytes.

Everything here is frozen once built and shared between threads and forks; nobody may change the
``chunks`` of a page in place.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec
from blake3 import blake3
from msgspec import Meta

from glidefs.errors import CorruptObject
from glidefs.formats import envelope
from glidefs.formats.pack import BLOCK, CHUNK, ID_SIZE, MAX_PACK_SIZE, TRAILER_SIZE, pack_id
from glidefs.names import NAME_PATTERN

PAGE_CHUNKS = 1024
"""Chunks in a page (128 GiB of volume)."""
PAGE_BYTES = PAGE_CHUNKS * CHUNK
MAX_SIZE = 1 << 60
"""Bytes of the largest volume."""
FORMAT = 1
"""Major version of roots and pages."""
MINOR = 0
KNOWN_FLAGS = 0
NO_ID = bytes(ID_SIZE)
"""The log id of what no log belongs to: bases, snapshots of them, volumes never attached."""

CONTENT_HASH_SIZE = 32

ROOT_MAGIC = b"GLMR"
PAGE_MAGIC = b"GLMP"
MAX_DOCUMENT = 256 << 20
"""Plain bytes of the largest root or page that is believed (2^60 bytes of volume: 144 MB of ids)."""

Id = Annotated[bytes, Meta(min_length=ID_SIZE, max_length=ID_SIZE)]
PageId = Annotated[bytes, Meta(max_length=ID_SIZE)]
Natural = Annotated[int, Meta(ge=0)]
MAX_LABEL = 1024
Label = Annotated[str, Meta(max_length=MAX_LABEL)]


class PackRef(msgspec.Struct, frozen=True, array_like=True):
    """A pack in the table of a page.

    ``size`` bytes of the object, ``index_length`` bytes of index and trailer at its end, ``level``
    the compaction tier that made it (0: an upload).
    """

    id: Id
    size: Annotated[int, Meta(gt=0, le=MAX_PACK_SIZE)]
    index_length: Annotated[int, Meta(ge=TRAILER_SIZE)]
    level: Annotated[int, Meta(ge=0, le=255)] = 0


class Page(msgspec.Struct, frozen=True, array_like=True):
    """128 GiB of a volume.

    ``chunks`` maps a chunk's number within the page to indices into ``packs``, oldest first. An
    absent chunk reads as zeros.
    """

    packs: tuple[PackRef, ...] = ()
    chunks: dict[Annotated[int, Meta(ge=0, lt=PAGE_CHUNKS)], tuple[Natural, ...]] = {}


EMPTY_PAGE = Page()


class Root(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=False):
    """The manifest root: the only mutable object of a volume.

    ``volume_id`` 16 bytes, ``size`` in bytes (a multiple of 512), ``sequence`` counts commits.
    ``page_ids`` has one id per page of the size, ``b""`` for a page that is all zeros; a volume of
    one page may carry it as ``inline_page`` instead, and its only page id is then ``b""``.
    ``log_id`` is the fencing token; ``last_segment`` of that log is the last one included (0: none).
    ``owner_node`` and ``epoch`` are labels for people. ``source`` says what it was forked from.
    ``removed_at`` (unix seconds) makes it a tombstone, and ``doomed`` says that who put that is about to
    delete it: nobody takes its name meanwhile. ``content_hash`` (32 bytes, or
    none) says what a blessed image holds, whatever packs it is in: see :class:`ContentHash`.
    """

    volume_id: Id
    name: Annotated[str, Meta(pattern=NAME_PATTERN)]
    size: Annotated[int, Meta(gt=0, le=MAX_SIZE, multiple_of=512)]
    page_ids: tuple[PageId, ...]
    format: int = FORMAT
    flags: int = 0
    block_size: int = BLOCK
    sequence: Natural = 0
    inline_page: Page | None = None
    log_id: Id = NO_ID
    last_segment: Natural = 0
    owner_node: Label = ""
    epoch: Natural = 0
    source: Label = ""
    transport: Label = "auto"
    read_only: bool = False
    flush: Literal["local", "store"] = "local"
    created_at: Natural = 0
    removed_at: Natural = 0
    doomed: bool = False
    content_hash: Annotated[bytes, Meta(max_length=CONTENT_HASH_SIZE)] = b""


_CONTENT = struct.Struct("<Q16s")
_encoder = msgspec.msgpack.Encoder()
_root_decoder = msgspec.msgpack.Decoder(Root)
_page_decoder = msgspec.msgpack.Decoder(Page)


class ContentHash:
    """The BLAKE3 that two images share exactly if they read the same.

    It is over, for each block that is not all zeros, in ascending order, the block's number (u64) and
    the BLAKE3-128 of its bytes; then the size of the image in bytes (u64). The last block is padded.
    """

    def __init__(self) -> None:
        self._hasher = blake3()
        self.blocks = 0
        """Blocks added so far."""

    def add(self, blocks: Sequence[int], hashes: Sequence[bytes]) -> None:
        """The next blocks and their hashes."""
        self.blocks += len(blocks)
        self._hasher.update(b"".join(map(_CONTENT.pack, blocks, hashes)))

    def digest(self, size: int) -> bytes:
        """The 32 bytes, for an image of ``size`` bytes."""
        hasher = self._hasher.copy()
        hasher.update(size.to_bytes(8, "little"))
        return hasher.digest()


def chunk_count(size: int) -> int:
    """Chunks in a volume of ``size`` bytes."""
    return -(-size // CHUNK)


def page_count(size: int) -> int:
    """Pages in a volume of ``size`` bytes."""
    return -(-size // PAGE_BYTES)


def _page_fault(page: Page, chunks: int = PAGE_CHUNKS) -> str | None:
    packs = len(page.packs)
    for ref in page.packs:
        if ref.index_length > ref.size:
            return f"index of pack {ref.id.hex()} is longer than the pack"
    for chunk, indices in page.chunks.items():
        if chunk >= chunks:
            return f"chunk {chunk} is beyond the end"
        if not indices:
            return f"chunk {chunk} lists no pack"
        if max(indices) >= packs:
            return f"chunk {chunk} refers to a pack that is not in the table"
        if len(set(indices)) != len(indices):
            return f"chunk {chunk} lists a pack twice"
    return None


def _root_fault(root: Root) -> str | None:
    if root.format != FORMAT or root.flags & ~KNOWN_FLAGS:
        return f"format {root.format} with flags {root.flags:#x} is not known here"
    if root.block_size != BLOCK:
        return f"block size {root.block_size}, expected {BLOCK}"
    pages = page_count(root.size)
    if len(root.page_ids) != pages:
        return f"{len(root.page_ids)} pages for a size that has {pages}"
    if any(len(page) not in (0, ID_SIZE) for page in root.page_ids):
        return "page id of a wrong length"
    if len(root.content_hash) not in (0, CONTENT_HASH_SIZE):
        return "content hash of a wrong length"
    if root.inline_page is None:
        return None
    if root.page_ids != (b"",):
        return "an inline page beside other pages"
    return _page_fault(root.inline_page, chunk_count(root.size))


def _sorted(page: Page) -> Page:
    """The page with its chunks in order, for a deterministic encoding (dicts keep insertion order)."""
    return Page(packs=page.packs, chunks=dict(sorted(page.chunks.items())))


def _parse_page(raw: bytes) -> Page:
    page = _page_decoder.decode(raw)
    if fault := _page_fault(page):
        raise ValueError(fault)
    return page


def _parse_root(raw: bytes) -> Root:
    root = _root_decoder.decode(raw)
    if fault := _root_fault(root):
        raise ValueError(fault)
    return root


def encode_root(root: Root) -> bytes:
    """The object's bytes. Raises ValueError for a root that would not decode to itself."""
    if root.inline_page is not None:
        root = msgspec.structs.replace(root, inline_page=_sorted(root.inline_page))
    raw = _encoder.encode(root)
    # Read back what was written: a manifest that cannot be decoded is a lost volume.
    if _parse_root(raw) != root:
        raise ValueError("the root does not decode to itself")
    return envelope.seal(ROOT_MAGIC, FORMAT, MINOR, root.flags, raw)


def encode_page(page: Page) -> bytes:
    """The object's bytes. Raises ValueError for a page that would not decode to itself."""
    page = _sorted(page)
    raw = _encoder.encode(page)
    if _parse_page(raw) != page:
        raise ValueError("the page does not decode to itself")
    return envelope.seal(PAGE_MAGIC, FORMAT, MINOR, 0, raw)


def decode_root(key: str, data: bytes) -> Root:
    """The root in an object's bytes. Raises CorruptObject."""
    raw = envelope.unseal(key, data, ROOT_MAGIC, FORMAT, KNOWN_FLAGS, MAX_DOCUMENT)
    try:
        return _parse_root(raw)
    except (ValueError, RecursionError) as error:
        raise CorruptObject(key, envelope.PREFIX_SIZE, f"manifest root: {error}") from error


def decode_page(key: str, data: bytes) -> Page:
    """The page in an object's bytes. Raises CorruptObject."""
    raw = envelope.unseal(key, data, PAGE_MAGIC, FORMAT, KNOWN_FLAGS, MAX_DOCUMENT)
    try:
        return _parse_page(raw)
    except (ValueError, RecursionError) as error:
        raise CorruptObject(key, envelope.PREFIX_SIZE, f"manifest page: {error}") from error


def page_id(content: bytes, volume_id: bytes, nonce: bytes) -> bytes:
    """A new id of 16 bytes for the encoded page ``content``; unique by its nonce, as a pack's is."""
    return pack_id(content, volume_id, nonce)


def manifest_hash(data: bytes) -> bytes:
    """The 32 bytes that name an encoded manifest: the BLAKE3 of all of it."""
    return blake3(data).digest()
