"""The pack: one immutable object with the compressed blocks and part-blocks of an upload.

All integers are little-endian; all offsets count from the first byte of the object.

    header    16 bytes
        0   4  magic "GLPK"
        4   2  major version (an unknown one is refused)
        6   2  minor version (ignored by readers)
        8   4  flags (an unknown bit is refused)
        12  4  block size in bytes
    payloads  back to back, in any order
        each is either the plain sectors or one zstd frame of them, whichever is shorter; it is
        plain exactly if its stored length is 4096 * popcount(sector mask)
    index     one zstd frame of the entries below, which states its plain size
    trailer   60 bytes
        0   4  length of the index frame in bytes
        4   4  number of entries
        8  16  BLAKE3-128 of the index frame
        24 16  id of the volume that it was made for
        40 16  nonce
        56  4  magic "GLI2" ("GLIX" until format 1)

    entry     40 bytes, in strictly ascending order of block
        0   8  block: which block of the volume
        8   4  sector mask: bit i = sector i of the block is in the payload, in ascending order
        12  4  zero mask: bit i = sector i reads as zeros; disjoint from the sector mask
        16  4  offset of the payload, 0 if there is none
        20  4  stored length of the payload, 0 if there is none
        24 16  BLAKE3-128 of the plain payload (of the empty string if there is none)

A reader fetches index and trailer with one suffix range of :func:`index_length` bytes, and so never
sees the header: a version or flag that changes how the index is read changes the magic of the
trailer too. The checksum of the index is verified before any length in it is believed; that of a
payload covers plain bytes, so it also catches a store that answers with other bytes of the pack.

**The id of a pack is evidence.** It is a hash of the last three fields before the magic
(:func:`pack_id`), so whoever has the id from a manifest knows the one index that belongs to it, and by
that every payload: the pack of another volume in its place is a :class:`WrongObject`.
"""

from __future__ import annotations

import struct
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from blake3 import blake3

from glidefs.errors import CorruptObject, NewerFormat, OlderFormat, WrongObject
from glidefs.formats import compression

SECTOR = 4096
"""Bytes in a sector."""
BLOCK = 131072
"""Bytes in a block."""
SECTORS_PER_BLOCK = BLOCK // SECTOR
CHUNK_BLOCKS = 1024
"""Blocks in a chunk (128 MiB)."""
CHUNK = CHUNK_BLOCKS * BLOCK
"""Bytes in a chunk."""
PACK_TARGET = 32 << 20
"""Bytes at which a builder closes a pack and begins another."""
FULL_MASK = (1 << SECTORS_PER_BLOCK) - 1
"""The sector mask of a whole block."""

PACK_MAGIC = b"GLPK"
TRAILER_MAGIC = b"GLI2"
TRAILER_MAGIC_1 = b"GLIX"
PACK_MAJOR = 2
PACK_MINOR = 0
KNOWN_FLAGS = 0

HEADER_SIZE = 16
TRAILER_SIZE = 60
ENTRY_SIZE = 40
HASH_SIZE = 16
ID_SIZE = 16

MAX_ENTRIES = 1 << 18
"""Entries in one pack (10 MiB of index); a builder begins another pack before it has more."""
MAX_INDEX_FRAME = MAX_ENTRIES * ENTRY_SIZE + (1 << 16)
MAX_BLOCK = 1 << 43
"""Bound of block numbers: 2^60 bytes of volume."""
MAX_PACK_SIZE = (1 << 32) - 1
"""Offsets are 32 bits wide."""

_HEADER = struct.Struct("<4sHHII")
_TRAILER = struct.Struct("<II16s16s16s4s")
_ENTRY = struct.Struct("<QIIII16s")
_MASKS = struct.Struct("<QII24x")
_BLOCK_EVERY = ENTRY_SIZE // 8

Buffer = bytes | bytearray | memoryview


class PackEntry(NamedTuple):
    """Where one block (or part of one) is in a pack.

    ``mask`` and ``zero_mask`` are sets of sectors, ``offset`` and ``stored`` bytes in the object,
    ``hash`` the BLAKE3-128 of the plain payload.
    """

    block: int
    mask: int
    zero_mask: int
    offset: int
    stored: int
    hash: bytes

    @property
    def plain(self) -> int:
        """Bytes of the payload once decompressed."""
        return self.mask.bit_count() * SECTOR


def payload_hash(plain: Buffer) -> bytes:
    """BLAKE3-128 of a plain payload: its identity in packs and in the block cache."""
    return blake3(plain).digest(length=HASH_SIZE)


EMPTY_HASH = payload_hash(b"")
"""The hash of an entry without payload (zero mask only)."""


class PackIndex:
    """The index of one pack, kept as one ``bytes`` of fixed records.

    Immutable and shared by every volume that refers to the pack. Entries become Python objects
    only when asked for: a cached index costs its bytes, not a tuple per block.
    """

    __slots__ = ("_blocks", "_count", "_data", "key")

    def __init__(self, key: str, data: bytes) -> None:
        """``data`` is validated records, as :func:`decode_index` has them."""
        self.key = key
        self._data = data
        self._count = len(data) // ENTRY_SIZE
        # The block numbers, as a view: bisect goes through it without a call of Python.
        self._blocks = memoryview(data).cast("Q")[::_BLOCK_EVERY]

    def __len__(self) -> int:
        return self._count

    @property
    def records(self) -> bytes:
        """The entries as they are in the index, ascending by block."""
        return self._data

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the records take."""
        return len(self._data)

    def _at(self, i: int) -> PackEntry:
        return PackEntry._make(_ENTRY.unpack_from(self._data, i * ENTRY_SIZE))

    def _lower_bound(self, block: int) -> int:
        return bisect_left(self._blocks, block)

    def find(self, block: int) -> PackEntry | None:
        """The entry of ``block``, or None."""
        i = self._lower_bound(block)
        if i == self._count:
            return None
        entry = self._at(i)
        return entry if entry.block == block else None

    def range(self, first_block: int, count: int) -> Iterator[PackEntry]:
        """The entries of blocks ``first_block`` up to ``first_block + count``, ascending."""
        i = self._lower_bound(first_block)
        while i < self._count:
            entry = self._at(i)
            if entry.block >= first_block + count:
                return
            yield entry
            i += 1

    def masks(self, first_block: int, count: int) -> Iterator[tuple[int, int, int]]:
        """(block, sector mask, zero mask) of the entries of a range of blocks, ascending."""
        first, end = self._lower_bound(first_block), self._lower_bound(first_block + count)
        return _MASKS.iter_unpack(memoryview(self._data)[first * ENTRY_SIZE : end * ENTRY_SIZE])

    def entries(self) -> Iterator[PackEntry]:
        """All entries, ascending by block."""
        return map(PackEntry._make, _ENTRY.iter_unpack(self._data))


def encode_header() -> bytes:
    """The first bytes of a pack."""
    return _HEADER.pack(PACK_MAGIC, PACK_MAJOR, PACK_MINOR, 0, BLOCK)


def check_header(key: str, head: Buffer) -> None:
    """Refuse a pack that this version cannot read. ``head`` is the object's first bytes.

    Raises CorruptObject for anything that is not a pack of a known major version and known flags.
    """
    if len(head) < HEADER_SIZE:
        raise CorruptObject(key, len(head), "too short for a pack header")
    magic, major, _minor, flags, block = _HEADER.unpack_from(head)
    if magic != PACK_MAGIC:
        raise CorruptObject(key, 0, "not a pack (wrong magic)")
    if major < PACK_MAJOR:
        raise OlderFormat(key, 4, major, PACK_MAJOR)
    if major > PACK_MAJOR:
        raise NewerFormat(key, 4, f"pack format {major} is not known here; a newer GlideFS wrote it")
    if flags & ~KNOWN_FLAGS:
        raise NewerFormat(key, 8, f"pack flags {flags:#x} are not known here; a newer GlideFS wrote it")
    if block != BLOCK:
        raise CorruptObject(key, 12, f"block size {block}, expected {BLOCK}")


def encode_payload(plain: Buffer, level: int = compression.DEFAULT_LEVEL) -> bytes:
    """The stored form of ``plain`` (a multiple of SECTOR bytes): a zstd frame, or raw if not shorter."""
    frame = compression.compress(plain, level)
    return frame if len(frame) < len(plain) else bytes(plain)


def _entry_fault(entry: PackEntry, payload_end: int) -> str | None:
    """What is wrong with one entry, if anything."""
    block, mask, zero_mask, offset, stored, _hash = entry
    if block >= MAX_BLOCK:
        return "block number out of bounds"
    if mask & zero_mask:
        return "sector mask and zero mask overlap"
    if not mask:
        if not zero_mask:
            return "entry says nothing"
        return "payload without sectors" if stored or offset else None
    if not 0 < stored <= mask.bit_count() * SECTOR:
        return "stored length out of bounds"
    if offset < HEADER_SIZE or offset + stored > payload_end:
        return "payload outside of the payload area"
    return None


def encode_records(entries: Iterable[PackEntry]) -> bytes:
    """The plain index of ``entries``, which are sorted here. Raises ValueError for illegal ones."""
    ordered = sorted(entries)
    if len(ordered) > MAX_ENTRIES:
        raise ValueError(f"{len(ordered)} entries in one pack, at most {MAX_ENTRIES}")
    last = -1
    for entry in ordered:
        fault = _entry_fault(entry, MAX_PACK_SIZE)
        if len(entry.hash) != HASH_SIZE:
            fault = "hash is not 16 bytes"
        if entry.block <= last:
            fault = "block appears twice"
        if fault:
            raise ValueError(f"block {entry.block}: {fault}")
        last = entry.block
    return b"".join(_ENTRY.pack(*entry) for entry in ordered)


def encode_index(entries: Iterable[PackEntry]) -> bytes:
    """The index frame of ``entries``. Raises ValueError for illegal ones."""
    return encode_frame(encode_records(entries))


def encode_frame(records: bytes) -> bytes:
    """The index frame of plain records, decompressed again to see: the log that could say it goes.

    Raises CorruptObject if it does not say what it should.
    """
    frame = compression.compress(records)
    if compression.decompress(frame, len(records)) != records:
        raise CorruptObject("a new pack", 0, "its index does not decompress to what it was")
    return frame


def encode_trailer(index: bytes, count: int, volume_id: bytes, nonce: bytes) -> bytes:
    """The last bytes of a pack, for the index frame ``index`` of ``count`` entries.

    ``volume_id`` and ``nonce`` are those of its id: see :func:`pack_id`.
    """
    return _TRAILER.pack(len(index), count, payload_hash(index), volume_id, nonce, TRAILER_MAGIC)


def index_length(index: bytes) -> int:
    """Bytes of index and trailer together: what a suffix GET reads and a manifest records."""
    return len(index) + TRAILER_SIZE


def pack_id(index_hash: bytes, volume_id: bytes, nonce: bytes) -> bytes:
    """The id of the pack with an index of this BLAKE3-128, made for this volume: all three 16 bytes.

    The nonce, drawn for each pack, makes it unique even for equal content, so that an id is never reused
    and the grace period of gc means something. Raises ValueError for fields of another length.
    """
    if not len(index_hash) == len(volume_id) == len(nonce) == ID_SIZE:
        raise ValueError("a hash, an id or a nonce has not 16 bytes")
    return blake3(index_hash + volume_id + nonce).digest(length=ID_SIZE)


def rename(pack: Buffer, volume_id: bytes, nonce: bytes) -> tuple[bytes, list[Buffer]]:
    """Another id for the same content: that id, and the parts of the object that has it.

    ``pack`` is a whole pack whose index was verified.
    """
    view = memoryview(pack)
    end = len(view) - TRAILER_SIZE
    length, count, digest, _, _, magic = _TRAILER.unpack_from(view, end)
    trailer = _TRAILER.pack(length, count, digest, volume_id, nonce, magic)
    return pack_id(digest, volume_id, nonce), [view[:end], trailer]


def _check_records(key: str, records: bytes, payload_end: int, where: int) -> None:
    last = -1
    for raw in _ENTRY.iter_unpack(records):
        entry = PackEntry._make(raw)
        fault = "entries are not in order" if entry.block <= last else _entry_fault(entry, payload_end)
        if fault:
            raise CorruptObject(key, where, f"index entry of block {entry.block}: {fault}")
        last = entry.block


def decode_index(key: str, tail: Buffer, object_size: int, expected: bytes | None) -> PackIndex:
    """The index of the pack with the id ``expected`` (None: of any), from the last bytes of the object.

    ``tail`` holds at least index and trailer (more is fine), ``object_size`` is that of the whole
    object in bytes. Raises CorruptObject for anything that is not a well-formed index, of these WrongObject
    for that of another pack.
    """
    if not HEADER_SIZE + TRAILER_SIZE <= object_size <= MAX_PACK_SIZE:
        raise CorruptObject(key, object_size, "no pack has this size")
    if not TRAILER_SIZE <= len(tail) <= object_size:
        raise CorruptObject(key, object_size, f"read {len(tail)} bytes for the index, which cannot hold it")
    trailer_at = object_size - TRAILER_SIZE
    length, count, digest, volume_id, nonce, magic = _TRAILER.unpack_from(tail, len(tail) - TRAILER_SIZE)
    if magic == TRAILER_MAGIC_1:
        raise OlderFormat(key, object_size - 4, 1, PACK_MAJOR)
    if magic != TRAILER_MAGIC:
        raise CorruptObject(key, object_size - 4, "not a pack of a known format (wrong trailer magic)")
    if length > min(len(tail) - TRAILER_SIZE, trailer_at - HEADER_SIZE, MAX_INDEX_FRAME):
        raise CorruptObject(key, trailer_at, f"index of {length} bytes does not fit what was read")
    if count > MAX_ENTRIES:
        raise CorruptObject(key, trailer_at + 4, f"{count} index entries, at most {MAX_ENTRIES}")
    index_at = trailer_at - length
    start = len(tail) - TRAILER_SIZE - length
    frame = memoryview(tail)[start : start + length]
    if payload_hash(frame) != digest:
        raise CorruptObject(key, index_at, "checksum of the index does not match")
    found = pack_id(digest, volume_id, nonce)
    if expected is not None and found != expected:
        raise WrongObject(key, f"this is pack {found.hex()}, made for volume {volume_id.hex()}")
    try:
        records = compression.decompress(frame, count * ENTRY_SIZE)
    except compression.BadFrame as error:
        raise CorruptObject(key, index_at, f"index: {error}") from error
    _check_records(key, records, index_at, index_at)
    return PackIndex(key, records)


def decode_payload(key: str, entry: PackEntry, stored: Buffer) -> Buffer:
    """The plain sectors of ``entry``, from the stored bytes at its offset; verified.

    The result has ``entry.plain`` bytes; it is ``stored`` itself where that is raw. Raises CorruptObject.
    """
    plain_length = entry.plain
    if len(stored) != entry.stored or len(stored) > plain_length:
        raise CorruptObject(key, entry.offset, f"{len(stored)} bytes where {entry.stored} are stored")
    plain = stored
    if len(stored) < plain_length:
        try:
            plain = compression.decompress(stored, plain_length)
        except compression.BadFrame as error:
            raise CorruptObject(key, entry.offset, f"payload of block {entry.block}: {error}") from error
    if payload_hash(plain) != entry.hash:
        raise CorruptObject(key, entry.offset, f"checksum of block {entry.block} does not match")
    return plain
