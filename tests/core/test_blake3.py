"""BLAKE3 of the core: what Python's blake3 says, for every way through the tree."""

from __future__ import annotations

import random

from blake3 import blake3
from hypothesis import example, given
from hypothesis import strategies as st

from glidefs.core._core import ffi, lib

MOST = 128 << 10


def core_hash(data: bytes, context: str = "") -> bytes:
    out = ffi.new("uint8_t[16]")
    lib.glide_payload_hash(data, len(data), context.encode() if context else ffi.NULL, out)
    return bytes(out)


@given(st.integers(0, MOST), st.integers())
@example(0, 0)
@example(MOST, 0)
@example(1024, 0)
@example(8192, 0)
@example(8193, 0)
@example(9 * 1024, 0)
@example(17 * 1024 + 1, 0)
def test_the_hash_is_blake3(length: int, seed: int) -> None:
    data = random.Random(seed).randbytes(length)
    assert core_hash(data) == blake3(data).digest(length=16)


@given(st.binary(max_size=3000), st.text("abc :", min_size=1, max_size=60))
def test_derived_keys_are_blake3(data: bytes, context: str) -> None:
    assert core_hash(data, context) == blake3(data, derive_key_context=context).digest(length=16)
