"""An export that changes its transport while nobody uses it."""

from __future__ import annotations

from typing import Any

import pytest
from fork_rig import MIB, Node, NoGuests
from msgspec.structs import replace

from glidefs.errors import ConfigError, DeviceError, InUse, NotSupported
from glidefs.exports.requests import CreateRequest
from glidefs.transport.base import Attachment, Endpoint

SIZE = 16 * MIB


class Devices(NoGuests):
    """Devices of a kind. ``refuse`` makes the next start fail; ``lacking``: why there is no driver."""

    def __init__(self, kind: str, path: str) -> None:
        super().__init__()
        self.kind = kind
        self.path = path
        self.lacking: str | None = None
        self.refuse = ""
        self.present: dict[str, int] = {}

    def missing(self) -> str | None:
        return self.lacking

    def start(self, export: Attachment) -> Endpoint:
        if self.refuse:
            raise DeviceError(self.refuse)
        number = export.device_id if export.device_id is not None else 7
        self.present[export.name] = number
        return Endpoint(f"{self.path}{number}", number)

    def stop(self, name: str) -> None:
        self.present.pop(name, None)


@pytest.fixture
def kinds(node: Node) -> dict[str, Devices]:
    """Beside the socket, two kinds of devices."""
    made = {"ublk": Devices("ublk", "/dev/ublkb"), "nbd-device": Devices("nbd-device", "/dev/nbd")}
    transports: Any = node.router._transports
    transports.update(made)
    return made


def test_every_way_and_back(node: Node, kinds: dict[str, Devices]) -> None:
    node.create("v", SIZE)
    node.core("v").pwrite(0, b"x" * 4096)
    for kind, device in (
        ("ublk", "/dev/ublkb7"),
        ("nbd-device", "/dev/nbd7"),
        ("nbd", "none://v"),
        ("auto", "/dev/ublkb7"),
    ):
        status = node.router.change_transport("v", kind)
        assert (status.device, status.transport) == (device, "ublk" if kind == "auto" else kind)
        assert sum(len(one.present) for one in kinds.values()) == (kind != "nbd")
        assert node.core("v").pread(0, 4096) == b"x" * 4096
        record = node.router.table.get("v").record
        assert record is not None
        assert record.transport == kind
    node.router.remove("v")
    assert not any(one.present for one in kinds.values())


def test_not_while_somebody_uses_it(node: Node, kinds: dict[str, Devices]) -> None:
    node.create("v", SIZE)
    node.transport.guests["v"] = "a client is connected"
    with pytest.raises(InUse, match="a client is connected"):
        node.router.change_transport("v", "ublk")
    assert node.router.show("v").device == "none://v"
    assert node.router.change_transport("v", "nbd").device == "none://v"


def test_one_that_fails_leaves_the_one_before(node: Node, kinds: dict[str, Devices]) -> None:
    node.create("v", SIZE)
    node.router.change_transport("v", "ublk")
    kinds["nbd-device"].refuse = "connect: Invalid argument"
    with pytest.raises(DeviceError, match="Invalid argument"):
        node.router.change_transport("v", "nbd-device")
    status = node.router.show("v")
    assert (status.state, status.transport, status.device) == ("serving", "ublk", "/dev/ublkb7")
    kinds["nbd-device"].lacking = "the kernel's nbd driver is not loaded"
    with pytest.raises(NotSupported, match="not loaded; or use --transport nbd"):
        node.router.change_transport("v", "nbd-device")
    with pytest.raises(ConfigError, match="not known"):
        node.router.change_transport("v", "vhost")
    assert node.router.show("v").state == "serving"


def test_auto_stays_with_what_an_export_had(node: Node, kinds: dict[str, Devices]) -> None:
    """Its guests are there: a driver that is loaded later changes nothing until somebody says so."""
    for one in kinds.values():
        one.lacking = "not here"
    node.router.create("v", CreateRequest(size=SIZE, transport="auto"))
    assert node.router.show("v").transport == "nbd"
    kinds["nbd-device"].lacking = None
    entry = node.router.table.get("v")
    guests = node.router.opener.guests
    guests.stop(entry, remove_device=False)
    guests.start(entry)
    assert (entry.status().transport, "had nbd before" in entry.status().reason) == ("nbd", True)
    assert node.router.change_transport("v", "auto").transport == "nbd-device"
    kinds["ublk"].lacking = None
    guests.stop(entry, remove_device=False)
    guests.start(entry)
    assert entry.status().device == "/dev/nbd7"
    assert "had nbd-device before" in entry.status().reason


def test_what_cannot_be_had_any_more_leaves_no_device(node: Node, kinds: dict[str, Devices]) -> None:
    node.create("v", SIZE)
    node.router.change_transport("v", "auto")
    entry = node.router.table.get("v")
    guests = node.router.opener.guests
    guests.stop(entry, remove_device=False)
    kinds["nbd-device"].lacking = "the driver is not loaded"
    assert entry.record is not None
    entry.record = replace(entry.record, served_by="nbd-device")
    guests.start(entry)
    assert entry.status().transport == "ublk"
    assert entry.record.served_by == "ublk"


def test_auto_says_what_is_missing(node: Node, kinds: dict[str, Devices]) -> None:
    """In the order of preference, each with its reason."""
    kinds["ublk"].lacking = "Linux 6.1 has none"
    node.create("v", SIZE)
    status = node.router.change_transport("v", "auto")
    assert (status.transport, status.reason) == ("nbd-device", "no ublk: Linux 6.1 has none")
    kinds["nbd-device"].lacking = "only root can"
    status = node.router.change_transport("v", "auto")
    assert (status.transport, status.reason) == (
        "nbd",
        "no ublk: Linux 6.1 has none; no nbd-device: only root can",
    )
