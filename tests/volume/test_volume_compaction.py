"""Compaction changes where bytes are, never what they are; and what it costs."""

from __future__ import annotations

import random
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from volume_rig import BLOCK, MIB, Rig
from waiting import wait_for

from glidefs.compaction.plan import Layer, choose_run, layers_of, merge_blocks, runs_of
from glidefs.formats.manifest import EMPTY_PAGE, PackRef
from glidefs.formats.pack import (
    CHUNK,
    EMPTY_HASH,
    FULL_MASK,
    PackEntry,
    PackIndex,
    decode_index,
    encode_index,
    encode_trailer,
)
from glidefs.host.host import Host
from glidefs.manifest.commit import Append, Change, Replace, build_page, edit
from glidefs.volume.volume import Volume

SMALL = 2 * CHUNK + 5 * BLOCK


def forget_everything_local(host: Host, volume: Volume) -> None:
    volume.retire_committed()
    host.engine.cache.evict_all()


def most_packs(volume: Volume) -> int:
    page = volume.root.inline_page
    assert page is not None
    return max((len(indices) for indices in page.chunks.values()), default=0)


def test_settling_leaves_few_packs_and_the_same_bytes(rig: Rig) -> None:
    host = rig.host(pack_bytes=256 * 1024)
    volume = rig.create(host, SMALL)
    rng = random.Random(5)
    model = bytearray(SMALL)
    for _ in range(24):
        for _ in range(30):
            at = rng.choice([rng.randrange(0, 6 * BLOCK), CHUNK + rng.randrange(0, 4 * BLOCK)]) // 4096 * 4096
            data = rng.randbytes(4096)
            volume.core.pwrite(at, data)
            model[at : at + 4096] = data
        if rng.random() < 0.5:
            at = rng.randrange(0, 5 * BLOCK) // 4096 * 4096
            volume.core.zero(at, 2 * 4096)
            model[at : at + 8192] = bytes(8192)
        volume.drain(20)
    assert most_packs(volume) >= 20
    assert host.compactor.compact(volume) > 0
    assert most_packs(volume) < 16
    host.compactor.compact(volume, settle=True)
    forget_everything_local(host, volume)
    assert volume.core.pread(0, 8 * BLOCK) == model[: 8 * BLOCK]
    assert volume.core.pread(CHUNK, 8 * BLOCK) == model[CHUNK : CHUNK + 8 * BLOCK]
    page = volume.root.inline_page
    assert page is not None
    manifest = volume.manifest(host.store)
    for chunk in page.chunks:
        indices = [manifest.index(ref) for ref in manifest.packs(chunk)]
        assert len(layers_of(chunk, indices)) <= 4


def test_compaction_runs_in_the_background_and_settles(rig: Rig) -> None:
    host = rig.host(compaction=True, compact_width=6, settle_idle=0.3)
    volume = rig.create(host, SMALL)
    for i in range(14):
        volume.core.pwrite((i % 4) * 4096, bytes([i + 1]) * 4096)
        volume.drain(20)
    wait_for(lambda: most_packs(volume) <= 4, "settled")
    forget_everything_local(host, volume)
    assert volume.core.pread(0, 16384) == b"".join(bytes([i]) * 4096 for i in (13, 14, 11, 12))


def test_packs_appended_while_a_merge_runs_stay_newer(rig: Rig) -> None:
    host = rig.host()
    volume = rig.create(host, SMALL)
    for i in range(8):
        volume.core.pwrite(i * 4096, b"old!" * 1024)
        volume.drain(20)
    original = host.compactor._put
    entered, go_on = threading.Event(), threading.Event()

    def put(*arguments):  # type: ignore[no-untyped-def]
        entered.set()
        assert go_on.wait(20)
        return original(*arguments)

    host.compactor._put = put  # type: ignore[method-assign]
    thread = threading.Thread(target=lambda: host.compactor.compact(volume, settle=True))
    thread.start()
    assert entered.wait(20)
    volume.core.pwrite(0, b"new!" * 1024)
    volume.drain(20)
    go_on.set()
    thread.join(20)
    assert most_packs(volume) == 2
    forget_everything_local(host, volume)
    assert volume.core.pread(0, 8192) == b"new!" * 1024 + b"old!" * 1024


def test_a_run_that_was_dropped_meanwhile_stays_dropped(rig: Rig) -> None:
    host = rig.host()
    volume = rig.create(host, SMALL)
    for i in range(8):
        volume.core.pwrite(i * 4096, b"old!" * 1024)
        volume.drain(20)
    original = host.compactor._put

    def put(*arguments):  # type: ignore[no-untyped-def]
        volume.core.zero(0, CHUNK)
        volume.drain(20)
        return original(*arguments)

    host.compactor._put = put  # type: ignore[method-assign]
    host.compactor.compact(volume, settle=True)
    assert most_packs(volume) == 0
    forget_everything_local(host, volume)
    assert volume.core.pread(0, 65536) == bytes(65536)


def test_cost_of_random_writes_over_a_full_volume(rig: Rig) -> None:
    """4 GiB of random 4 KiB over 16 GiB, scaled down 64 times; chunks stay what they are."""
    host = rig.host(
        engine={"segment_bytes": 1 * MIB, "log_limit": 512 * MIB, "cache_bytes": 16 * MIB},
        pack_bytes=1 * MIB,
        batch_bytes=4 * MIB,
    )
    size = 256 * MIB
    volume = rig.create(host, size)
    rng = random.Random(7)
    for at in range(0, size, MIB):
        volume.core.pwrite(at, rng.randbytes(MIB))
    volume.drain(60)
    volume.retire_committed()
    before = rig.pack_bytes()
    written = 64 * MIB
    for i in range(written // 4096):
        volume.core.pwrite(rng.randrange(size // 4096) * 4096, rng.randbytes(4096))
        if i % 1024 == 1023:
            volume.drain(30)
            host.compactor.compact(volume)
    host.compactor.compact(volume, settle=True)
    uploaded = rig.pack_bytes() - before
    print(f"uploaded {uploaded / written:.2f} times what was written")
    assert uploaded <= 3 * written
    manifest = volume.manifest(host.store)
    for chunk in (0, 1):
        indices = [manifest.index(ref) for ref in manifest.packs(chunk)]
        assert len(layers_of(chunk, indices)) <= 4


SECTOR_NUMBER = st.integers(0, 3 * 32 - 1)
WRITE = st.tuples(st.just("write"), SECTOR_NUMBER, st.integers(1, 40), st.integers(1, 255))
ZERO = st.tuples(st.just("zero"), SECTOR_NUMBER, st.integers(1, 70), st.just(0))
STEP = st.tuples(
    st.sampled_from(["drain", "drain", "compact", "settle", "forget"]), st.just(0), st.just(0), st.just(0)
)
OPS = st.lists(st.one_of(WRITE, ZERO, STEP, STEP), min_size=6, max_size=50)


@pytest.fixture
def shared_host(rig: Rig) -> Host:
    return rig.host(compact_width=3, settle_width=1, pack_bytes=192 * 1024)


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(ops=OPS, base=st.sampled_from([0, CHUNK - 2 * BLOCK]))
def test_any_history_reads_like_a_byte_array(rig: Rig, shared_host: Host, ops: list, base: int) -> None:
    host = shared_host
    span = 4 * BLOCK
    volume = rig.create(host, 2 * CHUNK)
    model = bytearray(span)
    try:
        for op, sector, count, value in ops:
            at, stop = sector * 4096, min((sector + count) * 4096, span)
            if op == "write":
                data = bytes([value]) * (stop - at)
                volume.core.pwrite(base + at, data)
                model[at:stop] = data
            elif op == "zero":
                volume.core.zero(base + at, stop - at)
                model[at:stop] = bytes(stop - at)
            elif op == "drain":
                volume.drain(20)
            elif op == "forget":
                volume.drain(20)
                forget_everything_local(host, volume)
            else:
                volume.drain(20)
                host.compactor.compact(volume, settle=op == "settle")
            assert volume.core.pread(base, span) == model
        volume.drain(20)
        forget_everything_local(host, volume)
        assert volume.core.pread(base, span) == model
    finally:
        volume.close()


def test_a_payload_that_is_partly_zeroed_is_cut(rig: Rig) -> None:
    host = rig.host(compact_width=3, settle_width=1)
    volume = rig.create(host, SMALL)
    volume.core.pwrite(0, b"bottom.." * (BLOCK // 8))
    volume.drain(20)
    volume.core.pwrite(0, b"upper..." * 2048)
    volume.drain(20)
    volume.core.zero(4096, 4096)
    volume.drain(20)
    assert host.compactor.compact(volume, settle=True) > 0
    assert most_packs(volume) == 2
    forget_everything_local(host, volume)
    expected = b"upper..." * 512 + bytes(4096) + b"upper..." * 1024 + b"bottom.." * ((BLOCK - 16384) // 8)
    assert volume.core.pread(0, BLOCK) == expected


def ref(number: int, size: int = 1000) -> PackRef:
    return PackRef(number.to_bytes(16, "big"), size, 100)


def index_of(*entries: tuple[int, int, int]) -> PackIndex:
    offset = 16
    made = []
    for block, mask, zeros in entries:
        length = mask.bit_count() * 4096
        made.append(PackEntry(block, mask, zeros, offset if mask else 0, length, EMPTY_HASH))
        offset += length
    frame = encode_index(made)
    tail = frame + encode_trailer(frame, len(made), bytes(16), bytes(16))
    return decode_index("pack", tail, offset + len(tail), None)


def test_zero_masks_go_only_at_the_bottom() -> None:
    old = index_of((0, FULL_MASK, 0), (1, 1, 0))
    new = index_of((0, 0, FULL_MASK), (1, 2, 4))
    runs = runs_of(0, (ref(1), ref(2)), [old, new], 2)
    assert runs is not None
    assert runs.bottom
    merged, _ = merge_blocks(runs)
    assert [(m.block, m.mask, m.zero_mask) for m in merged] == [(1, 3, 0)]
    merged, _ = merge_blocks(runs._replace(bottom=False))
    assert [(m.block, m.mask, m.zero_mask) for m in merged] == [(0, 0, FULL_MASK), (1, 3, 4)]


def test_the_bottom_stays_until_half_of_it_is_superseded() -> None:
    big = Layer(0, 1, 1000, 600)
    uppers = [Layer(i, i + 1, 10, 10) for i in range(1, 6)]
    assert choose_run([big, *uppers], 5) == (3, False)
    assert choose_run([big._replace(live=499), *uppers], 4) == (0, True)
    assert choose_run([big, *uppers], 7) is None
    # A big upper layer stays beside the bottom.
    growing = [Layer(1, 2, 900, 900), Layer(2, 3, 5, 5), Layer(3, 4, 5, 5), Layer(4, 5, 40, 40)]
    assert choose_run([big, *growing], 5) == (2, False)
    # Half dead, but not worth the rewrite of all that lies over it.
    assert choose_run([big._replace(sectors=100, live=40), *growing], 5) == (2, False)
    assert choose_run([Layer(0, 1, 3, 3), *uppers[:3]], 3) == (0, True)


def test_disjoint_neighbours_are_one_layer() -> None:
    a, b, c = index_of((0, 1, 0)), index_of((1, 1, 0)), index_of((0, 3, 0))
    assert layers_of(0, [a, b, c]) == [Layer(0, 2, 2, 1), Layer(2, 3, 2, 2)]


def test_edits_share_nothing_and_lose_no_pack() -> None:
    page = build_page(EMPTY_PAGE, {0: (ref(1), ref(2)), 1: (ref(2),), 5: (ref(3),)})
    assert page.chunks == {0: (0, 1), 1: (1,), 5: (2,)}
    after = build_page(page, {0: (ref(2), ref(9)), 5: ()})
    assert after.packs == (ref(2), ref(9))
    assert after.chunks == {0: (0, 1), 1: (0,)}
    assert page.chunks == {0: (0, 1), 1: (1,), 5: (2,)}


def test_a_replacement_needs_its_run(rig: Rig) -> None:
    host = rig.host()
    volume = rig.create(host, SMALL)
    manifest = volume.manifest(host.store)
    root = edit(manifest, Change(appends=tuple(Append(ref(i), (0,)) for i in range(4)))).root
    manifest.root = root
    swap = Change(replaces=(Replace(0, (ref(1).id, ref(2).id), (ref(7),)),))
    page = edit(manifest, swap).root.inline_page
    assert page is not None
    assert [page.packs[i].id for i in page.chunks[0]] == [ref(i).id for i in (0, 7, 3)]
    gap = Change(replaces=(Replace(0, (ref(1).id, ref(3).id), (ref(7),)),))
    assert edit(manifest, gap).root.inline_page == root.inline_page
