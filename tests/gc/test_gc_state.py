"""The state object: it holds what it was given, and nothing that is damaged is believed."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glidefs.errors import CorruptObject
from glidefs.formats import envelope, gc_state
from glidefs.formats.gc_state import (
    GcState,
    SeenCheckpoint,
    Sighting,
    decode_state,
    encode_state,
    first_seen,
    make_state,
)

RUN = bytes(16)
SEEN = st.dictionaries(st.binary(min_size=16, max_size=16), st.sampled_from([0.0, 1.5, 1e9]), max_size=20)


@given(SEEN, SEEN)
def test_round_trip(packs: dict[bytes, float], pages: dict[bytes, float]) -> None:
    data = encode_state(make_state(RUN, packs, pages), "k")
    assert first_seen(decode_state("k", data)) == (packs, pages)


def test_checkpoints_of_blesses(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = [SeenCheckpoint(float(since), f"b{since}", '"etag"') for since in (3, 1, 2)]
    state = decode_state("k", encode_state(make_state(RUN, {}, {}, seen), "k"))
    assert state.checkpoints == (seen[1], seen[2], seen[0])
    monkeypatch.setattr(gc_state, "MAX_CHECKPOINTS", 2)
    assert make_state(RUN, {}, {}, seen).checkpoints == (seen[1], seen[2])


def test_a_state_of_before_checkpoints_were_kept() -> None:
    raw = msgspec.msgpack.encode([RUN, [[1.0, b"p" * 16, b""]]])
    state = decode_state("k", envelope.seal(gc_state.STATE_MAGIC, gc_state.FORMAT, 0, 0, raw, b"k"))
    assert (first_seen(state), state.checkpoints) == (({b"p" * 16: 1.0}, {}), ())


@given(st.data())
def test_damage_is_found(data: st.DataObject) -> None:
    good = encode_state(make_state(RUN, {b"p" * 16: 1.0}, {}), "k")
    at = data.draw(st.integers(0, len(good) - 1))
    bad = bytearray(good)
    bad[at] ^= data.draw(st.integers(1, 255))
    for wrong in (bytes(bad), good[:at]):
        with pytest.raises(CorruptObject):
            decode_state("k", wrong)


@pytest.mark.parametrize(
    "document",
    [
        {},
        [RUN, [[1.0, b"short", b""]]],
        [RUN, [[float("nan"), b"", b""]]],
        [RUN, [[float("inf"), b"", b""]]],
        [RUN, [[-1.0, b"", b""]]],
        [b"short", []],
        [RUN, [], [[float("nan"), "b", "e"]]],
        [RUN, [], [[-1.0, "b", "e"]]],
    ],
)
def test_documents_that_make_no_sense(document: object) -> None:
    raw = msgspec.msgpack.encode(document)
    data = envelope.seal(gc_state.STATE_MAGIC, gc_state.FORMAT, gc_state.MINOR, 0, raw, b"k")
    with pytest.raises(CorruptObject):
        decode_state("k", data)


def test_what_does_not_fit_is_what_was_seen_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gc_state, "MAX_IDS", 3)
    packs = {bytes([i]) * 16: float(i) for i in range(4)}
    pages = {bytes([i]) * 16: float(i) for i in range(4)}
    kept = first_seen(make_state(RUN, packs, pages))
    assert kept == ({bytes(16): 0.0, b"\1" * 16: 1.0}, {bytes(16): 0.0})


def test_a_million_ids_are_small() -> None:
    ids = {i.to_bytes(16, "little"): float(i % 3) for i in range(100_000)}
    state = make_state(RUN, ids, {})
    assert len(state.sightings) == 3
    assert len(msgspec.msgpack.encode(state)) < 17 * len(ids)
    assert isinstance(state, GcState)
    assert isinstance(state.sightings[0], Sighting)
