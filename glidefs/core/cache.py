"""The block cache: content-addressed blocks in one file per host (csrc/cache)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from glidefs.core._core import ffi, lib
from glidefs.core.check import check

if TYPE_CHECKING:
    from glidefs.core.engine import Engine

BLOCK = int(lib.GLIDE_BLOCK)
KEY_SIZE = 16


class Slot(NamedTuple):
    """A pinned slot. Exactly one of ``unpin``, ``drop`` and an install must follow.

    ``verified``: this process has checked the content against ``hash`` (BLAKE3-128 of the block).
    """

    slot: int
    generation: int
    verified: bool
    hash: bytes


def _to_c(slot: Slot) -> Any:
    return ffi.new("struct glide_slot *", (slot.slot, slot.generation, slot.verified, list(slot.hash)))


def _from_c(raw: Any) -> Slot:
    return Slot(raw.slot, raw.generation, bool(raw.verified), bytes(ffi.buffer(raw.hash)))


class BlockCache:
    """The cache of an engine; lives and dies with it. All methods may be called from any thread."""

    __slots__ = ("_engine",)

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def lookup(self, keys: Sequence[bytes]) -> list[Slot | None]:
        """The slots of ``keys`` (16 bytes each), pinned; None for a key that is not there."""
        count = len(keys)
        raw = ffi.new("struct glide_slot[]", count)
        joined = b"".join(keys)
        if len(joined) != count * KEY_SIZE:
            raise ValueError(f"a cache key has {KEY_SIZE} bytes")
        with self._engine._use() as engine:
            if not check(lib.glide_cache_lookup(engine, joined, count, raw), "cache lookup"):
                return [None] * count
        return [None if raw[i].slot == lib.GLIDE_NO_SLOT else _from_c(raw[i]) for i in range(count)]

    def insert(self, key: bytes, content_hash: bytes, data: bytes | bytearray | memoryview) -> Slot:
        """Store a block of 128 KiB and return its slot, pinned; a key that is there keeps its slot.

        Raises CoreError with errno EAGAIN (temporary) while every slot is pinned.
        """
        if len(data) != BLOCK:
            raise ValueError(f"a block has {BLOCK} bytes, not {len(data)}")
        raw = ffi.new("struct glide_slot *")
        with self._engine._use() as engine:
            check(
                lib.glide_cache_insert(engine, _key(key), _key(content_hash), ffi.from_buffer(data), raw),
                "cache insert",
            )
        return _from_c(raw)

    def read(self, slot: Slot) -> bytearray:
        """The 128 KiB of a pinned slot."""
        data = bytearray(BLOCK)
        with self._engine._use() as engine:
            check(lib.glide_cache_read(engine, _to_c(slot), ffi.from_buffer(data)), "cache read")
        return data

    def mark_verified(self, slot: Slot, data: bytes | bytearray) -> None:
        """``data``, the content, matches the hash: look-ups need not check it again in this process."""
        with self._engine._use() as engine:
            check(lib.glide_cache_mark_verified(engine, _to_c(slot), ffi.from_buffer(data)), "cache check")

    def sync(self) -> int:
        """Sync what was put in: until then every read of it is checked. For one thread, every few seconds.

        Returns an errno while the disk fails: then nothing is cached. 0: it works.
        """
        with self._engine._use() as engine:
            return -int(lib.glide_cache_sync(engine))

    def drop(self, slot: Slot) -> None:
        """Forget a slot whose content is bad; unpins it."""
        with self._engine._use() as engine:
            lib.glide_cache_drop(engine, _to_c(slot))

    def unpin(self, slot: Slot) -> None:
        """Give back a slot that was not installed."""
        with self._engine._use() as engine:
            lib.glide_cache_unpin(engine, _to_c(slot))

    def evict_all(self) -> int:
        """Evict everything that is not pinned; returns the number of blocks evicted."""
        with self._engine._use() as engine:
            return int(lib.glide_cache_evict_all(engine))


def _key(key: bytes) -> bytes:
    if len(key) != KEY_SIZE:
        raise ValueError(f"a cache key or hash has {KEY_SIZE} bytes, not {len(key)}")
    return key
