"""The wrapping that manifests, pages, hot sets, checkpoints and gc states share.

    0   4  magic, which names the kind
    4   2  major version, little-endian (an unknown one is refused)
    6   2  minor version (ignored by readers: additions that an old reader may skip)
    8   4  flags (an unknown bit is refused; encryption will be one)
    12  4  plain length in bytes
    16  2  length of the label
    18  l  label: which object this is
    .   n  one zstd frame of the MessagePack document
    -32 32 BLAKE3 of all bytes before

The label of an object with a name is the key that it was put under, in UTF-8. A reader compares it
with the key that it asked for, so a whole and valid object in the place of another is a
:class:`WrongObject` and never somebody else's data. The label of a page is what its id is made
unique with; the id itself is the first half of the checksum (:func:`identity`).

The checksum is verified before the plain length is believed, and that is bounded before memory is
allocated for it.
"""

from __future__ import annotations

import struct

from blake3 import blake3

from glidefs.errors import CorruptObject, NewerFormat, OlderFormat, WrongObject
from glidefs.formats import compression

_PREFIX = struct.Struct("<4sHHII")
_LABEL_LENGTH = struct.Struct("<H")
PREFIX_SIZE = _PREFIX.size + _LABEL_LENGTH.size
DIGEST_SIZE = 32
IDENTITY_SIZE = 16
MAX_LABEL = 2048


def seal(magic: bytes, major: int, minor: int, flags: int, plain: bytes, label: bytes) -> bytes:
    """The object's bytes for the document ``plain``."""
    if not 0 < len(label) <= MAX_LABEL:
        raise ValueError(f"a label of {len(label)} bytes")
    head = _PREFIX.pack(magic, major, minor, flags, len(plain)) + _LABEL_LENGTH.pack(len(label)) + label
    body = head + compression.compress(plain)
    return body + blake3(body).digest()


def identity(data: bytes) -> bytes:
    """16 bytes that are another's only if all bytes of the sealed object are: the id of a page."""
    return bytes(data[-DIGEST_SIZE : IDENTITY_SIZE - DIGEST_SIZE])


def label_of(data: bytes) -> bytes:
    """The label that a sealed object says it has; not verified."""
    if len(data) < PREFIX_SIZE:
        return b""
    (length,) = _LABEL_LENGTH.unpack_from(data, _PREFIX.size)
    return bytes(data[PREFIX_SIZE : PREFIX_SIZE + length])


def unseal(
    where: str, data: bytes, magic: bytes, major: int, known_flags: int, limit: int, label: bytes | None
) -> bytes:
    """The document in ``data``, of at most ``limit`` bytes, which must carry ``label`` (None: any).

    ``where`` names the object in errors. Raises CorruptObject; of these WrongObject where it is another
    object of its kind, NewerFormat and OlderFormat where only the version or a flag is not known.
    """
    if len(data) < PREFIX_SIZE + DIGEST_SIZE:
        raise CorruptObject(where, len(data), "truncated")
    found, found_major, _minor, flags, length = _PREFIX.unpack_from(data)
    if found != magic:
        raise CorruptObject(where, 0, f"wrong magic {found!r}, expected {magic!r}")
    end = len(data) - DIGEST_SIZE
    view = memoryview(data)
    if blake3(view[:end]).digest() != view[end:]:
        raise CorruptObject(where, end, "checksum does not match")
    if found_major < major:
        raise OlderFormat(where, 4, found_major, major)
    if found_major > major:
        raise NewerFormat(where, 4, f"format {found_major} is not known here; a newer GlideFS wrote it")
    if flags & ~known_flags:
        raise NewerFormat(where, 8, f"flags {flags:#x} are not known here; a newer GlideFS wrote it")
    (label_length,) = _LABEL_LENGTH.unpack_from(data, _PREFIX.size)
    start = PREFIX_SIZE + label_length
    if start > end:
        raise CorruptObject(where, _PREFIX.size, f"a label of {label_length} bytes does not fit")
    if label is not None and view[PREFIX_SIZE:start] != label:
        theirs = bytes(view[PREFIX_SIZE:start]).decode("utf-8", "replace")[:200]
        raise WrongObject(where, f"this object was put as {theirs!r}")
    if length > limit:
        raise CorruptObject(where, 12, f"document of {length} bytes, at most {limit}")
    try:
        return compression.decompress(view[start:end], length)
    except compression.BadFrame as error:
        raise CorruptObject(where, start, str(error)) from error
