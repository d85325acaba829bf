"""Export records: round trips, atomic files, damage."""

from __future__ import annotations

import json
import os
from pathlib import Path

import msgspec
import pytest
from blake3 import blake3

from glidefs.errors import CorruptObject, NewerFormat
from glidefs.formats import atomic, export_record
from glidefs.formats.export_record import ExportRecord

RECORD = ExportRecord(
    name="vm-1",
    volume_id=bytes(range(16)),
    log_id=b"l" * 16,
    prefix="default",
    manifest_hash=b"h" * 32,
    size=10 << 30,
    device_id=3,
    source='base:"ubuntu" \u00fc',
)


def test_save_and_load(tmp_path: Path) -> None:
    path = tmp_path / "vm-1.json"
    with pytest.raises(FileNotFoundError):
        export_record.load(path)
    export_record.save(path, RECORD)
    assert export_record.load(path) == RECORD
    other = msgspec.structs.replace(
        RECORD, attached=False, device_id=None, root_published=True, fenced="node b has it", fenced_at=7
    )
    export_record.save(path, other)
    assert export_record.load(path) == other
    assert [entry.name for entry in tmp_path.iterdir()] == ["vm-1.json"]
    assert path.stat().st_mode & 0o777 == 0o600
    # An operator can read it.
    assert json.loads(path.read_text())["record"]["volume_id"] == RECORD.volume_id.hex()


def test_every_bit_flip_and_every_truncation() -> None:
    data = export_record.encode_record(RECORD)
    for bit in range(len(data) * 8):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            assert export_record.decode_record("f", bytes(damaged)) == RECORD
            assert bit // 8 == len(data) - 1, "only the newline at the end carries nothing"
        except CorruptObject:
            continue
    for length in range(len(data) - 1):
        with pytest.raises(CorruptObject):
            export_record.decode_record("f", data[:length])


@pytest.mark.parametrize(
    "changes",
    [{"name": "../x"}, {"prefix": ".x"}, {"size": 100}, {"log_id": b""}, {"flush": "never"}, {"version": 1}],
    ids=str,
)
def test_illegal_records_are_not_written(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r".+"):
        export_record.encode_record(msgspec.structs.replace(RECORD, **changes))


@pytest.mark.parametrize(("version", "why"), [(1, "an older GlideFS"), (3, "a newer GlideFS")])
def test_another_version_is_refused_by_name(version: int, why: str) -> None:
    document = json.loads(export_record.encode_record(RECORD))
    document["record"]["version"] = version
    body = msgspec.json.encode(document["record"])
    document["checksum"] = blake3(body).hexdigest()
    with pytest.raises(NewerFormat, match=rf"version {version} .*{why}"):
        export_record.decode_record("f", msgspec.json.encode(document))


def test_too_long_a_file(tmp_path: Path) -> None:
    path = tmp_path / "r"
    path.write_bytes(b" " * (export_record.MAX_RECORD + 1))
    with pytest.raises(CorruptObject, match="too long"):
        export_record.load(path)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r"
    atomic.write_file_atomic(path, b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        atomic.write_file_atomic(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["r"]


def test_order_of_durability(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """File data first, then the name, then the directory: any other order can lose both versions."""
    events: list[str] = []
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(fd: int) -> None:
        events.append("fsync dir" if os.path.isdir(f"/proc/self/fd/{fd}") else "fsync file")
        real_fsync(fd)

    def rename(*names: str) -> None:
        events.append("rename")
        real_rename(*names)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    atomic.write_file_atomic(tmp_path / "r", b"x")
    assert events == ["fsync file", "rename", "fsync dir"]
