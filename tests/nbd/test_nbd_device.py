"""`/dev/nbdN` over a driver that is a Python object, whose requests reach the core all the same.

With the kernel's own: tests/vm/test_nbd_kernel.py.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_nbd_kernel import Device, FakeKernel
from nbd_client import FLUSH, READ, TRIM, WRITE
from nbd_serve import MIB, Served
from waiting import DEADLINE, wait_for

from glidefs.config import NbdDeviceSettings
from glidefs.core import handoff
from glidefs.core.check import CoreError
from glidefs.core.volume import CoreVolume
from glidefs.errors import DeviceError, NotSupported
from glidefs.transport.base import Attachment
from glidefs.transport.device.names import DeviceNames
from glidefs.transport.nbd_device.device import NbdDeviceTransport, path_of
from glidefs.transport.nbd_device.netlink import DeviceShape

SIZE = 64 * MIB


class Host(Served):
    """A host whose NBD connections are those of devices, too."""

    def __init__(self, directory: Path, kernel: FakeKernel, **config: Any) -> None:
        self.home = directory
        self.kernel = kernel
        self.gone: list[str] = []
        self.busy = False
        super().__init__(directory, **config)
        self.transport = self.make()

    def make(self) -> NbdDeviceTransport:
        """The transport of one daemon, of those that the directory has one after another."""
        (self.home / "state").mkdir(exist_ok=True)
        return NbdDeviceTransport(
            NbdDeviceSettings(),
            self.home / "state",
            self.server.table,
            self.on_gone,
            names=DeviceNames("nbd", self.home / "run"),
            control=self.kernel,  # type: ignore[arg-type]
            block=self.kernel.block,
            missing=lambda: None,
            has_node=lambda index: True,
        )

    def on_gone(self, name: str) -> bool:
        self.gone.append(name)
        return not self.busy

    def _events(self) -> None:
        for event in self.engine.events_next(50):
            name = self.server.connection_closed(event.a, event.b)
            if hasattr(self, "transport"):
                self.transport.connection_ended(name)

    def close(self) -> None:
        self.transport.close()
        super().close()


@pytest.fixture
def kernel(tmp_path: Path) -> FakeKernel:
    return FakeKernel(tmp_path / "block")


@pytest.fixture
def host(tmp_path: Path, kernel: FakeKernel) -> Iterator[Host]:
    with Host(tmp_path, kernel) as made:
        yield made


def export(core: CoreVolume, name: str = "vm", device_id: int | None = None, **other: Any) -> Attachment:
    values: dict[str, Any] = {"volume_id": name.encode().ljust(16, b"."), "size": SIZE, "read_only": False}
    return Attachment(name=name, core=core, device_id=device_id, **(values | other))


def started(host: Host, name: str = "vm", **other: Any) -> tuple[Device, Attachment]:
    attachment = export(host.add(name, SIZE), name, **other)
    index = host.transport.start(attachment).device_id
    assert index is not None
    return host.kernel.devices[index], attachment


def test_reads_and_writes(host: Host) -> None:
    device, _ = started(host)
    device.request_timeout = 60.0  # its connection stays the first one
    assert device.pread(0, 8192) == bytes(8192)
    device.pwrite(4096, b"x" * 4096)
    assert device.pread(0, 12288) == bytes(4096) + b"x" * 4096 + bytes(4096)
    assert device.io(TRIM, 4096, 4096).error == 0
    assert device.io(FLUSH).error == 0
    assert device.pread(4096, 4096) == bytes(4096)
    assert [c.peer for c in host.server.connections("vm")] == ["/dev/nbd0"]
    host.transport.stop("vm")
    assert not host.kernel.devices
    assert not host.server.connections("vm")


def test_the_kernel_is_told_what_the_volume_is(host: Host) -> None:
    device, _ = started(host, read_only=True)
    shape = device.shape
    assert (shape.size, shape.block_size, shape.read_only) == (SIZE, 512, True)
    assert (shape.request_timeout, shape.dead_timeout) == (10, 7 * 86400)
    assert shape.identifier.startswith("glidefs:")
    assert device.io(WRITE, 0, b"x" * 512).error == errno.EPERM


def test_numbers_are_those_of_nobody(host: Host, kernel: FakeKernel) -> None:
    """Neither one that another program connected, nor one that it only has open, nor one of before."""
    kernel.show(0, 77, "nbd-client", SIZE)
    kernel.show(2, 78, "glidefs:0123456789abcdef", 0)
    first, _ = started(host)
    second, _ = started(host, "other")
    third, _ = started(host, "third", device_id=7)
    assert [d.directory.name for d in (first, second, third)] == ["nbd1", "nbd3", "nbd7"]
    assert (host.home / "run" / "nbd" / "7").read_text().startswith("GLIDEFS_NAME=third\n")


def test_a_number_that_another_program_was_faster_to_take(host: Host, kernel: FakeKernel) -> None:
    kernel.devices[0] = Device(kernel.block / "x", DeviceShape(1, 512, False, 1, 1, "y"), 9.0)
    device, _ = started(host)
    assert device.directory.name == "nbd1"
    kernel.devices.pop(0).end()


def test_a_kernel_that_refuses_leaves_nothing(host: Host, kernel: FakeKernel) -> None:
    kernel.refuse = errno.EPERM
    with pytest.raises(DeviceError, match="refused"):
        started(host)
    assert not host.server.connections("vm")
    assert not list((host.home / "run" / "nbd").glob("0.*"))


def test_a_lost_connection_is_made_anew_and_requests_come_again(host: Host) -> None:
    device, _ = started(host)
    device.pwrite(0, b"a" * 4096)
    for _ in range(3):
        device.lose()
        assert device.pread(0, 4096) == b"a" * 4096
        device.pwrite(0, b"a" * 4096)


def test_a_request_that_waits_too_long_is_asked_again_and_answered_once(host: Host) -> None:
    """The store is away: the kernel gives up one connection after the other, guests just wait."""
    device, _ = started(host)
    host.answering.clear()
    waiting = device.io(READ, 8 * MIB, 4096, wait=False)
    wait_for(lambda: device.sent_again >= 3, "the request is sent again")
    assert not waiting.done.is_set()
    device.pwrite(0, b"n" * 4096)  # what needs no store goes on
    assert device.pread(0, 4096) == b"n" * 4096
    host.answering.set()
    assert waiting.done.wait(DEADLINE)
    assert (waiting.error, waiting.answer) == (0, bytes(4096))


def test_what_an_ended_connection_asked_for_is_not_carried_out_later(tmp_path: Path) -> None:
    """A write whose copy was answered must not come again behind a newer one to the same place.

    The write waits for the base of its sector, then its connection ends; the copy waits, too.
    """
    kernel = FakeKernel(tmp_path / "block", request_timeout=0.2)
    with Host(tmp_path, kernel) as host:
        device, _ = started(host)
        host.answering.clear()
        old = device.io(WRITE, 8 * MIB, b"o" * 512, wait=False)
        wait_for(lambda: device.sent_again >= 2, "the write is sent again")
        host.answering.set()
        assert old.done.wait(DEADLINE)
        assert old.error == 0
        device.pwrite(8 * MIB, b"n" * 512)
        for _ in range(20):
            assert device.pread(8 * MIB, 512) == b"n" * 512
            time.sleep(0.01)


def test_a_daemon_that_comes_back_takes_its_device_up(host: Host, kernel: FakeKernel) -> None:
    device, attachment = started(host)
    device.pwrite(0, b"a" * 4096)
    host.transport.release("vm")
    waiting = device.io(READ, 0, 4096, wait=False)
    host.transport.close()
    host.transport = host.make()
    again = export(attachment.core, device_id=0, size=2 * SIZE)
    queue = kernel.block / "nbd0" / "queue"
    assert {path.name for path in queue.iterdir()} == {"scheduler", "read_ahead_kb"}
    for path in queue.iterdir():
        path.unlink()
    assert host.transport.start(again).device == "/dev/nbd0"
    assert not list(queue.iterdir()), "the kernel would wait for the request, which waits for us"
    assert waiting.done.wait(DEADLINE)
    assert waiting.answer == b"a" * 4096
    assert kernel.calls.count("connect 0") == 1
    wait_for(lambda: f"resize 0 {2 * SIZE}" in kernel.calls, "the keeper tells the size")


def test_a_device_of_another_directory_is_left_alone(host: Host, kernel: FakeKernel) -> None:
    _, attachment = started(host)
    host.transport.release("vm")
    host.transport.close()
    for path in (host.home / "state").iterdir():
        path.unlink()
    (host.home / "state").rmdir()
    host.home = host.home / "elsewhere"
    host.home.mkdir()
    host.transport = host.make()
    assert host.transport.start(export(attachment.core, device_id=0)).device == "/dev/nbd1"
    host.transport.discard("vm", attachment.volume_id, 0)
    assert "disconnect 0" not in kernel.calls
    assert 0 in kernel.devices


def test_a_device_without_a_record_is_ended(host: Host, kernel: FakeKernel) -> None:
    """Its record is lost: what guests wrote to it may be, too."""
    _, attachment = started(host)
    host.transport.release("vm")
    host.transport.close()
    host.transport = host.make()
    assert host.transport.start(export(attachment.core)).device == "/dev/nbd0"
    assert kernel.calls[-2:] == ["disconnect 0", "connect 0"]


def test_an_export_that_ends_unserved_takes_its_device_along(host: Host, kernel: FakeKernel) -> None:
    _, attachment = started(host)
    host.transport.release("vm")
    host.transport.discard("vm", attachment.volume_id, 0)
    assert not kernel.devices


def test_an_open_device_keeps_its_number(
    host: Host, kernel: FakeKernel, caplog: pytest.LogCaptureFixture
) -> None:
    _, attachment = started(host)
    kernel.open.add(0)
    host.transport.stop("vm")
    assert "somebody still has /dev/nbd0 open" in caplog.text
    assert host.transport.start(export(attachment.core, device_id=0)).device == "/dev/nbd1"
    kernel.let_go(0)
    host.transport.stop("vm")
    assert host.transport.start(export(attachment.core, device_id=0)).device == "/dev/nbd0"


@pytest.mark.parametrize("is_open", [False, True])
def test_somebody_else_disconnects_it(host: Host, kernel: FakeKernel, is_open: bool) -> None:
    """Told until it was noted; and the number, which may be another's by then, is not ended again."""
    started(host)
    if is_open:
        kernel.open.add(0)
    host.busy = True
    kernel.disconnect(0)
    wait_for(lambda: len(host.gone) > 2, "the export is told of, again and again")
    host.busy = False
    wait_for(lambda: "vm" not in host.transport._devices, "it is noted")
    told = len(host.gone)
    if not is_open:
        other, _ = started(host, "other", device_id=0)
        assert other.directory.name == "nbd0"
    host.transport.stop("vm")
    time.sleep(0.5)
    assert (len(host.gone), kernel.calls.count("disconnect 0")) == (told, 1)


def test_a_device_that_has_ended_is_not_taken_up(host: Host, kernel: FakeKernel) -> None:
    """sysfs shows it as before while somebody has it open."""
    _, attachment = started(host)
    kernel.open.add(0)
    host.transport.release("vm")
    kernel.disconnect(0)
    assert host.transport.start(export(attachment.core, device_id=0)).device == "/dev/nbd1"


def test_a_number_that_is_about_to_be_free(host: Host, kernel: FakeKernel) -> None:
    kernel.going.add(0)
    device, _ = started(host)
    assert device.directory.name == "nbd1"


def test_a_restart_is_a_pause_for_requests_under_way(host: Host, kernel: FakeKernel) -> None:
    """Not an error: the kernel would tell its guests."""
    device, attachment = started(host)
    host.answering.clear()
    waiting = [
        device.io(kind, 8 * MIB, what, wait=False) for kind, what in ((READ, 4096), (WRITE, b"w" * 512))
    ]
    wait_for(lambda: attachment.core.info().longest_wait_ns, "they wait")
    host.transport.release("vm")
    host.transport.close()
    host.answering.set()
    host.transport = host.make()
    host.transport.start(export(attachment.core, device_id=0))
    for one in waiting:
        assert one.done.wait(DEADLINE)
        assert one.error == 0


def test_a_resize_waits_for_nobody(host: Host, kernel: FakeKernel) -> None:
    """The kernel lets requests end first: one that waits for the store would stop all calls of the driver."""
    device, attachment = started(host)
    host.transport.check_resize(attachment, 2 * SIZE)
    host.answering.clear()
    device.request_timeout = 60.0
    waiting = device.io(READ, 8 * MIB, 4096, wait=False)
    wait_for(lambda: attachment.core.info().longest_wait_ns > 1.5e9, "it waits for long")
    with pytest.raises(NotSupported, match="has waited for"):
        host.transport.check_resize(attachment, 2 * SIZE)
    host.answering.set()
    assert waiting.done.wait(DEADLINE)
    host.transport.check_resize(attachment, 2 * SIZE)


def test_no_connection_is_made_while_connections_move(host: Host) -> None:
    device, _ = started(host)
    host.server.pause(0.1)
    device.lose()
    waiting = device.io(READ, 0, 4096, wait=False)
    time.sleep(1.0)
    assert not waiting.done.is_set()
    host.server.resume()
    assert waiting.done.wait(DEADLINE)


@pytest.mark.parametrize(("number", "ends"), [(errno.ENOMEM, False), (errno.EIO, True)])
def test_a_volume_that_takes_no_connection(
    host: Host, kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch, number: int, ends: bool
) -> None:
    """Its guests wait where that may pass, else they get errors."""
    device, _ = started(host)

    def refuse(*args: object) -> None:
        raise CoreError(number, "attach")

    with monkeypatch.context() as patch:
        patch.setattr(CoreVolume, "attach_nbd", refuse)
        device.lose()
        waiting = device.io(READ, 0, 4096, wait=False)
        if ends:
            wait_for(lambda: host.gone, "the export is told of")
        else:
            time.sleep(1.0)
        assert (waiting.error != 0, host.gone == ["vm"], device.connected) == (ends, ends, not ends)
    if not ends:
        assert waiting.done.wait(DEADLINE)
        assert waiting.error == 0


def test_a_container_without_the_devices(host: Host, kernel: FakeKernel) -> None:
    transport = host.make()
    transport._has_node = lambda index: False
    with pytest.raises(NotSupported, match="/dev/nbd0 is not in this /dev"):
        transport.start(export(host.add("vm", SIZE)))
    assert not kernel.devices


def test_an_upload_may_take_longer_than_a_request(host: Host) -> None:
    device, _ = started(host, waits_for_store=True)
    assert device.shape.request_timeout == 300


def test_resize(host: Host, kernel: FakeKernel) -> None:
    device, attachment = started(host)
    assert host.transport.resize(export(attachment.core, size=2 * SIZE)) == ""
    assert kernel.calls[-1] == f"resize 0 {2 * SIZE}"
    assert device.pread(0, 4096) == bytes(4096)


def test_without_the_driver(host: Host) -> None:
    transport = host.make()
    transport._missing = lambda: "the kernel's nbd driver is not loaded"
    with pytest.raises(NotSupported, match="not loaded; or use --transport nbd"):
        transport.start(export(host.add("vm", SIZE)))


def test_a_connection_moves_with_its_volume(host: Host, tmp_path: Path) -> None:
    """What a handoff says of it, and that the core goes on with it as the kernel's."""
    device, attachment = started(host)
    device.request_timeout = 60.0  # its connection stays the first one
    device.pwrite(0, b"h" * 4096)
    handoff.freeze(attachment.core)
    ((_, state),) = handoff.connections(attachment.core)
    assert state.modes.kernel
    handoff.unfreeze(attachment.core)
    assert device.pread(0, 4096) == b"h" * 4096


def test_many_devices_at_once(host: Host) -> None:
    """Calls for different exports overlap."""
    attachments = [export(host.add(f"v{i}", SIZE), f"v{i}") for i in range(8)]
    threads = [threading.Thread(target=host.transport.start, args=(one,)) for one in attachments]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(c.peer for c in host.server.connections()) == sorted(map(path_of, range(8)))
    for device in list(host.kernel.devices.values()):
        device.pwrite(0, b"m" * 512)
