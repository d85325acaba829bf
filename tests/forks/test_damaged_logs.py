"""Reading a log offline: what was synced and is bad is said and refused, or left out on demand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mutate
import pytest
from fork_rig import MIB, CountingStore, Node

from glidefs.errors import CorruptLog, GlideError, InUse
from glidefs.exports.logs import verbs as log_verbs

MakeNode = Callable[..., Node]
SIZE = 16 * MIB
SECTOR = 4096
BIG = 700 * 1024
"""Bytes of a write of which two fit into a segment."""


def sectors(*letters: bytes) -> bytes:
    return b"".join(letter * SECTOR for letter in letters)


def dirty(make_node: MakeNode, memory: CountingStore) -> Node:
    """``v``: what the store has, then three segments of flushed data that it has not."""
    node = make_node("a", segment_bytes=2 * MIB)
    node.create("v", SIZE, wait=True)
    core = node.core("v")
    core.pwrite(0, sectors(b"A"))
    node.router.drain("v", 20.0)
    volume = node.router.table.get("v").volume
    assert volume is not None
    volume.retire_committed()
    memory.set_down(True)
    for i in range(6):
        core.pwrite(i * MIB, bytes([ord("a") + i]) * BIG)
        core.flush()
    return node


def segments(node: Node) -> list[Path]:
    return sorted((node.home / "logs").rglob("*.seg"))


def only_log(node: Node) -> tuple[str, str]:
    (entry,) = node.router.logs.list()
    return entry["volume_id"], entry["log_id"]


def lost_data(path: Path) -> None:
    """One bit of the last sector that was written: the file may end behind it."""
    data = path.read_bytes().rstrip(b"\0")
    mutate.bit_flip(path, (len(data) - 1) // SECTOR * SECTOR + 7)


def both_headers(path: Path) -> None:
    mutate.zero_fill(path, 0, 2 * SECTOR)


def journal(path: Path) -> None:
    mutate.zero_sector(path, 2)


DAMAGE = {"data": lost_data, "headers": both_headers, "journal": journal, "missing": Path.unlink}


@pytest.mark.parametrize("which", [0, 1, 2], ids=["first", "middle", "last"])
@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_log_is_exported_on_demand_only(
    make_node: MakeNode, memory: CountingStore, kind: str, which: int
) -> None:
    node = dirty(make_node, memory)
    assert len(segments(node)) == 3
    path = segments(node)[which]
    image = node.home / "image"
    whole = node.router.logs.export(*only_log(node), str(image))
    assert whole["bytes"] == 6 * BIG
    assert not whole["note"]
    image.unlink()
    DAMAGE[kind](path)
    named = str(path.parent) if kind == "missing" else str(path)
    with pytest.raises(CorruptLog, match=r"nothing was exported; .*--partial") as caught:
        node.router.logs.export(*only_log(node), str(image))
    assert named in str(caught.value)
    assert path.stem in str(caught.value)
    assert not image.exists()
    result = node.router.logs.export(*only_log(node), str(image), partial=True)
    assert named in result["note"]
    assert "lost" in result["note"]
    assert result["bytes"] < 6 * BIG
    found = image.read_bytes()
    for extent in result["extents"]:
        for at in range(extent["offset"], extent["offset"] + extent["length"], SECTOR):
            assert found[at : at + SECTOR] == sectors(bytes([ord("a") + at // MIB]))
    if kind == "data":
        ((first, count),) = result["lost"]["sectors"]
        assert f"{count * SECTOR} bytes at {first * SECTOR}+{count * SECTOR}" in result["note"]
        assert result["bytes"] == 6 * BIG - count * SECTOR
    else:
        assert "place in the volume is not known" in result["note"]


def test_what_a_damaged_log_holds_is_not_counted(make_node: MakeNode, memory: CountingStore) -> None:
    """Neither a deletion nor a forced detach calls the log of less than it held the whole of it."""
    node = dirty(make_node, memory)
    node.router.detach("v", 0.1, force=True)
    lost_data(segments(node)[1])
    with pytest.raises(InUse, match=r"its content is not known .*bad records"):
        node.router.logs.delete(*only_log(node))
    assert segments(node)


def test_torn_records_are_said(make_node: MakeNode, memory: CountingStore) -> None:
    node = dirty(make_node, memory)
    node.core("v").pwrite(8 * MIB, sectors(b"T"))  # not flushed
    node.close()
    again = make_node("a", segment_bytes=2 * MIB)
    lost_data(segments(again)[-1])
    image = again.home / "image"
    result = again.router.logs.export(*only_log(again), str(image))
    assert result["note"] == "1 torn records, which were never synced, are left out"
    assert result["bytes"] == 6 * BIG


def test_who_does_not_know_what_the_store_has_says_so(make_node: MakeNode, memory: CountingStore) -> None:
    node = dirty(make_node, memory)
    node.close()
    for path in (node.home / "state" / "volumes").glob("*/root"):
        path.unlink()
    again = make_node("a", segment_bytes=2 * MIB)
    result = again.router.logs.export(*only_log(again), str(again.home / "image"))
    assert "its first segments may be missing" in result["note"]


def test_segments_that_go_while_they_are_read_are_no_damage(
    make_node: MakeNode, memory: CountingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = dirty(make_node, memory)
    export = log_verbs.logs.export_log
    calls: list[int] = []

    def slow(directory: Path, *args: object, **options: object) -> object:
        calls.append(len(segments(node)))
        if len(calls) == 1:  # uploaded and retired in the middle of it
            memory.set_down(False)
            node.router.drain("v", 20.0)
            volume = node.router.table.get("v").volume
            assert volume is not None
            volume.retire_committed()
            raise CorruptLog(str(directory), "what was read was another life of the file")
        return export(directory, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("glidefs.exports.logs.verbs.logs.export_log", slow)
    result = node.router.logs.export(*only_log(node), str(node.home / "image"))
    assert calls[0] == 3
    assert len(calls) == 2
    assert not result["note"]


def test_a_file_of_another_log_is_damage(make_node: MakeNode, memory: CountingStore) -> None:
    node = dirty(make_node, memory)
    node.create("w", SIZE)
    node.core("w").pwrite(0, sectors(b"W"))
    node.core("w").flush()
    ours = [path for path in segments(node) if path.parent.name == only_log_of(node, "v")[1]]
    (other,) = [path for path in segments(node) if path not in ours]
    mutate.copy_over(other, ours[1])
    image = node.home / "image"
    with pytest.raises(GlideError, match="belongs to another volume"):
        node.router.logs.export(*only_log_of(node, "v"), str(image))
    result = node.router.logs.export(*only_log_of(node, "v"), str(image), partial=True)
    assert str(ours[1]) in result["note"]
    assert 2 * BIG < result["bytes"] < 5 * BIG


def only_log_of(node: Node, name: str) -> tuple[str, str]:
    (entry,) = [entry for entry in node.router.logs.list() if entry["export"] == name]
    return entry["volume_id"], entry["log_id"]
