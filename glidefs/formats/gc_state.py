"""What a run of gc leaves for the next one: what no root named, and since when; checkpoints of blesses.

One MessagePack array in the wrapping of :mod:`glidefs.formats.envelope` (magic ``GLGC``): the id of
the run that wrote it, then the sightings, each an array of a time by the store's clock (unix
seconds), the ids of packs and the ids of pages that were first seen without a root at that time. The
ids of a sighting are one string, 16 bytes each. Then the checkpoints of blesses, each an array of the
time when this version of it was first seen, the base's name, and the ETag.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Annotated, TypeAlias

import msgspec
from msgspec import Meta

from glidefs.errors import CorruptObject
from glidefs.formats import envelope
from glidefs.formats.pack import ID_SIZE

STATE_MAGIC = b"GLGC"
FORMAT = 2
MINOR = 1
KNOWN_FLAGS = 0
MAX_IDS = 4 << 20
"""Ids in a state. What does not fit is left out, which only starts its grace later."""
MAX_CHECKPOINTS = 10_000
"""The same of checkpoints."""
MAX_DOCUMENT = 128 << 20

FirstSeen: TypeAlias = dict[bytes, float]
"""Id of 16 bytes -> when a run first saw it without a root, in unix seconds."""


class Sighting(msgspec.Struct, frozen=True, array_like=True):
    """The ids first seen unreferenced at ``since`` (unix seconds), 16 bytes each, one after another."""

    since: Annotated[float, Meta(ge=0)]
    packs: bytes = b""
    pages: bytes = b""


class SeenCheckpoint(msgspec.Struct, frozen=True, array_like=True):
    """The checkpoint of ``base`` was there, in the version ``etag``, at ``since`` (unix seconds)."""

    since: Annotated[float, Meta(ge=0)]
    base: str
    etag: str


class GcState(msgspec.Struct, frozen=True, array_like=True):
    """``run``: 16 random bytes of the run that wrote it, so that no two states are equal bytes."""

    run: Annotated[bytes, Meta(min_length=ID_SIZE, max_length=ID_SIZE)]
    sightings: tuple[Sighting, ...] = ()
    checkpoints: tuple[SeenCheckpoint, ...] = ()


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(GcState)


def make_state(
    run: bytes, packs: FirstSeen, pages: FirstSeen, checkpoints: Iterable[SeenCheckpoint] = ()
) -> GcState:
    """The state of a run. Beyond MAX_IDS and MAX_CHECKPOINTS what was seen last is left out."""
    groups: dict[float, tuple[list[bytes], list[bytes]]] = {}
    for kind, first_seen in enumerate((packs, pages)):
        for id_, since in first_seen.items():
            groups.setdefault(since, ([], []))[kind].append(id_)
    sightings: list[Sighting] = []
    room = MAX_IDS
    for since in sorted(groups):
        some_packs = groups[since][0][:room]
        room -= len(some_packs)
        some_pages = groups[since][1][:room]
        room -= len(some_pages)
        sightings.append(Sighting(since, b"".join(some_packs), b"".join(some_pages)))
        if not room:
            break
    oldest = sorted(checkpoints, key=lambda seen: seen.since)[:MAX_CHECKPOINTS]
    return GcState(run, tuple(sightings), tuple(oldest))


def first_seen(state: GcState) -> tuple[FirstSeen, FirstSeen]:
    """The packs and the pages of a state, each with its time."""
    packs: FirstSeen = {}
    pages: FirstSeen = {}
    for sighting in state.sightings:
        packs.update(dict.fromkeys(_ids(sighting.packs), sighting.since))
        pages.update(dict.fromkeys(_ids(sighting.pages), sighting.since))
    return packs, pages


def _ids(joined: bytes) -> Iterator[bytes]:
    return (joined[at : at + ID_SIZE] for at in range(0, len(joined), ID_SIZE))


def _parse(raw: bytes) -> GcState:
    state = _decoder.decode(raw)
    times = [*(sighting.since for sighting in state.sightings), *(seen.since for seen in state.checkpoints)]
    if not all(map(math.isfinite, times)):
        raise ValueError("a time that is not a number")
    for sighting in state.sightings:
        if len(sighting.packs) % ID_SIZE or len(sighting.pages) % ID_SIZE:
            raise ValueError(f"ids that are not {ID_SIZE} bytes each")
    return state


def encode_state(state: GcState, key: str) -> bytes:
    """The bytes of the object ``key``. Raises ValueError for a state that would not decode."""
    raw = _encoder.encode(state)
    _parse(raw)
    return envelope.seal(STATE_MAGIC, FORMAT, MINOR, 0, raw, key.encode())


def decode_state(key: str, data: bytes, where: str = "") -> GcState:
    """The state in an object's bytes. Raises CorruptObject."""
    raw = envelope.unseal(where or key, data, STATE_MAGIC, FORMAT, KNOWN_FLAGS, MAX_DOCUMENT, key.encode())
    try:
        return _parse(raw)
    except (ValueError, RecursionError) as error:
        raise CorruptObject(where or key, envelope.PREFIX_SIZE, f"gc state: {error}") from error
