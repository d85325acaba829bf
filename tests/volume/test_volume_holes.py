"""Holes by the real reader: what a manifest does not have is told to the core by page, and by chunk."""

from __future__ import annotations

import os

from hypothesis import given, settings
from hypothesis import strategies as st
from volume_rig import BLOCK, Rig, record_of

from glidefs.core.volume import GROUP
from glidefs.formats.manifest import PAGE_BYTES
from glidefs.formats.pack import (
    CHUNK,
    EMPTY_HASH,
    PackEntry,
    PackIndex,
    decode_index,
    encode_index,
    encode_trailer,
    pack_id,
    payload_hash,
)
from glidefs.reading.holes import holes_of_chunk
from glidefs.reading.plan import plan_block

MASKS = st.sampled_from([0, 1, 0xFF, 0xFFFF0000, 0xFFFFFFFF])


def index_of(entries: dict[int, tuple[int, int]]) -> PackIndex:
    """An index with these (sector mask, zero mask)."""
    made = [
        PackEntry(
            block, mask, zeros, 16 if mask else 0, 4096 if mask else 0, bytes(16) if mask else EMPTY_HASH
        )
        for block, (mask, zeros) in entries.items()
    ]
    frame = encode_index(made)
    tail = frame + encode_trailer(frame, len(made), b"v" * 16, b"n" * 16)
    return decode_index("k", tail, 1 << 20, pack_id(payload_hash(frame), b"v" * 16, b"n" * 16))


@settings(deadline=None)
@given(
    packs=st.lists(
        st.dictionaries(
            st.sampled_from([1023, 1024, 1025, 1500, 2047, 2048]),
            st.tuples(MASKS, MASKS).map(lambda m: (m[0], m[1] & ~m[0])).filter(any),
            min_size=1,
        ),
        min_size=1,
        max_size=5,
    )
)
def test_a_hole_is_what_no_plan_finds_data_of(packs: list[dict[int, tuple[int, int]]]) -> None:
    """Else a block would be neither: its reader would ask for ever."""
    indices = [index_of(pack) for pack in packs]
    zeros = holes_of_chunk(1, indices).zeros
    for block in range(1024, 2048):
        assert bool(zeros >> (block - 1024) & 1) == (plan_block(block, indices).mask == 0), block


def test_a_page_is_one_fault(rig: Rig) -> None:
    host = rig.host()
    volume = rig.create(host, size=3 * PAGE_BYTES)
    volume.core.pwrite(7 * CHUNK, os.urandom(BLOCK))
    volume.drain(20)
    volume.retire_committed()
    for page in range(3):
        for chunk in (0, 6, 8, 500, 1023):
            at = page * PAGE_BYTES + chunk * CHUNK + 5 * BLOCK
            assert volume.core.pread(at, 4096) == bytes(4096)
    assert volume.core.stats().faults == 3
    for block in range(1, 40):
        assert volume.core.pread(7 * CHUNK + block * BLOCK, 4096) == bytes(4096)
    assert volume.core.stats().faults == 4  # what is zero of a chunk that has a pack, at once


def test_a_fork_and_a_restart_begin_without_holes(rig: Rig) -> None:
    """Nothing of it is kept: they ask the manifest that they are opened with."""
    host = rig.host()
    volume = rig.create(host, size=PAGE_BYTES)
    assert volume.core.pread(CHUNK, 4096) == bytes(4096)
    data = os.urandom(BLOCK)
    volume.core.pwrite(CHUNK, data)
    volume.drain(20)
    volume.retire_committed()
    assert volume.core.pread(CHUNK, BLOCK) == data
    record = record_of(volume.root)
    volume.close()
    again = host.open(record, volume.root, volume.etag)
    assert again.core.pread(CHUNK, BLOCK) == data
    assert again.core.pread(2 * CHUNK, BLOCK) == bytes(BLOCK)


def test_a_compaction_brings_no_chunk_back(rig: Rig) -> None:
    """A chunk that was discarded is absent, whatever is merged around it."""
    host = rig.host()
    volume = rig.create(host, size=4 * CHUNK)
    for round_ in range(4):
        volume.core.pwrite(CHUNK + round_ * BLOCK, os.urandom(BLOCK))
        volume.core.pwrite(2 * CHUNK, os.urandom(BLOCK))
        volume.drain(20)
    volume.core.zero(CHUNK, CHUNK)
    volume.drain(20)
    volume.retire_committed()
    for block in (0, 1, GROUP - 1):
        assert volume.core.pread(CHUNK + block * BLOCK, BLOCK) == bytes(BLOCK)
    faults = volume.core.stats().faults
    assert volume.core.pread(CHUNK + 77 * BLOCK, BLOCK) == bytes(BLOCK)
    assert volume.core.stats().faults == faults
