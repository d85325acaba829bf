"""zstd with a bound on what comes out.

A zstd frame states its content size, and python-zstandard allocates that before it has looked at the
data. So the stated size is compared with what the caller may get *before* anything is decompressed.
Contexts are not thread-safe and not free to make: each thread keeps one of each kind.
"""

from __future__ import annotations

import threading

import zstandard

DEFAULT_LEVEL = 3


class BadFrame(ValueError):
    """Not a zstd frame of acceptable size."""


class _Contexts(threading.local):
    def __init__(self) -> None:
        self.compressors: dict[int, zstandard.ZstdCompressor] = {}
        self.decompressor = zstandard.ZstdDecompressor()


_contexts = _Contexts()


def compress(data: bytes | bytearray | memoryview, level: int = DEFAULT_LEVEL) -> bytes:
    """One zstd frame that states its content size."""
    compressor = _contexts.compressors.get(level)
    if compressor is None:
        compressor = zstandard.ZstdCompressor(level=level, write_content_size=True, write_checksum=False)
        _contexts.compressors[level] = compressor
    return compressor.compress(data)


def content_size(frame: bytes | bytearray | memoryview) -> int:
    """The plain size that a frame states, unverified. Raises BadFrame if it states none."""
    try:
        size = zstandard.get_frame_parameters(frame).content_size
    except zstandard.ZstdError as error:
        raise BadFrame(f"no zstd frame ({error})") from error
    if size in (zstandard.CONTENTSIZE_UNKNOWN, zstandard.CONTENTSIZE_ERROR):
        raise BadFrame("the zstd frame does not state its size")
    return size


def decompress(frame: bytes | bytearray | memoryview, expected: int) -> bytes:
    """Exactly ``expected`` plain bytes of the one frame that ``frame`` holds. Raises BadFrame."""
    stated = content_size(frame)
    if stated != expected:
        raise BadFrame(f"zstd frame of {stated} plain bytes where {expected} belong")
    try:
        plain = _contexts.decompressor.decompress(frame, max_output_size=expected, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise BadFrame(f"bad zstd frame ({error})") from error
    if len(plain) != expected:
        raise BadFrame(f"zstd frame gave {len(plain)} plain bytes where {expected} belong")
    return plain
