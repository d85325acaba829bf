"""Packs of an upload: the plan over flat arrays, and what one call builds, beside the same in Python."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from core_rig import BLOCK, MIB, SECTOR, SECTORS, CoreRig, Vol, pattern
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glidefs.core.check import Closed, CoreError
from glidefs.core.gather import Gather, GatherEntry, GatherExtent
from glidefs.core.packs import PackJob, PackRules, UploadPlan
from glidefs.core.payloads import compress_payloads
from glidefs.errors import CorruptLog
from glidefs.formats.pack import (
    CHUNK_BLOCKS,
    HEADER_SIZE,
    MAX_ENTRIES,
    PackEntry,
    decode_index,
    decode_payload,
    encode_header,
    encode_records,
)
from glidefs.store.packs import put_body, put_pack

VOLUME = 4 * CHUNK_BLOCKS * BLOCK
BLOCKS = VOLUME // BLOCK
RULES = PackRules(1, 32, 4 * SECTOR, 970)
FULL = 2**32 - 1


# -- the same in Python, an object for each block ---------------------------------------------------


def items_of(
    entries: Sequence[GatherEntry], keep: set[int], zeros: Sequence[GatherExtent]
) -> list[GatherEntry]:
    items = [
        GatherEntry(block, mask, zero_mask if block // CHUNK_BLOCKS in keep else 0)
        for block, mask, zero_mask in entries
    ]
    items += [
        GatherEntry(block, 0, FULL) for run in zeros for block in range(run.block, run.block + run.count)
    ]
    return sorted(item for item in items if item.mask or item.zero_mask)


def packs_of(items: Sequence[GatherEntry], pack_bytes: int, max_items: int) -> Iterator[list[GatherEntry]]:
    pack: list[GatherEntry] = []
    size = 0
    for item in items:
        length = item.mask.bit_count() * SECTOR
        if pack and (size + length > pack_bytes or len(pack) >= max_items):
            yield pack
            pack, size = [], 0
        pack.append(item)
        size += length
    if pack:
        yield pack


def is_worth_it(payloads: Sequence[bytes]) -> bool:
    if len(payloads) <= 32:
        return True
    parts = [payload[: 4 * SECTOR] for payload in payloads[:: len(payloads) // 32]]
    sample = b"".join(parts)
    return sum(compress_payloads(sample, list(map(len, parts)), bytearray(len(sample)))) < 0.97 * len(sample)


def encoded(items: Sequence[GatherEntry], payloads: dict[int, bytes]) -> tuple[bytes, list[PackEntry]]:
    """Payload area and index of a pack."""
    plain = [payloads[item.block] for item in items if item.mask]
    stored, area = list(map(len, plain)), bytearray(b"".join(plain))
    if plain and is_worth_it(plain):
        stored = list(compress_payloads(b"".join(plain), stored, area))
    sizes = iter(stored)
    offset, entries = HEADER_SIZE, []
    for block, mask, zero_mask in items:
        size = next(sizes) if mask else 0
        digest = blake3(payloads[block] if mask else b"").digest(16)
        entries.append(PackEntry(block, mask, zero_mask, offset if mask else 0, size, digest))
        offset += size
    return bytes(area[: offset - HEADER_SIZE]), entries


# -- volumes ----------------------------------------------------------------------------------------


def content(kind: str, seed: int, length: int) -> bytes:
    if kind == "random":
        return random.Random(seed).randbytes(length)
    return bytes(length) if kind == "nulls" else pattern(seed, length)


class Ops(Vol):
    """A volume, and what tests write."""

    def write(self, sector: int, count: int, kind: str, seed: int) -> None:
        self.core.pwrite(sector * SECTOR, content(kind, seed, count * SECTOR))

    def zero(self, sector: int, count: int) -> None:
        self.core.zero(sector * SECTOR, count * SECTOR)

    def scatter(self, sector: int, count: int, kind: str, seed: int) -> None:
        for i in range(count):
            self.write(min(sector + i * 3 * SECTORS, VOLUME // SECTOR - 1), 1, kind, seed + i)


def payloads_of(gather: Gather) -> dict[int, bytes]:
    found = {}
    for i, (block, mask, _) in enumerate(gather.entries()):
        data = bytearray(mask.bit_count() * SECTOR)
        gather.fill(i, 1, data)
        found[block] = bytes(data)
    return found


def sector_near(draw: st.DrawFn) -> int:
    """At the ends of blocks, of chunks and of the volume, or anywhere."""
    block = draw(st.sampled_from([0, 1, 7, CHUNK_BLOCKS - 1, CHUNK_BLOCKS, 2 * CHUNK_BLOCKS, BLOCKS - 1]))
    return min(block * SECTORS + draw(st.integers(0, SECTORS)), VOLUME // SECTOR - 1)


@st.composite
def operations(draw: st.DrawFn) -> list[tuple[str, tuple[Any, ...]]]:
    ops: list[tuple[str, tuple[Any, ...]]] = []
    for seed in range(draw(st.integers(1, 8))):
        sector = sector_near(draw)
        room = VOLUME // SECTOR - sector
        kind = draw(st.sampled_from(["random", "pattern", "nulls"]))
        name = draw(st.sampled_from(["write", "write", "zero", "scatter"]))
        if name == "zero":
            ops.append((name, (sector, min(room, draw(st.sampled_from([1, 5, 32, 96, 40_000]))))))
        else:
            count = draw(st.sampled_from([1, 2, 31, 32, 33, 64] if name == "write" else [20, 45, 70]))
            ops.append((name, (sector, min(room, count) if name == "write" else count, kind, 1000 * seed)))
    return ops


def planned(plan: UploadPlan, jobs: Sequence[PackJob]) -> list[list[GatherEntry]]:
    return [plan.items(job) for job in jobs]


def built(plan: UploadPlan, job: PackJob, rules: PackRules = RULES) -> tuple[bytes, bytes, tuple[int, ...]]:
    """Payload area, plain index and chunks; nothing is written beyond the room that is asked for."""
    room = HEADER_SIZE + job.plain
    memory = bytearray(b"\xaa" * (room + 64))
    parts = plan.build(job, rules, memoryview(memory)[:room])
    assert memory[:HEADER_SIZE] == b"\xaa" * HEADER_SIZE
    assert memory[room:] == b"\xaa" * 64
    return bytes(memory[HEADER_SIZE : parts.end]), parts.records, parts.chunks


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ops=operations(),
    reopened=st.booleans(),
    keep_seed=st.integers(0, 3),
    pack_bytes=st.sampled_from([BLOCK, 3 * BLOCK, MIB, 32 * MIB]),
    max_items=st.sampled_from([1, 3, 40, MAX_ENTRIES - 1]),
)
def test_plan_and_packs_are_those_of_python(
    rig: CoreRig,
    ops: list[tuple[str, tuple[Any, ...]]],
    reopened: bool,
    keep_seed: int,
    pack_bytes: int,
    max_items: int,
) -> None:
    vol = Ops(rig, rig.tmp / f"log{next(rig.names)}" / "id", VOLUME).open()
    for name, args in ops:
        getattr(vol, name)(*args)
    if reopened:  # the hashes are the journal's then
        vol.reopen()
    seq = vol.core.seal()
    with vol.gather(seq) as gather, UploadPlan(gather, VOLUME) as plan:
        entries = list(gather.entries())
        chunks = plan.chunks()
        whole = Counter(e.block // CHUNK_BLOCKS for e in entries if e.mask | e.zero_mask == FULL)
        masks = Counter(e.block // CHUNK_BLOCKS for e in entries if e.zero_mask)
        assert [c.chunk for c in chunks] == sorted({e.block // CHUNK_BLOCKS for e in entries})
        assert all((c.whole, c.zeros) == (whole[c.chunk], masks[c.chunk]) for c in chunks)

        keep = {c.chunk for c in chunks if keep_seed >> (c.chunk % 2) & 1}
        zeros = [GatherExtent(e.block, min(e.count, 50)) for e in sorted(gather.extents())]
        jobs = plan.cut(bytes(c.chunk in keep for c in chunks), zeros, pack_bytes, max_items)
        packs = list(packs_of(items_of(entries, keep, zeros), pack_bytes, max_items))
        assert planned(plan, jobs) == packs

        payloads = payloads_of(gather)
        for job, items in zip(jobs, packs, strict=True):
            area, index = encoded(items, payloads)
            assert built(plan, job) == (
                area,
                encode_records(index),
                tuple(sorted({item.block // CHUNK_BLOCKS for item in items})),
            )
    vol.close()


@pytest.mark.parametrize("kind", ["random", "pattern"])
def test_the_object_is_the_same_byte_for_byte(
    rig: CoreRig, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secrets.token_bytes", lambda size: b"n" * size)
    vol = Ops(rig, rig.tmp / "log" / "id", VOLUME).open()
    vol.scatter(5, 60, kind, 1)
    vol.write(0, 32, kind, 100)
    vol.zero(40, 3)
    objects: list[tuple[str, bytes]] = []

    def put(key: str, body: list[Any]) -> None:
        objects.append((key, b"".join(body)))

    with vol.gather(vol.core.seal()) as gather, UploadPlan(gather, VOLUME) as plan:
        (job,) = plan.cut(b"\1" * len(plan.chunks()), [GatherExtent(3000, 2)], 32 * MIB, MAX_ENTRIES - 1)
        area, entries = encoded(plan.items(job), payloads_of(gather))
        old = put_pack(put, "p", b"v" * 16, area, entries, 0)
        body = memoryview(bytearray(HEADER_SIZE + job.plain))
        parts = plan.build(job, RULES, body)
        body[:HEADER_SIZE] = encode_header()
        new = put_body(put, "p", b"v" * 16, [body[: parts.end]], parts.records, parts.chunks, 0)
    assert objects[0] == objects[1]
    assert (old.ref, old.chunks, old.tail) == (new.ref, new.chunks, new.tail)
    key, data = objects[1]
    index = decode_index(key, data, len(data), new.ref.id)
    assert list(index.entries()) == list(new.index.entries()) == entries
    for entry in entries:
        if entry.mask:
            decode_payload(key, entry, data[entry.offset : entry.offset + entry.stored])


def test_a_pack_of_as_many_entries_as_there_may_be(rig: CoreRig) -> None:
    """Also where blocks of zeros come before one with data: once those were more than an index takes."""
    vol = rig.vol(size=1 << 40)
    far = 400_000
    vol.core.pwrite(far * BLOCK, pattern(1, SECTOR))
    with vol.gather(vol.core.seal()) as gather, UploadPlan(gather, 1 << 40) as plan:
        zeros = [GatherExtent(5, 300_000), GatherExtent(far + 1, 10)]
        jobs = plan.cut(b"\0", zeros, 32 * MIB, MAX_ENTRIES - 1)
        assert [job.items for job in jobs] == [MAX_ENTRIES - 1, 300_000 - MAX_ENTRIES + 1 + 1 + 10]
        items = [GatherEntry(5 + i, 0, FULL) for i in range(MAX_ENTRIES - 1)]
        area, entries = encoded(items, {})
        assert built(plan, jobs[0])[:2] == (area, encode_records(entries))
        assert plan.items(jobs[1])[-11:] == [
            GatherEntry(far, 1, 0),
            *(GatherEntry(far + 1 + i, 0, FULL) for i in range(10)),
        ]


def test_blocks_at_the_end_of_the_volume(rig: CoreRig) -> None:
    """Whole is a block that has every sector within the volume; those beyond a shrunken end do not count."""
    vol = rig.vol()
    vol.core.pwrite(0, pattern(1, 5 * SECTOR))
    vol.core.pwrite(3 * BLOCK, pattern(2, BLOCK))
    seq = vol.core.seal()
    with vol.gather(seq) as gather:
        for size, whole in [(5 * SECTOR, 1), (6 * SECTOR, 0), (5 * SECTOR - 1, 1), (4 * BLOCK, 1), (0, 0)]:
            with UploadPlan(gather, size) as plan:
                assert [tuple(chunk) for chunk in plan.chunks()] == [(0, whole, 0)]


def test_what_the_log_lost_is_in_no_pack(rig: CoreRig) -> None:
    vol = rig.vol()
    vol.core.pwrite(0, pattern(1, 4 * SECTOR))
    vol.core.pwrite(BLOCK, pattern(2, 4 * SECTOR))
    seq = vol.core.seal()
    segment = vol.segments()[0]
    segment.flip(segment.data_at(6))
    with vol.gather(seq) as gather, UploadPlan(gather, 64 * MIB) as plan:
        first, second = plan.cut(b"\0", [], 4 * SECTOR, MAX_ENTRIES - 1)
        assert len(built(plan, first)[1]) == 40
        with pytest.raises(CorruptLog, match=r"0000000000000001\.seg"):
            built(plan, second)


def test_packs_are_built_side_by_side(make_rig: Callable[..., CoreRig]) -> None:
    rig = make_rig(segment_bytes=256 * SECTOR)
    vol = Ops(rig, rig.tmp / "log" / "id", VOLUME).open()
    for i in range(64):
        vol.write(i * SECTORS, SECTORS, "pattern" if i % 2 else "random", i)
    with vol.gather(vol.core.seal()) as gather, UploadPlan(gather, VOLUME) as plan:
        jobs = plan.cut(b"\0", [], 4 * BLOCK, MAX_ENTRIES - 1)
        alone = [built(plan, job) for job in jobs]
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(lambda job: built(plan, job), jobs)) == alone


def test_what_does_not_fit_is_refused(rig: CoreRig) -> None:
    vol = rig.vol()
    vol.core.pwrite(0, pattern(1, 4 * SECTOR))
    with vol.gather(vol.core.seal()) as gather, UploadPlan(gather, 64 * MIB) as plan:
        with pytest.raises(ValueError, match="chunk"):
            plan.cut(b"", [], MIB, 10)
        (job,) = plan.cut(b"\0", [], MIB, 10)
        with pytest.raises(CoreError, match="once"):
            plan.cut(b"\0", [], MIB, 10)
        body = memoryview(bytearray(HEADER_SIZE + job.plain))
        with pytest.raises(CoreError, match="fit"):
            plan.build(job, RULES, body[:-1])
        with pytest.raises(ValueError, match="job"):
            plan.build(job._replace(number=1), RULES, body)
        with pytest.raises(ValueError, match="job"):
            plan.build(job._replace(items=2), RULES, body)
    with pytest.raises(Closed):
        plan.build(job, RULES, body)


def test_a_plan_of_nothing(rig: CoreRig, tmp_path: Path) -> None:
    with Gather(None, tmp_path / "absent", b"v" * 16, b"l" * 16, 1) as gather, UploadPlan(gather, 1) as plan:
        assert plan.chunks() == []
        assert plan.cut(b"", [], MIB, 10) == []
