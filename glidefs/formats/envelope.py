"""The wrapping that manifests, pages and hot sets share.

    0   4  magic, which names the kind
    4   2  major version, little-endian (an unknown one is refused)
    6   2  minor version (ignored by readers: additions that an old reader may skip)
    8   4  flags (an unknown bit is refused; encryption will be one)
    12  4  plain length in bytes
    16  n  one zstd frame of the MessagePack document
    -32 32 BLAKE3 of all bytes before

The checksum is verified before the plain length is believed, and that is bounded before memory is
allocated for it.
"""

from __future__ import annotations

import struct

from blake3 import blake3

from glidefs.errors import CorruptObject, NewerFormat
from glidefs.formats import compression

_PREFIX = struct.Struct("<4sHHII")
PREFIX_SIZE = _PREFIX.size
DIGEST_SIZE = 32


def seal(magic: bytes, major: int, minor: int, flags: int, plain: bytes) -> bytes:
    """The object's bytes for the document ``plain``."""
    head = _PREFIX.pack(magic, major, minor, flags, len(plain))
    body = head + compression.compress(plain)
    return body + blake3(body).digest()


def unseal(key: str, data: bytes, magic: bytes, major: int, known_flags: int, limit: int) -> bytes:
    """The document in ``data``, of at most ``limit`` bytes.

    Raises CorruptObject; of these NewerFormat where only the version or a flag is not known.
    """
    if len(data) < PREFIX_SIZE + DIGEST_SIZE:
        raise CorruptObject(key, len(data), "truncated")
    found, found_major, _minor, flags, length = _PREFIX.unpack_from(data)
    if found != magic:
        raise CorruptObject(key, 0, f"wrong magic {found!r}, expected {magic!r}")
    end = len(data) - DIGEST_SIZE
    view = memoryview(data)
    if blake3(view[:end]).digest() != view[end:]:
        raise CorruptObject(key, end, "checksum does not match")
    if found_major != major:
        raise NewerFormat(key, 4, f"format {found_major} is not known here; a newer GlideFS wrote it")
    if flags & ~known_flags:
        raise NewerFormat(key, 8, f"flags {flags:#x} are not known here; a newer GlideFS wrote it")
    if length > limit:
        raise CorruptObject(key, 12, f"document of {length} bytes, at most {limit}")
    try:
        return compression.decompress(view[PREFIX_SIZE:end], length)
    except compression.BadFrame as error:
        raise CorruptObject(key, PREFIX_SIZE, str(error)) from error
