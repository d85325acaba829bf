"""All exports at one moment: the same as each by itself, with one question to the core, and never stale."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from fork_rig import MIB, Node

from glidefs.core.volume import CoreVolume
from glidefs.exports.requests import AttachRequest, ExportStatus
from glidefs.manifest import local


def steady(status: ExportStatus) -> dict[str, object]:
    """A status without what changes with the time."""
    volume = dict(status.volume or {})
    volume.pop("oldest_dirty_seconds", None)
    return {"name": status.name, "size": status.size, "state": status.state, "volume": volume}


def test_a_list_says_what_each_says(node: Node) -> None:
    for index in range(5):
        node.create(f"v{index}", (index + 1) * MIB, wait=True)
    node.core("v1").pwrite(0, bytes(4096))
    node.router.detach("v3")
    listed = node.router.listing()
    assert [status.name for status in listed] == ["v0", "v1", "v2", "v4"]
    assert [steady(status) for status in listed] == [steady(node.router.show(of.name)) for of in listed]
    assert listed[1].volume is not None
    assert listed[1].volume["dirty_bytes"] > 0


def test_the_core_is_asked_once(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    for index in range(5):
        node.create(f"v{index}", MIB)

    def alone(core: CoreVolume) -> None:
        raise AssertionError("a volume was asked by itself")

    monkeypatch.setattr(CoreVolume, "info", alone)
    assert [status.state for status in node.router.listing()] == ["serving"] * 5
    assert [seen.info is not None for seen in node.router.survey()] == [True] * 5


def test_a_verb_and_a_write_are_seen_at_once(node: Node) -> None:
    node.create("v", MIB)
    for size in (2 * MIB, 3 * MIB):
        node.router.resize("v", size)
        (status,) = node.router.listing()
        assert (status.size, (status.volume or {})["size"]) == (size, size)
    node.core("v").pwrite(0, bytes(4096))
    assert (node.router.listing()[0].volume or {})["dirty_bytes"] > 0
    node.router.drain("v")
    assert (node.router.listing()[0].volume or {})["dirty_bytes"] == 0
    node.router.detach("v")
    assert node.router.listing() == []
    node.router.attach("v", AttachRequest())
    assert [status.name for status in node.router.listing()] == ["v"]


def test_a_volume_that_closes_meanwhile(node: Node) -> None:
    """What its entry still names is closed: the export is told of without figures, the others with them."""
    for name in ("a", "b", "c"):
        node.create(name, MIB)
    volume = node.router.table.get("b").volume
    assert volume is not None
    volume.close()
    assert [(status.state, status.volume is not None) for status in node.router.listing()] == [
        ("serving", True),
        ("failed", False),
        ("serving", True),
    ]
    assert [seen.info is not None for seen in node.router.survey()] == [True, False, True]


def test_a_start_reads_the_root_of_no_volume_that_has_a_record_beforehand(
    make_node: Callable[..., Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is looked for is what has no record: to read the roots of thousands that have one took seconds."""
    node = make_node()
    for name in ("a", "b"):
        node.create(name, MIB, wait=True)
    node.close()

    def find(path: Path) -> None:
        raise AssertionError(f"{path} is read")

    monkeypatch.setattr(local, "_find", find)
    again = make_node()
    again.router.start()
    assert again.router.wait_tried(60)
    assert [status.state for status in again.router.listing()] == ["serving"] * 2
