"""Keys of the block cache (16 bytes).

A block that is one whole payload is keyed by its content hash, so that unrelated volumes share it.
A merged block is keyed by what it is merged from, in a name space of its own: BLAKE3 in key-derivation
mode (O'Connor et al., "BLAKE3", section 2.3) over the ordered list of payload hash, sector mask and
zero mask, newest first. Where tenants must not observe each other, both are bound to the prefix.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

from blake3 import blake3

from glidefs.formats.pack import PackEntry

KEY_SIZE = 16
_MERGED = "glidefs 2026 block cache: merged block"
_PREFIXED = "glidefs 2026 block cache: scope of a prefix"
_PART = struct.Struct("<16sII")


def merged_key(parts: Iterable[PackEntry]) -> bytes:
    """The key of a block merged from ``parts``, newest first, all of which contribute."""
    hasher = blake3(derive_key_context=_MERGED)
    for part in parts:
        hasher.update(_PART.pack(part.hash, part.mask, part.zero_mask))
    return hasher.digest(length=KEY_SIZE)


def scoped_key(key: bytes, prefix: str) -> bytes:
    """``key``, bound to a prefix."""
    hasher = blake3(derive_key_context=_PREFIXED)
    hasher.update(key)
    hasher.update(prefix.encode())
    return hasher.digest(length=KEY_SIZE)
