"""Compression of pack payloads and assembly of blocks, one C call for many payloads."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from glidefs.core._core import ffi, lib
from glidefs.core.check import check

Buffer = bytes | bytearray | memoryview


def compress_payloads(
    plain: Buffer, lengths: Sequence[int], out: bytearray | memoryview, level: int = 1
) -> array[int]:
    """Compress consecutive payloads of ``lengths`` bytes at ``plain`` into ``out``, back to back.

    ``out`` needs room for ``sum(lengths)`` bytes. Returns the stored length of each; a payload that
    does not shrink is stored raw, with its own length.
    """
    count = len(lengths)
    if not count:
        return array("I")
    if sum(lengths) > len(plain):
        raise ValueError("the lengths exceed the payloads")
    given, stored = array("I", lengths), array("I", bytes(4 * count))
    with ffi.from_buffer("uint32_t[]", stored, require_writable=True) as stored_c:
        result = lib.glide_payloads_compress(
            ffi.from_buffer(plain),
            ffi.from_buffer("uint32_t[]", given),
            count,
            level,
            ffi.from_buffer(out, require_writable=True),
            len(out),
            stored_c,
        )
    check(result, "compress")
    return stored


def overlay(block: bytearray | memoryview, mask: int, zero_mask: int, sectors: Buffer) -> None:
    """Write the packed ``sectors`` of ``mask`` into a 128 KiB block; zero those of ``zero_mask``."""
    if len(sectors) < mask.bit_count() * lib.GLIDE_SECTOR or len(block) != lib.GLIDE_BLOCK:
        raise ValueError("sectors and mask do not fit")
    lib.glide_block_overlay(
        ffi.from_buffer(block, require_writable=True), mask, zero_mask, ffi.from_buffer(sectors)
    )


def extract(block: Buffer, mask: int, out: bytearray | memoryview) -> None:
    """Pack the sectors of ``mask`` of a 128 KiB block at the start of ``out``."""
    if len(out) < mask.bit_count() * lib.GLIDE_SECTOR or len(block) != lib.GLIDE_BLOCK:
        raise ValueError("sectors and mask do not fit")
    lib.glide_block_extract(ffi.from_buffer(block), mask, ffi.from_buffer(out, require_writable=True))
