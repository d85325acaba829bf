"""The hot set: the blocks a boot reads, in first-touch order.

One MessagePack array in the wrapping of :mod:`glidefs.formats.envelope` (magic ``GLHS``): the hash of
the base's manifest, then the runs, each an array of first block and number of blocks. Runs keep
first-touch order and may not overlap.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Annotated

import msgspec
from msgspec import Meta

from glidefs.errors import CorruptObject
from glidefs.formats import envelope
from glidefs.formats.pack import MAX_BLOCK

HOT_SET_MAGIC = b"GLHS"
FORMAT = 2
MINOR = 0
KNOWN_FLAGS = 0
MAX_DOCUMENT = 32 << 20
MAX_RUN = 1 << 20


class Run(msgspec.Struct, frozen=True, array_like=True):
    """``count`` blocks from block ``first``."""

    first: Annotated[int, Meta(ge=0, lt=MAX_BLOCK)]
    count: Annotated[int, Meta(gt=0, le=MAX_RUN)]


class HotSet(msgspec.Struct, frozen=True, array_like=True):
    """What to prefetch for a fork of the base whose manifest has this hash (32 bytes)."""

    manifest_hash: Annotated[bytes, Meta(min_length=32, max_length=32)]
    runs: tuple[Run, ...] = ()

    @property
    def block_count(self) -> int:
        """Blocks in all runs."""
        return sum(run.count for run in self.runs)

    def blocks(self) -> Iterator[int]:
        """The blocks in first-touch order."""
        for run in self.runs:
            yield from range(run.first, run.first + run.count)


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(HotSet)


def make_hot_set(manifest_hash: bytes, blocks: Iterable[int]) -> HotSet:
    """A hot set of ``blocks`` in the order given; repeats after the first touch are dropped."""
    runs: list[list[int]] = []
    for block in dict.fromkeys(blocks):
        if runs and block == runs[-1][0] + runs[-1][1] and runs[-1][1] < MAX_RUN:
            runs[-1][1] += 1
        else:
            runs.append([block, 1])
    return HotSet(manifest_hash=manifest_hash, runs=tuple(Run(first, count) for first, count in runs))


def _parse(raw: bytes) -> HotSet:
    hot_set = _decoder.decode(raw)
    end = -1
    for run in sorted(hot_set.runs, key=lambda run: run.first):
        if run.first < end:
            raise ValueError(f"block {run.first} is in two runs")
        end = run.first + run.count
    return hot_set


def encode_hot_set(hot_set: HotSet, key: str) -> bytes:
    """The bytes of the object ``key``. Raises ValueError for runs that overlap or are out of bounds."""
    raw = _encoder.encode(hot_set)
    _parse(raw)
    return envelope.seal(HOT_SET_MAGIC, FORMAT, MINOR, 0, raw, key.encode())


def decode_hot_set(key: str, data: bytes, where: str = "") -> HotSet:
    """The hot set in an object's bytes. Raises CorruptObject."""
    raw = envelope.unseal(where or key, data, HOT_SET_MAGIC, FORMAT, KNOWN_FLAGS, MAX_DOCUMENT, key.encode())
    try:
        return _parse(raw)
    except (ValueError, RecursionError) as error:
        raise CorruptObject(where or key, envelope.PREFIX_SIZE, f"hot set: {error}") from error
