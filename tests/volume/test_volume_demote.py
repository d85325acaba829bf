"""What a segment leaves in the block cache when it goes: what was committed, nothing else under its key."""

from __future__ import annotations

import errno
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from volume_rig import BLOCK, MIB, Rig, demote_all
from waiting import wait_for

from glidefs.core.carry import BlockPlans
from glidefs.core.check import CoreError
from glidefs.core.gather import log_segments
from glidefs.formats.pack import SECTOR
from glidefs.host.host import Host
from glidefs.reading.reader import block_key
from glidefs.store.memory import MemoryStore
from glidefs.volume.volume import Volume
from glidefs.writing import demote

BLOCKS = 24


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A segment has the time that it needs."""
    monkeypatch.setattr(demote, "PATIENCE", 60.0)


def test_what_was_written_here_is_not_read_from_the_store(rig: Rig) -> None:
    host = rig.host()
    volume = rig.create(host)
    data = random.Random(1).randbytes(16 * MIB)
    volume.core.pwrite(0, data)
    volume.drain(20)
    assert demote_all(host, volume) == 16 * MIB // BLOCK
    assert volume.core.info().first_seq == 0
    assert volume.core.pread(0, 16 * MIB) == data
    assert host.faults.fetches == 0


def test_small_writes_over_what_was_read_are_merged(rig: Rig) -> None:
    host = rig.host()
    volume = rig.create(host)
    model = bytearray(random.Random(1).randbytes(2 * MIB))
    volume.core.pwrite(0, bytes(model))
    volume.drain(20)
    demote_all(host, volume)
    assert volume.core.pread(0, 2 * MIB) == model  # the base is known
    for block in range(2 * MIB // BLOCK):
        at = block * BLOCK + block % 32 * SECTOR
        model[at : at + 2 * SECTOR] = b"n" * (2 * SECTOR)
        volume.core.pwrite(at, b"n" * (2 * SECTOR))
    del model[2 * MIB :]
    volume.drain(20)
    assert demote_all(host, volume) > 0
    assert volume.core.pread(0, 2 * MIB) == model
    # A block is 16 times what was written of it, so some went to the store for it.
    assert host.faults.fetches < 2 * MIB // BLOCK


def test_small_writes_far_from_each_other_cost_no_more_than_their_share(rig: Rig) -> None:
    host = rig.host()
    volume = rig.create(host)
    volume.core.pwrite(0, random.Random(1).randbytes(16 * MIB))
    volume.drain(20)
    demote_all(host, volume)
    volume.core.pread(0, 16 * MIB)
    before = host.demoter.blocks
    for block in range(128):
        volume.core.pwrite(block * BLOCK, b"s" * SECTOR)
    volume.drain(20)
    demote_all(host, volume)
    assert 0 < host.demoter.blocks - before <= 4 * 128 * SECTOR // BLOCK


def test_a_cache_that_takes_nothing_does_not_keep_the_log(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object) -> int:
        raise CoreError(errno.ENOSPC, "demote", "full")

    monkeypatch.setattr(BlockPlans, "demote", refuse)
    host = rig.host(engine={"log_limit": 32 * MIB})
    volume = rig.create(host)
    for at in range(0, 28 * MIB, MIB):
        volume.core.pwrite(at, random.Random(at).randbytes(MIB))
        volume.drain(20)
    wait_for(lambda: volume.core.info().first_seq > 1, "the oldest segments have gone")


STEP = st.one_of(
    st.tuples(st.just("write"), st.integers(0, BLOCKS * 32 - 1), st.integers(1, 64)),
    st.tuples(st.just("zero"), st.integers(0, BLOCKS * 32 - 1), st.integers(1, 96)),
    st.tuples(st.just("read"), st.integers(0, BLOCKS * 32 - 1), st.integers(1, 64)),
    st.tuples(st.sampled_from(["drain", "seal", "demote", "evict"]), st.just(0), st.just(0)),
)


@settings(deadline=None)
@given(steps=st.lists(STEP, max_size=60), seed=st.integers(0, 1 << 30))
def test_the_cache_has_what_was_committed(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int, int]], seed: int
) -> None:
    rng = random.Random(seed)
    rig = Rig(tmp_path_factory.mktemp("demote"), MemoryStore())
    host = rig.host(cache_scope="host", engine={"segment_bytes": 1 * MIB})
    volume = rig.create(host, BLOCKS * BLOCK)
    model = bytearray(BLOCKS * BLOCK)
    committed = bytes(model)
    # Nothing is uploaded but in a drain. One with nothing to do leaves a request, which takes what is next.
    host.pause(20)
    for kind, sector, count in [*steps, ("demote", 0, 0)]:
        at, end = sector * SECTOR, min(len(model), (sector + count) * SECTOR)
        if kind == "write":
            model[at:end] = rng.randbytes(end - at)
            volume.core.pwrite(at, bytes(model[at:end]))
        elif kind == "zero":
            model[at:end] = bytes(end - at)
            volume.core.zero(at, end - at)
        elif kind == "read":
            assert volume.core.pread(at, end - at) == model[at:end]
        elif kind == "drain":
            host.resume()
            volume.drain(20)
            host.pause(20)
            committed = bytes(model)
        elif kind == "seal":
            volume.core.seal()
        elif kind == "evict":
            host.engine.cache.evict_all()
        else:
            demote_all(host, volume)
        check_cache(host, volume, committed)
    assert volume.core.pread(0, len(model)) == model
    host.resume()
    rig.stop(host)


def check_cache(host: Host, volume: Volume, committed: bytes) -> None:
    manifest = volume.manifest(host.store)
    for block in range(BLOCKS):
        key = block_key(manifest, block)
        (slot,) = host.engine.cache.lookup([key or bytes(16)])
        if slot is None:
            continue
        try:
            assert key is not None
            assert host.engine.cache.read(slot) == committed[block * BLOCK : (block + 1) * BLOCK]
        finally:
            host.engine.cache.unpin(slot)


def test_what_was_written_since_is_not_put_there(rig: Rig) -> None:
    """The newest payload alone would not tell: it has other sectors."""
    host = rig.host()
    volume = rig.create(host)
    for at, data in ((0, random.Random(1).randbytes(BLOCK)), (0, b"1" * SECTOR)):
        volume.core.pwrite(at, data)
        volume.drain(20)
    volume.core.pwrite(BLOCK - SECTOR, b"2" * SECTOR)
    volume.core.seal()
    assert demote_all(host, volume) == 0
    assert volume.core.pread(BLOCK - SECTOR, SECTOR) == b"2" * SECTOR


def test_a_base_that_is_newer_than_the_plan(rig: Rig) -> None:
    """A plan that was made before a commit, whose segments went since, is not given what that wrote."""
    host = rig.host()
    volume = rig.create(host)
    first = random.Random(1).randbytes(BLOCK)
    volume.core.pwrite(0, first)
    volume.drain(20)
    volume.core.pwrite(0, b"1" * SECTOR)
    volume.drain(20)
    manifest = volume.manifest(host.store)
    indices = manifest.ready(0)
    assert indices is not None
    plans = BlockPlans([([index.records for index in indices], [0])], None)
    old = b"1" * SECTOR + first[SECTOR:]
    oldest = log_segments(volume.log_dir)[0]
    volume.core.pwrite(BLOCK - SECTOR, b"2" * SECTOR)
    volume.drain(20)
    volume.retire_committed()
    assert volume.core.pread(BLOCK - SECTOR, SECTOR) == b"2" * SECTOR  # now the base has it
    plans.demote(volume.core, oldest, manifest.root.last_segment)
    (slot,) = host.engine.cache.lookup([block_key(manifest, 0) or b""])
    if slot is not None:
        assert host.engine.cache.read(slot) == old
        host.engine.cache.unpin(slot)


def test_the_retirer_demotes_unless_writers_are_about_to_wait(rig: Rig) -> None:
    host = rig.host(engine={"log_limit": 32 * MIB})
    volume = rig.create(host)
    rng = random.Random(3)
    model = bytearray(24 * MIB)
    for at in range(0, len(model), MIB):
        model[at : at + MIB] = rng.randbytes(MIB)
        volume.core.pwrite(at, bytes(model[at : at + MIB]))
        volume.drain(20)
    more = rng.randbytes(4 * MIB)
    for at in range(0, len(more), MIB):
        volume.core.pwrite(len(model) + at, more[at : at + MIB])
        volume.drain(20)
    wait_for(lambda: volume.core.info().first_seq > 1, "the oldest segments have gone")
    assert host.demoter.blocks
    assert volume.core.pread(0, len(model)) == model
    assert host.faults.fetches == 0
