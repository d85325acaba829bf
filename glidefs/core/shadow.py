"""Shadow verify in the core (csrc/shadow/shadow.c): its inputs, its questions and its findings."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from glidefs.core._core import ffi, lib


class ShadowFile(NamedTuple):
    """The second source of a volume at open: the descriptor of a file, and the sectors of it that are right.

    ``known`` are runs: first sector and number of sectors. The core duplicates ``fd``.
    """

    fd: int
    known: Sequence[tuple[int, int]]


class ShadowFill(msgspec.Struct, frozen=True):
    """READs wait for ``count`` blocks from ``block`` as the store had them when the volume was opened."""

    volume: int
    block: int
    count: int


class ShadowEnded(msgspec.Struct, frozen=True):
    """Nothing of the volume is compared any more: its file failed with ``errno``."""

    volume: int
    errno: int


class Source(enum.IntEnum):
    """Where a READ has a sector from; ``enum glide_shadow_source``."""

    UNKNOWN = lib.GLIDE_FROM_UNKNOWN
    LOG = lib.GLIDE_FROM_LOG
    LOG_ZERO = lib.GLIDE_FROM_LOG_ZERO
    CACHE = lib.GLIDE_FROM_CACHE
    ZERO = lib.GLIDE_FROM_ZERO


class ShadowDifference(msgspec.Struct, frozen=True):
    """A READ returned ``got`` where the second source has ``want``.

    ``count`` sectors from ``sector`` on differ, the first of them at ``offset`` (bytes, in the volume),
    where ``got`` and ``want`` begin (at most 16 bytes). ``segment`` and ``index`` are of a log position,
    ``slot`` and ``generation`` of the block cache, ``key`` and ``hash`` what that slot is for, empty
    if it holds something else by now.
    """

    volume: int
    sector: int
    count: int
    offset: int
    got: bytes
    want: bytes
    source: Source
    segment: int
    index: int
    slot: int
    generation: int
    key: bytes
    hash: bytes


ShadowItem = ShadowFill | ShadowDifference | ShadowEnded


def to_c(shadow: ShadowFile) -> tuple[Any, Any]:
    """``struct glide_shadow_config *`` and what must be kept alive with it."""
    known = ffi.new("struct glide_sectors[]", list(shadow.known))
    return ffi.new("struct glide_shadow_config *", (shadow.fd, known, len(shadow.known))), known


def from_c(raw: Any) -> ShadowItem:
    """The item in a ``struct glide_shadow_item *``."""
    if raw.kind == lib.GLIDE_SHADOW_FILL:
        return ShadowFill(raw.volume, raw.block, raw.count)
    if raw.kind == lib.GLIDE_SHADOW_ENDED:
        return ShadowEnded(raw.volume, raw.err)
    return ShadowDifference(
        volume=raw.volume,
        sector=raw.sector,
        count=raw.count,
        offset=raw.offset,
        got=bytes(ffi.buffer(raw.got))[: raw.bytes],
        want=bytes(ffi.buffer(raw.want))[: raw.bytes],
        source=Source(raw.source),
        segment=raw.segment,
        index=raw.index,
        slot=raw.slot,
        generation=raw.generation,
        key=bytes(ffi.buffer(raw.key)) if raw.has_key else b"",
        hash=bytes(ffi.buffer(raw.hash)) if raw.has_key else b"",
    )
