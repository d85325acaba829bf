"""One fault in the files of a write log: right data, or an error that names the file. Never older data."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from core_rig import BLOCK, SECTOR, CoreRig, Vol, pattern
from mutate import bit_flip, copy_over, remove, sectors, swap, truncate, zero_fill, zero_sector

from glidefs.core.check import CoreError
from glidefs.core.gather import Gather
from glidefs.errors import CorruptLog, CorruptObject
from glidefs.offline.inspect import inspect, open_source

HEADER_FIELDS = {
    "magic": 0,
    "version": 8,
    "sectors": 12,
    "volume id": 16,
    "log id": 32,
    "boot id": 48,
    "seq": 64,
    "previous seq": 72,
    "previous end": 80,
    "pad": 84,
    "check": 88,
}
RECORD_FIELDS = {"sector": 0, "count": 8, "op": 12, "hash": 16, "check": 24}
VOUCH_FIELDS = {"from": 0, "to": 8, "pad": 16, "check": 24}
WITNESS_FIELDS = {"magic": 0, "version": 8, "volume id": 16, "log id": 32, "from": 48, "to": 56, "check": 64}


class Fault(NamedTuple):
    """Something that happens to the log in a directory."""

    name: str
    strike: Callable[[Path], None]


class Log(NamedTuple):
    """A log that was synced, kept aside: directory, what a volume over it reads, its second segment's end."""

    path: Path
    want: bytes
    foreign: Path


def history(vol: Vol) -> bytes:
    """Three segments, all synced: overwritten data, zeros, runs; the last one is not full."""
    for i in range(6):
        vol.core.pwrite(i * SECTOR, pattern(i, SECTOR))
    vol.core.flush()
    vol.core.pwrite(0, pattern(50, 4 * SECTOR))
    vol.core.zero(2 * SECTOR, SECTOR)
    vol.core.flush()
    for i in range(20):
        vol.core.pwrite((i % 8) * SECTOR, pattern(100 + i, SECTOR))
        if i % 5 == 4:
            vol.core.flush()
    vol.core.flush()
    return vol.core.pread(0, BLOCK)


def segment_faults(path: Path) -> Iterator[Fault]:
    """One fault each, in the file of a segment. ``path`` is one of a log that is whole."""
    name = path.name
    journal = 2 * SECTOR

    def at(what: str, strike: Callable[[Path], None]) -> Fault:
        return Fault(f"{name}: {what}", lambda directory: strike(directory / name))

    for field, offset in HEADER_FIELDS.items():
        for copy in (0, 1):
            yield at(f"{field} of header {copy}", lambda file, o=copy * SECTOR + offset: bit_flip(file, o))
    for slot in (0, 1):
        for field, offset in VOUCH_FIELDS.items():
            yield at(
                f"{field} of vouch {slot}",
                lambda file, o=SECTOR + 512 * (slot + 1) + offset: bit_flip(file, o),
            )
    for index in range(16):
        for field, offset in RECORD_FIELDS.items():
            yield at(
                f"{field} of record {index}",
                lambda file, o=journal + 32 * index + offset: bit_flip(file, o, 1),
            )
    for sector in sectors(path):
        yield at(f"sector {sector} lost", lambda file, s=sector: zero_sector(file, s))
        yield at(f"bit of sector {sector}", lambda file, s=sector: bit_flip(file, s * SECTOR + 300, 3))
    for length in (0, 1, 95, 96, SECTOR, SECTOR + 96, SECTOR + 600, journal, journal + 32, journal + 40):
        yield at(f"cut off at {length}", lambda file, n=length: truncate(file, n))
    for sector in range(3, path.stat().st_size // SECTOR):
        yield at(f"cut off at sector {sector}", lambda file, s=sector: truncate(file, s * SECTOR))
    yield at("all zeros", zero_fill)
    yield at("gone", remove)


def place_faults(log: Log) -> Iterator[Fault]:
    """Files in each other's place, and those of others."""
    names = [path.name for path in sorted(log.path.glob("*.seg"))]
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            yield Fault(f"{one} and {other} swapped", lambda d, a=one, b=other: swap(d / a, d / b))
            yield Fault(f"{one} over {other}", lambda d, a=one, b=other: copy_over(d / a, d / b))
            yield Fault(f"{other} over {one}", lambda d, a=one, b=other: copy_over(d / b, d / a))
        yield Fault(f"{one} again at the end", lambda d, a=one: copy_over(d / a, d / "00000000000000ff.seg"))
        yield Fault(
            f"{one} of another log", lambda d, a=one: copy_over(log.foreign / "0000000000000001.seg", d / a)
        )
    yield Fault("all segments gone", lambda d: [remove(path) for path in d.glob("*.seg")] and None)
    yield Fault("the directory gone", remove)


def witness_faults(path: Path) -> Iterator[Fault]:
    """One fault each in the witness file."""

    def at(what: str, strike: Callable[[Path], None]) -> Fault:
        return Fault(
            f"witness: {what}", lambda directory: strike(directory.with_name(f"{directory.name}.witness"))
        )

    for slot in (0, 1):
        for field, offset in WITNESS_FIELDS.items():
            yield at(f"{field} of slot {slot}", lambda file, o=slot * SECTOR + offset: bit_flip(file, o, 2))
        yield at(f"slot {slot} lost", lambda file, s=slot: zero_sector(file, s))
    for length in (0, 40, 72, SECTOR, SECTOR + 40):
        yield at(f"cut off at {length}", lambda file, n=length: truncate(file, n))
    yield at("all zeros", zero_fill)
    yield at("gone", remove)


@pytest.fixture
def log(rig: CoreRig) -> Log:
    vol = rig.vol(always_verify=True)
    want = history(vol)
    other = rig.vol(log_id=b"o" * 16)
    other.core.pwrite(0, pattern(99, SECTOR))
    other.core.flush()
    vol.close()
    other.close()
    assert len(vol.segments()) == 3
    return Log(vol.dir, want, other.dir)


def strike(rig: CoreRig, log: Log, fault: Fault, tmp: Path) -> str:
    """What comes of a fault: "right", or the error that names the file. Anything else fails."""
    where = tmp / "struck" / "id"
    shutil.rmtree(where.parent, ignore_errors=True)
    shutil.copytree(log.path, where)
    copy_over(log.path.with_name(f"{log.path.name}.witness"), where.with_name(f"{where.name}.witness"))
    fault.strike(where)
    offline = read_offline(where, log.want, fault)
    found = start(rig, where, log, fault)
    assert (offline == "right") == (found == "right"), f"{fault.name}: {offline} offline, {found} at a start"
    return found


def read_offline(where: Path, want: bytes, fault: Fault) -> str:
    """The same files read offline: what is lost is said, what is whole is right."""
    with Gather(None, where, b"v" * 16, b"l" * 16, 1, sent=0) as gather:
        damage = gather.damage
        data = bytearray(gather.nbytes(0, len(gather)))
        gather.fill(0, len(gather), data)
        mask, zeros = 0, 0
        for entry in gather.entries():
            assert entry.block == 0
            mask, zeros = entry.mask, entry.zero_mask
    lost = sum(((1 << count) - 1) << first for first, count in damage.sectors)
    assert not lost & (mask | zeros), fault.name
    if not damage.losses or all(loss.kind == "record" for loss in damage.losses):
        at = 0
        for sector in range(BLOCK // SECTOR):
            there = want[sector * SECTOR : (sector + 1) * SECTOR]
            if mask >> sector & 1:
                assert data[at : at + SECTOR] == there, f"{fault.name}: other data of sector {sector}"
                at += SECTOR
            elif not lost >> sector & 1:
                assert not there.strip(b"\0"), f"{fault.name}: sector {sector} is left out"
    for loss in damage.losses:
        assert str(where) in loss.why, f"{fault.name}: {loss.why} names no file"
    return damage.losses[0].why if damage.losses else "right"


def start(rig: CoreRig, where: Path, log: Log, fault: Fault) -> str:
    """What a volume over these files makes of it."""
    vol = Vol(rig, where, 64 << 20, volume_id=b"v" * 16, log_id=b"l" * 16, always_verify=True)
    try:
        vol.open()
    except (CorruptLog, CoreError) as error:
        text = str(error)
        assert str(where) in text, f"{fault.name}: {text} names no file"
        return text
    try:
        assert vol.core.pread(0, BLOCK) == log.want, f"{fault.name}: older data, and no error"
        vol.core.pwrite(BLOCK, pattern(7, SECTOR), fua=True)
        vol.reopen()
        assert vol.core.pread(0, BLOCK) == log.want, f"{fault.name}: older data after the next start"
        assert vol.core.pread(BLOCK, SECTOR) == pattern(7, SECTOR), fault.name
    finally:
        vol.close()
    return "right"


def outcomes(rig: CoreRig, log: Log, faults: Iterator[Fault], tmp: Path) -> dict[str, str]:
    return {fault.name: strike(rig, log, fault, tmp) for fault in faults}


def test_one_fault_in_a_segment(rig: CoreRig, log: Log, tmp_path: Path) -> None:
    found: dict[str, str] = {}
    for path in sorted(log.path.glob("*.seg")):
        found |= outcomes(rig, log, segment_faults(path), tmp_path)
    assert len(found) > 350
    for name, outcome in found.items():
        if " header " in name or " vouch " in name or "sector 0 lost" in name or "sector 1 lost" in name:
            assert outcome == "right", f"{name}: {outcome}"
        elif "sector 2 lost" in name or "gone" in name or "all zeros" in name:  # 2 is the journal
            assert "`glidefs attach NAME --take-over`" in outcome, f"{name}: {outcome}"
    assert len(set(found.values())) > 20  # each error names its record and file


def test_segments_in_each_others_place(rig: CoreRig, log: Log, tmp_path: Path) -> None:
    found = outcomes(rig, log, place_faults(log), tmp_path)
    for name, outcome in found.items():
        if name.endswith("again at the end"):
            assert outcome == "right", f"{name}: {outcome}"
        elif "swapped" in name or "over" in name:
            assert "the header is that of segment" in outcome, f"{name}: {outcome}"
        elif "another log" in name:
            assert "belongs to another log" in outcome, f"{name}: {outcome}"
        else:
            assert "is missing" in outcome, f"{name}: {outcome}"


def test_one_fault_in_the_witness_file(rig: CoreRig, log: Log, tmp_path: Path) -> None:
    found = outcomes(rig, log, witness_faults(log.path.with_name(f"{log.path.name}.witness")), tmp_path)
    assert len(found) > 20
    assert set(found.values()) == {"right"}


@pytest.mark.parametrize("sealed", [True, False])
def test_one_flush_is_enough(rig: CoreRig, tmp_path: Path, sealed: bool) -> None:
    """The only segment, synced once; sealed before the sync, so that no record of it could be written."""
    vol = rig.vol(always_verify=True)
    vol.core.pwrite(0, pattern(1, SECTOR))
    if sealed:
        vol.core.seal()
    vol.core.flush()
    want = vol.core.pread(0, BLOCK)
    vol.close()
    log = Log(vol.dir, want, vol.dir)
    found = outcomes(rig, log, segment_faults(vol.segments()[0].path), tmp_path)
    for name, outcome in found.items():
        if " header " in name or "sector 0 lost" in name or "sector 1 lost" in name:
            assert outcome == "right", f"{name}: {outcome}"
        elif "record 0" in name or "sector 2 lost" in name or "gone" in name or "all zeros" in name:
            assert outcome != "right", name


def test_the_end_of_a_journal_is_lost(make_rig: Callable[..., CoreRig]) -> None:
    """The witness file knows the first sync of a segment only; the last SYNC record went with the rest."""
    vol = make_rig(segment_bytes=512 * SECTOR).vol(always_verify=True)
    vol.core.pwrite(0, pattern(0, SECTOR), fua=True)
    for i in range(200):
        vol.core.pwrite((i % 8) * SECTOR, pattern(i, SECTOR))
    vol.core.flush()
    vol.close()
    zero_sector(vol.segments()[0].path, 3)  # records 128 to 255
    with pytest.raises(CorruptLog, match="record 128 was synced"):
        vol.open()


def test_a_damaged_header_is_made_good(rig: CoreRig, log: Log) -> None:
    path = log.path / "0000000000000002.seg"
    whole = path.read_bytes()
    for sector in (0, 1):
        bit_flip(path, sector * SECTOR + 20)
        vol = Vol(rig, log.path, 64 << 20, volume_id=b"v" * 16, log_id=b"l" * 16, always_verify=True)
        vol.open()
        assert vol.recovery.repaired == 1
        vol.close()
        assert path.read_bytes() == whole


def test_a_look_at_a_segment_needs_one_header(log: Log) -> None:
    path = log.path / "0000000000000002.seg"

    def look() -> dict[str, Any]:
        return inspect(open_source(None, str(path)))

    whole = look()
    assert whole["sequence"] == 2
    assert whole["note"] == "data is not verified here"
    for sector, name in enumerate(("first", "second")):
        kept = path.read_bytes()
        for damage in (
            lambda s=sector: zero_sector(path, s),
            lambda s=sector: bit_flip(path, s * SECTOR + 70),
        ):
            damage()
            found = look()
            assert f"the {name} copy of its header is damaged" in found.pop("note")
            assert found == {key: value for key, value in whole.items() if key != "note"}
            path.write_bytes(kept)
    bit_flip(path, 70)
    bit_flip(path, SECTOR + 70)
    with pytest.raises(CorruptObject, match="neither copy of the header"):
        look()


def test_a_look_at_a_segment_counts_what_is_valid(log: Log) -> None:
    path = log.path / "0000000000000001.seg"
    before = inspect(open_source(None, str(path)))["records"]
    bit_flip(path, 2 * SECTOR + 8)
    after = inspect(open_source(None, str(path)))["records"]
    assert after == {**before, "WRITE": before["WRITE"] - 1}


def test_the_first_format_is_refused_by_name(rig: CoreRig, log: Log) -> None:
    path = log.path / "0000000000000001.seg"
    fields = struct.pack(
        "<8sII16s16s16sQQII", b"GLIDELOG", 1, 16, b"v" * 16, b"l" * 16, b"b" * 16, 1, 0, 0, 0
    )
    path.write_bytes(fields + bytes.fromhex("c369385e90c35ca0") + bytes(8192))
    with pytest.raises(CoreError) as caught:
        Vol(rig, log.path, 64 << 20, volume_id=b"v" * 16, log_id=b"l" * 16).open()
    assert "written by GlideFS 0.1 format 1" in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_vouch_of_a_writer_that_lost_the_log_does_not_count(rig: CoreRig) -> None:
    """Its records behind the end that the next header names are no part of the log, synced or not."""
    vol = rig.vol(always_verify=True)
    vol.core.pwrite(0, pattern(1, SECTOR), fua=True)
    path = vol.segments()[0].path
    taken_over = path.read_bytes()
    vol.core.pwrite(0, pattern(2, SECTOR), fua=True)  # the old writer, after the take-over
    vol.close()
    late = path.read_bytes()
    path.write_bytes(taken_over)
    vol.open()
    vol.core.pwrite(SECTOR, pattern(3, SECTOR))
    path.write_bytes(late)
    vol.reopen()
    assert vol.core.pread(0, 2 * SECTOR) == pattern(1, SECTOR) + pattern(3, SECTOR)
