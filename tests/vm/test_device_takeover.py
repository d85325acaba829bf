"""Another host takes a volume whose guests have a device: they get errors, and the data is there."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from waiting import wait_for

pytest.importorskip("glidefs.core._core")

import device_rig as rig
from device_kinds import KINDS, no_nbd_leftovers
from node import MIB, Node

pytestmark = [pytest.mark.root, pytest.mark.timeout(1800 if rig.EMULATED else 300)]
DATA = 8 * MIB


@pytest.fixture
def hosts(place: Path) -> Iterator[tuple[Node, Node]]:
    """Two hosts with one store."""
    settings = {"upload": {"sync_interval": '"3s"'}}
    with contextlib.ExitStack() as stack:
        stack.enter_context(rig.no_leftovers())
        stack.enter_context(no_nbd_leftovers())
        first = stack.enter_context(rig.ended(Node(place / "a", settings=settings))).start()
        shared = {**settings, "store": {"url": f'"file://{first.store}"'}}
        second = stack.enter_context(rig.ended(Node(place / "b", settings=shared))).start()
        yield first, second


def written(device: str) -> bytes:
    """Random data at the beginning of a device."""
    data = os.urandom(DATA)
    subprocess.run(
        ["dd", f"of={device}", "bs=1M", "oflag=direct", "conv=notrunc", "status=none"], input=data, check=True
    )
    return data


def read(device: str) -> bytes:
    """The same part, not from the page cache."""
    command = ["dd", f"if={device}", "bs=1M", f"count={DATA // MIB}", "iflag=direct", "status=none"]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True).stdout


def fails(device: str) -> bool:
    """Whether requests to a device end with an error."""
    with contextlib.suppress(subprocess.CalledProcessError):
        read(device)
        return False
    return True


@pytest.mark.parametrize("transport", KINDS)
def test_another_host_takes_a_device_over(hosts: tuple[Node, Node], transport: str) -> None:
    first, second = hosts
    device = first.json("create", "moves", "--size", "256MiB", "--transport", transport)["device"]
    data = written(device)
    first.json("drain", "moves")
    taken = second.json("attach", "moves", "--take-over")
    assert taken["transport"] == transport
    assert taken["device"] != device
    assert read(taken["device"]) == data
    wait_for(lambda: first.json("show", "moves")["state"] == "fenced", "the first host knows")
    wait_for(lambda: fails(device), "its guests get errors, and wait for nothing")
    assert written(taken["device"]) == read(taken["device"])
    first.json("detach", "moves")
    second.json("remove", "moves")
    assert not Path(device).exists()
    assert not Path(taken["device"]).exists()
