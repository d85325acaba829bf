"""The checkpoint of a bless under way: the packs that the store has of the image so far.

One MessagePack array in the wrapping of :mod:`glidefs.formats.envelope` (magic ``GLBL``): when the
bless began (unix seconds), then the packs in the order of the image, each an array of its reference
and the time before it was put; when this was written, by the same clock; and 16 random bytes, so that
no two checkpoints are equal bytes. The packs hold whole blocks, ascending from each pack to the next.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from typing import Annotated

import msgspec
from msgspec import Meta

from glidefs.errors import CorruptObject
from glidefs.formats import envelope
from glidefs.formats.manifest import PackRef
from glidefs.formats.pack import ID_SIZE

BLESSING_MAGIC = b"GLBL"
FORMAT = 2
MINOR = 1
KNOWN_FLAGS = 0
MAX_DOCUMENT = 64 << 20


class PutPack(msgspec.Struct, frozen=True, array_like=True):
    """A pack and when it was put (unix seconds): gc may delete an old one that no manifest names."""

    ref: PackRef
    put_at: Annotated[int, Meta(ge=0)]


class Blessing(msgspec.Struct, frozen=True, array_like=True):
    """What there is of an image in the store."""

    started_at: Annotated[int, Meta(ge=0)]
    packs: tuple[PutPack, ...] = ()
    saved_at: Annotated[int, Meta(ge=0)] = 0
    nonce: Annotated[bytes, Meta(max_length=ID_SIZE)] = b""


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Blessing)


def make_blessing(started_at: int, packs: Iterable[PutPack], saved_at: int) -> Blessing:
    """A checkpoint that is unlike any other. Times in unix seconds, by one clock."""
    return Blessing(started_at, tuple(packs), saved_at, secrets.token_bytes(ID_SIZE))


def encode_blessing(blessing: Blessing, key: str) -> bytes:
    """The bytes of the object ``key``."""
    return envelope.seal(BLESSING_MAGIC, FORMAT, MINOR, 0, _encoder.encode(blessing), key.encode())


def decode_blessing(key: str, data: bytes, where: str = "") -> Blessing:
    """The checkpoint in an object's bytes. Raises CorruptObject."""
    raw = envelope.unseal(where or key, data, BLESSING_MAGIC, FORMAT, KNOWN_FLAGS, MAX_DOCUMENT, key.encode())
    try:
        return _decoder.decode(raw)
    except (ValueError, RecursionError) as error:
        raise CorruptObject(where or key, envelope.PREFIX_SIZE, f"blessing: {error}") from error
