"""Putting packs: entries and their payloads in, one object in the store out."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence

import msgspec

from glidefs.formats.manifest import PackRef
from glidefs.formats.pack import (
    CHUNK_BLOCKS,
    ENTRY_SIZE,
    ID_SIZE,
    PackEntry,
    PackIndex,
    encode_frame,
    encode_header,
    encode_records,
    encode_trailer,
    pack_id,
    payload_hash,
)
from glidefs.names import pack_key
from glidefs.store.base import Buffer, body_length


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
    chunks = tuple(sorted({entry.block // CHUNK_BLOCKS for entry in entries}))
    body: list[Buffer] = [encode_header(), area]
    return put_body(put, prefix, volume_id, body, encode_records(entries), chunks, level)


def put_body(
    put: Callable[[str, list[Buffer]], object],
    prefix: str,
    volume_id: bytes,
    body: list[Buffer],
    records: bytes,
    chunks: tuple[int, ...],
    level: int,
) -> BuiltPack:
    """Put a pack: ``body`` is header and payloads, ``records`` its plain index, ``chunks`` those it has."""
    index = encode_frame(records)
    nonce = secrets.token_bytes(ID_SIZE)
    tail = index + encode_trailer(index, len(records) // ENTRY_SIZE, volume_id, nonce)
    new = pack_id(payload_hash(index), volume_id, nonce)
    key = pack_key(prefix, new.hex())
    put(key, [*body, tail])
    ref = PackRef(new, body_length(body) + len(tail), len(tail), level)
    return BuiltPack(ref, chunks, PackIndex(key, records), tail)
