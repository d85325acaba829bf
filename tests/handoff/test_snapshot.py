"""What the predecessor describes for its successor, and what it keeps from one that would not understand."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

from glidefs.core.handoff import Connection, Position
from glidefs.errors import GlideError
from glidefs.handoff import coordinator as module
from glidefs.handoff.coordinator import HandoffCoordinator
from glidefs.handoff.protocol import CAPABILITIES, ConnectionCut, ExportCut


def coordinator(connection: Connection, monkeypatch: pytest.MonkeyPatch) -> tuple[HandoffCoordinator, int]:
    """One export with one connection, and the descriptor of that."""
    fd = os.open("/dev/null", os.O_RDONLY)
    volume = SimpleNamespace(core=None, fenced="", etag="e", root=SimpleNamespace(sequence=1))
    entry = SimpleNamespace(name="vm", volume=volume, transport=SimpleNamespace(kind="nbd"))
    about = SimpleNamespace(peer="pid=1", since=1.0)
    server: Any = SimpleNamespace(table=SimpleNamespace(about=lambda conn_id: about))
    nobody: Any = None
    entries: Any = [entry]
    made = HandoffCoordinator(nobody, nobody, nobody, server, nobody, entries)
    made._positions = {"vm": Position(0, 0, 0)}
    monkeypatch.setattr(module.handoff, "connections", lambda core: [(fd, connection)])
    return made, fd


NEEDS = {
    "": "",
    "nbd-structured": "has structured replies",
    "nbd-device": "is the kernel's",
    "nbd-changed": "has contexts of snapshots",
    "nbd-extended": "has extended headers",
}
"""What of a connection needs a capability, and what is said where that is not there."""


@pytest.mark.parametrize("capability", NEEDS)
@pytest.mark.parametrize("understood", [False, True])
def test_a_connection_that_the_successor_does_not_understand(
    monkeypatch: pytest.MonkeyPatch, capability: str, understood: bool
) -> None:
    """What a connection needs goes to who has it, or the handoff does not take place."""
    known = CAPABILITIES if understood else CAPABILITIES - {capability}
    structured, kernel = capability == "nbd-structured", capability == "nbd-device"
    extended = capability == "nbd-extended"
    changed = (1, 2) if capability == "nbd-changed" else ()
    modes = {"structured": structured, "kernel": kernel, "extended": extended}
    connection = Connection(7, False, 0, b"", b"", changed=changed, **modes)
    made, fd = coordinator(connection, monkeypatch)
    before = len(os.listdir("/proc/self/fd"))
    if capability and not understood:
        with pytest.raises(GlideError, match=f"pid=1 to vm, which {NEEDS[capability]}"):
            made.snapshot(known)
        assert len(os.listdir("/proc/self/fd")) == before
    else:
        cuts, sockets = made.snapshot(known)
        assert cuts[0].connections[0].state == connection
        for one in sockets:
            os.close(one)
    os.close(fd)


def test_after_a_revival_the_kernel_asks_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have asked for the same over another connection meanwhile: the old one ends unheard."""
    adopted: list[int] = []
    monkeypatch.setattr(module.handoff, "adopt", lambda core, fd, state: adopted.append(fd))
    ends = [os.open("/dev/null", os.O_RDONLY) for _ in range(2)]
    made, fd = coordinator(Connection(7, False, 0, b"", b""), monkeypatch)
    table: Any = made._server.table
    table.adopt = lambda about, core: None
    states = [Connection(8, False, 0, b"", b"", kernel=True), Connection(9, False, 0, b"", b"")]
    cut = ExportCut(
        "vm", Position(0, 0, 0), None, 1, "nbd", tuple(ConnectionCut(s, "p", 1.0) for s in states)
    )
    made.adopt_connections([cut], list(ends), kernel=False)
    assert adopted == ends[1:]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(ends[0])
    for one in (ends[1], fd):
        os.close(one)
