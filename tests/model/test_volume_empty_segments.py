"""Segments that held nothing to upload, and the log that is read again without them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from volume_rig import MIB, Rig

from glidefs.host.host import Host
from glidefs.store.memory import MemoryStore

SECTOR = 4096


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path, MemoryStore())
    yield rig
    for host, engine in list(rig.live):
        host.close()
        engine.close()


def settle_first(rig: Rig, host: Host) -> None:
    """The discard is drained and retired, then there is a write."""
    volume = rig.create(host, 64 * MIB, name="v")
    volume.core.zero(0, 64 * MIB)
    volume.drain(20)
    volume.retire_committed()
    volume.core.pwrite(0, b"x" * SECTOR, fua=True)


def write_first(rig: Rig, host: Host) -> None:
    """The write is in the next segment already when the discard is drained and retired."""
    volume = rig.create(host, 64 * MIB, name="v")
    volume.core.zero(0, 64 * MIB)
    sealed = volume.core.seal()
    volume.core.pwrite(0, b"x" * SECTOR, fua=True)
    host.uploader.upload(volume, sealed, volume.size)
    volume.retire_committed()


@pytest.mark.parametrize("life", [settle_first, write_first])
def test_a_discard_of_nothing_does_not_break_the_next_start(
    rig: Rig, life: Callable[[Rig, Host], None]
) -> None:
    """As mkfs does on a fresh export. ! No segment goes before the durable local root includes it: replay
    would call it missing."""
    host = rig.host()
    life(rig, host)
    (volume,) = host.volumes()
    root = volume.root
    volume.close()
    again = rig.reopen(host, root)
    assert again.core.pread(0, 2 * SECTOR) == b"x" * SECTOR + bytes(SECTOR)
    again.drain(20)
    again.retire_committed()
    assert again.core.pread(0, 2 * SECTOR) == b"x" * SECTOR + bytes(SECTOR)
