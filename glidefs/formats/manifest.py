"""The manifest: which packs hold each chunk of a volume.

A manifest is a *root* and up to one *page* per 128 GiB of volume. Both are MessagePack documents in
the wrapping of :mod:`glidefs.formats.envelope` (magic ``GLMR`` and ``GLMP``), which says which root
or page it is. Field by field, a root is a map of the names in :class:`Root`, a page an array of the
fields of :class:`Page`, and a pack reference an array of the fields of :class:`PackRef`. A reader skips
root fields that it does not know; what a reader must not skip is announced by a flag. Encoding is
deterministic: equal manifests under one key are equal bytes.

Everything here is frozen once built and shared between threads and forks; nobody may change the
``chunks`` of a page in place.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Annotated, Literal, TypeVar

import msgspec
from blake3 import blake3
from msgspec import Meta

from glidefs.errors import CorruptObject, WrongObject
from glidefs.formats import envelope
from glidefs.formats.pack import BLOCK, CHUNK, ID_SIZE, MAX_PACK_SIZE, TRAILER_SIZE
from glidefs.names import NAME_PATTERN

PAGE_CHUNKS = 1024
"""Chunks in a page (128 GiB of volume)."""
PAGE_BYTES = PAGE_CHUNKS * CHUNK
MAX_SIZE = 1 << 60
"""Bytes of the largest volume."""
FORMAT = 2
"""Major version of roots and pages."""
MINOR = 0
KNOWN_FLAGS = 0
NO_ID = bytes(ID_SIZE)
"""The log id of roots without a log: bases, snapshots of them, volumes never attached."""

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
T = TypeVar("T")


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

    ``volume_id`` 16 bytes, ``size`` in bytes (a multiple of 512), ``sequence`` counts commits. ``page_ids``
    has one id per page of the size, ``b""`` for a page that is all zeros; a volume of one page may carry it
    as ``inline_page`` instead, and its only page id is then ``b""``. ``log_id`` is the fencing token;
    ``last_segment`` of that log is the last one included (0: none). ``nonce`` is drawn for each put: whoever
    reads a root knows whether it is the one that it tried to put. ``owner_host`` is the id of the host that
    has it, ``owner_node`` and ``epoch`` are labels for people. ``source`` says what it was forked from.
    ``removed_at`` (unix seconds) makes it a tombstone, and ``doomed`` says that it is about to be deleted:
    nobody takes its name meanwhile. ``content_hash`` (32 bytes, or none) says what a blessed image holds,
    whatever packs it is in: see :class:`ContentHash`.
    """

    volume_id: Id
    name: Annotated[str, Meta(pattern=NAME_PATTERN)]
    size: Annotated[int, Meta(gt=0, le=MAX_SIZE, multiple_of=512)]
    page_ids: tuple[PageId, ...]
    format: int = FORMAT
    flags: int = 0
    block_size: int = BLOCK
    sequence: Natural = 0
    nonce: Id = NO_ID
    inline_page: Page | None = None
    log_id: Id = NO_ID
    last_segment: Natural = 0
    owner_host: Id = NO_ID
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


def encode_root(root: Root, key: str) -> bytes:
    """The bytes of the object ``key``. Raises ValueError for a root that would not decode to itself."""
    if root.inline_page is not None:
        root = msgspec.structs.replace(root, inline_page=_sorted(root.inline_page))
    raw = _encoder.encode(root)
    # Read back what was written: a manifest that cannot be decoded is a lost volume.
    if _parse_root(raw) != root:
        raise ValueError("the root does not decode to itself")
    return envelope.seal(ROOT_MAGIC, FORMAT, MINOR, root.flags, raw, key.encode())


def encode_page(page: Page, volume_id: bytes, nonce: bytes) -> bytes:
    """The object's bytes, made unique by the volume and a new nonce (16 bytes each): see :func:`page_id`.

    Raises ValueError for a page that would not decode to itself.
    """
    if not len(volume_id) == len(nonce) == ID_SIZE:
        raise ValueError("an id or a nonce has not 16 bytes")
    page = _sorted(page)
    raw = _encoder.encode(page)
    if _parse_page(raw) != page:
        raise ValueError("the page does not decode to itself")
    return envelope.seal(PAGE_MAGIC, FORMAT, MINOR, 0, raw, volume_id + nonce)


def decode_root(key: str, data: bytes, where: str = "") -> Root:
    """The root that was put as ``key``, from its bytes; ``where`` they are, if not in the store.

    Raises CorruptObject; WrongObject for the root of another key.
    """
    where = where or key
    raw = envelope.unseal(where, data, ROOT_MAGIC, FORMAT, KNOWN_FLAGS, MAX_DOCUMENT, key.encode())
    return _read(_parse_root, raw, where, "root")


def decode_any_root(where: str, data: bytes) -> Root:
    """A root whose key is not known. Raises CorruptObject."""
    raw = envelope.unseal(where, data, ROOT_MAGIC, FORMAT, KNOWN_FLAGS, MAX_DOCUMENT, None)
    return _read(_parse_root, raw, where, "root")


def decode_page(where: str, data: bytes, expected: bytes) -> Page:
    """The page with the id ``expected``, from the bytes of an object or of a copy.

    Raises CorruptObject; WrongObject for another page.
    """
    raw = envelope.unseal(where, data, PAGE_MAGIC, FORMAT, KNOWN_FLAGS, MAX_DOCUMENT, None)
    if page_id(data) != expected:
        raise WrongObject(where, f"this is page {page_id(data).hex()}")
    return _read(_parse_page, raw, where, "page")


def _read(parse: Callable[[bytes], T], raw: bytes, where: str, kind: str) -> T:
    try:
        return parse(raw)
    except (ValueError, RecursionError) as error:
        raise CorruptObject(where, envelope.PREFIX_SIZE, f"manifest {kind}: {error}") from error


def page_id(data: bytes) -> bytes:
    """The id of 16 bytes of an encoded page: a hash of all its bytes, unique by the nonce among them.

    So a root that names a page names its content.
    """
    return envelope.identity(data)


def manifest_hash(data: bytes) -> bytes:
    """The 32 bytes that name an encoded manifest: the BLAKE3 of all of it."""
    return blake3(data).digest()
