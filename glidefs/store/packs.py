"""Putting packs: entries and their payloads in, one object in the store out."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence

import msgspec

from glidefs.formats.manifest import PackRef
from glidefs.formats.pack import (
    CHUNK_BLOCKS,
    HEADER_SIZE,
    ID_SIZE,
    TRAILER_SIZE,
    PackEntry,
    PackIndex,
    decode_index,
    encode_header,
    encode_index,
    encode_trailer,
    pack_id,
    payload_hash,
)
from glidefs.names import pack_key
from glidefs.store.base import Buffer


class BuiltPack(msgspec.Struct, frozen=True):
    """A pack that the store has: its reference, the chunks it has blocks of, its index.

    ``tail`` holds its last bytes: the index as it is stored, and the trailer.
    """

    ref: PackRef
    chunks: tuple[int, ...]
    index: PackIndex
    tail: bytes


def put_pack(
    put: Callable[[str, list[Buffer]], object],
    prefix: str,
    volume_id: bytes,
    area: Buffer,
    entries: Sequence[PackEntry],
    level: int,
) -> BuiltPack:
    """Put a pack of these entries, whose payloads are back to back in the bytes ``area``.

    ``level`` is the compaction tier. ``put`` stores an object, with whatever patience it has.
    """
    index = encode_index(entries)
    nonce = secrets.token_bytes(ID_SIZE)
    trailer = encode_trailer(index, len(entries), volume_id, nonce)
    new = pack_id(payload_hash(index), volume_id, nonce)
    key = pack_key(prefix, new.hex())
    size = HEADER_SIZE + len(area) + len(index) + TRAILER_SIZE
    put(key, [encode_header(), area, index, trailer])
    tail = index + trailer
    decoded = decode_index(key, tail, size, new)
    chunks = tuple(sorted({entry.block // CHUNK_BLOCKS for entry in entries}))
    return BuiltPack(PackRef(new, size, len(index) + TRAILER_SIZE, level), chunks, decoded, tail)
