"""`/dev/nbdN`: one per export, with a number that stays, and a name in the kernel that says whose it is.

A device has one connection, a pair of sockets: the kernel has one end, the core the other. When it ends,
however that came, the device waits for another, and :mod:`glidefs.transport.nbd_device.keeper` makes one. A
request that had no answer is sent again when it is `request_timeout` old. So what an ended connection asked
for must not be carried out later, behind the second copy: the core gives it up (``NbdModes.kernel``), and the
next connection begins when the one before is gone. Of two connections the kernel would use the other at once:
that is why there is one. A volume has one worker anyway.
"""

from __future__ import annotations

import errno
import logging
import socket
import threading
from collections.abc import Callable
from pathlib import Path

from msgspec import Struct

from glidefs.config import NbdDeviceSettings
from glidefs.core.check import Closed
from glidefs.errors import DeviceError, NotSupported
from glidefs.transport.base import Attachment, Endpoint
from glidefs.transport.device.names import DeviceNames
from glidefs.transport.device.tag import DeviceTags, make_tags
from glidefs.transport.device.use import device_use
from glidefs.transport.nbd.connections import ConnectionTable
from glidefs.transport.nbd_device.driver import (
    BLOCK,
    NbdState,
    exists,
    nbd_device_missing,
    read_state,
    states,
    tune,
)
from glidefs.transport.nbd_device.keeper import Keeper
from glidefs.transport.nbd_device.netlink import DeviceShape, NbdControl

log = logging.getLogger(__name__)

BLOCK_SIZE = 512
MOST_DEVICES = 1 << 15
"""Numbers that the kernel takes whatever its module's max_part is."""
_SENT_BYTES = 1 << 20
"""Of the sockets' buffers: a request of the kernel's largest size in few pieces."""
_IDENTIFIER = "glidefs:"


def identifier(tag: int) -> str:
    """What the kernel keeps of a device with this tag."""
    return f"{_IDENTIFIER}{tag:016x}"


def tag_of(state: NbdState) -> int | None:
    """The tag of a device of GlideFS, None for others."""
    text = state.identifier.removeprefix(_IDENTIFIER)
    if len(text) != 16 or text == state.identifier:
        return None
    try:
        return int(text, 16)
    except ValueError:
        return None


def path_of(index: int) -> str:
    """Where guests find it."""
    return f"/dev/nbd{index}"


class NbdDevice(Struct, frozen=True):
    """A device that is served; ``key`` is what udev knows it by."""

    export: Attachment
    index: int
    identifier: str
    key: str


class NbdDeviceTransport:
    """The NBD devices of this daemon. ``_lock`` guards the table; calls for one export never overlap.

    ``connections``: where the core's ends are listed, as those of other NBD clients, so that a handoff passes
    them on. ``on_gone(name)``: somebody else ended the device of an export.
    """

    kind = "nbd-device"

    def __init__(
        self,
        settings: NbdDeviceSettings,
        state_dir: Path,
        connections: ConnectionTable,
        on_gone: Callable[[str], None],
        *,
        names: DeviceNames | None = None,
        control: Callable[[], NbdControl] = NbdControl,
        block: Path = BLOCK,
        missing: Callable[[], str | None] = nbd_device_missing,
    ) -> None:
        self._settings = settings
        self._state_dir = state_dir
        self._connections = connections
        self._on_gone = on_gone
        self._names = names or DeviceNames("nbd")
        self._control = control
        self._block = block
        self._missing = missing
        self._lock = threading.Lock()
        self._tags: DeviceTags | None = None
        self._devices: dict[str, NbdDevice] = {}
        self._keeper = Keeper(self._look)

    def missing(self) -> str | None:
        """Root and the driver."""
        return self._missing()

    def prepare(self, device_id: int | None) -> None:
        """Read whose devices are ours."""
        if device_id is not None:
            self._own_tags()

    def _own_tags(self) -> DeviceTags:
        with self._lock:
            if self._tags is None:
                self._tags = make_tags(self._state_dir)
                self._names.sweep(state.index for state in states(self._block))
            return self._tags

    # -- start -----------------------------------------------------------------------------------

    def start(self, export: Attachment) -> Endpoint:
        """Take up the device of this export, or make one, by preference with its old number."""
        missing = self._missing()
        if missing:
            raise NotSupported(f"nbd-device cannot be used: {missing}; or use --transport nbd")
        device = self._taken_up(export) or self._made(export)
        with self._lock:
            self._devices[export.name] = device
        tune(device.index, self._block)
        self._keeper.look_at(export.name)
        return Endpoint(device=path_of(device.index), device_id=device.index)

    def _taken_up(self, export: Attachment) -> NbdDevice | None:
        """The device that the record names, if it is this export's.

        Its connection is the keeper's: in a handoff it has one, which the process before passes on.
        """
        if export.device_id is None:
            return None
        state = read_state(export.device_id, self._block)
        if state is None:
            return None
        tag, tags = tag_of(state), self._own_tags()
        is_own = tag is not None and tags.accepts(tag, export.name, export.volume_id)
        if not state.server or not is_own:
            whose = "is still open" if not state.server else "belongs to somebody else"
            log.warning("%s: %s %s; taking another number", export.name, path_of(state.index), whose)
            return None
        if state.size != export.size:
            with self._control() as control:
                control.resize(state.index, state.identifier, export.size)
        log.info("%s: took up %s", export.name, path_of(state.index))
        key = self._names.announce(state.index, export.name)
        return NbdDevice(export, state.index, state.identifier, key)

    def _made(self, export: Attachment) -> NbdDevice:
        tags = self._own_tags()
        self._end_lost(export, tags)
        name = identifier(tags.tag(export.name, export.volume_id))
        shape = DeviceShape(
            size=export.size,
            block_size=BLOCK_SIZE,
            read_only=export.read_only,
            request_timeout=max(1, round(self._settings.request_timeout)),
            dead_timeout=max(1, round(self._settings.dead_timeout)),
            identifier=name,
        )
        tried: set[int] = set()
        with self._control() as control:
            while True:
                index = self._free(export.device_id, tried)
                tried.add(index)
                key = self._names.announce(index, export.name)
                try:
                    self._connect(control, index, shape, export)
                except BaseException as error:
                    self._names.withdraw(index, key)
                    if isinstance(error, DeviceError) and error.errno in (errno.EBUSY, errno.EEXIST):
                        continue  # somebody was faster
                    raise
                return NbdDevice(export, index, name, key)

    def _free(self, wanted: int | None, tried: set[int]) -> int:
        """A number without a device. One that was disconnected is there until nobody has it open any more."""
        numbers = range(MOST_DEVICES) if wanted is None else [wanted, *range(MOST_DEVICES)]
        for index in numbers:
            if index not in tried and not exists(index, self._block):
                return index
        raise DeviceError(f"all {MOST_DEVICES} NBD devices of this host are in use", errno=errno.ENOSPC)

    def _connect(self, control: NbdControl, index: int, shape: DeviceShape, export: Attachment) -> None:
        self._give(export, index, lambda fd: control.connect(index, shape, fd))

    def _give(self, export: Attachment, index: int, to_kernel: Callable[[int], None]) -> None:
        """A new pair of sockets: one end to the core, the other to the kernel, which keeps a copy."""
        ours, kernels = socket.socketpair()
        with kernels:
            for end in (ours, kernels):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SENT_BYTES)
            conn_id = self._connections.serve(
                ours, export.name, export.core, read_only=export.read_only, peer=path_of(index)
            )
            try:
                to_kernel(kernels.fileno())
            except BaseException:
                kernels.shutdown(socket.SHUT_RDWR)
                self._connections.end(conn_id)
                raise

    def _end_lost(self, export: Attachment, tags: DeviceTags) -> None:
        """End devices of this export that no record names: the local disk was lost, or the record late.

        They are not taken up: the log that they promised guests may be gone, and an error is better than
        other data.
        """
        for state in states(self._block):
            tag = tag_of(state)
            if not state.server or tag is None or not tags.names(tag, export.name, export.volume_id):
                continue
            if Path(f"/proc/{state.server}").exists():
                continue  # who connected it is still there
            path = path_of(state.index)
            log.warning("%s: ending %s, which no record of this host names", export.name, path)
            try:
                with self._control() as control:
                    control.disconnect(state.index)
            except DeviceError as error:
                log.warning("%s: %s", export.name, error)

    # -- the connection --------------------------------------------------------------------------

    def connection_ended(self, name: str) -> None:
        """A connection of an export ended. Does not block."""
        with self._lock:
            served = name in self._devices
        if served:
            self._keeper.look_at(name)

    def _look(self, name: str) -> bool:
        """The keeper's: see to it that the device has a connection. False: it did not have one."""
        with self._lock:
            device = self._devices.get(name)
        if device is None or self._connections.listing(name):
            return True
        state = read_state(device.index, self._block)
        if state is None or not state.server or state.identifier != device.identifier:
            log.error("%s: somebody disconnected %s", name, path_of(device.index))
            self._on_gone(name)
            return True
        try:
            with self._control() as control:
                self._give(
                    device.export,
                    device.index,
                    lambda fd: control.reconnect(device.index, device.identifier, fd),
                )
        except Closed:
            return True  # the daemon ends, or another process has it by now
        except Exception as error:
            log.warning("%s: %s has no connection, its guests wait: %s", name, path_of(device.index), error)
        return False

    # -- the end ---------------------------------------------------------------------------------

    def _take(self, name: str) -> NbdDevice | None:
        with self._lock:
            return self._devices.pop(name, None)

    def stop(self, name: str) -> None:
        """End the device. Guests that have it open get errors."""
        device = self._take(name)
        if device is None:
            return
        try:
            with self._control() as control:
                control.disconnect(device.index)
        finally:
            self._connections.detach(name)
            self._names.withdraw(device.index, device.key)
        if exists(device.index, self._block):
            log.warning(
                "%s: somebody still has %s open, all I/O on it fails: close it (fuser -v %s), "
                "its number is used again after that",
                name,
                path_of(device.index),
                path_of(device.index),
            )

    def release(self, name: str) -> None:
        """Leave the device to the kernel: guests pause until the next start."""
        if self._take(name) is not None:
            self._connections.detach(name)

    def discard(self, name: str, volume_id: bytes, device_id: int) -> None:
        """End the device that an earlier daemon left: else its guests wait."""
        state = read_state(device_id, self._block)
        tag = None if state is None else tag_of(state)
        if state is None or not state.server or tag is None:
            return
        if self._own_tags().accepts(tag, name, volume_id):
            log.info("%s: ending %s, which nobody serves", name, path_of(device_id))
            with self._control() as control:
                control.disconnect(device_id)
            self._names.withdraw(device_id, self._names.read(device_id)[1])

    def close(self) -> None:
        """Stop the keeper. Devices stay as they are."""
        self._keeper.close()

    def in_use(self, name: str) -> str:
        """Whoever has the device open counts, a mount too."""
        with self._lock:
            device = self._devices.get(name)
        return "" if device is None else device_use(path_of(device.index))

    # -- size ------------------------------------------------------------------------------------

    def check_resize(self, export: Attachment, size: int) -> None:
        """The kernel takes every size."""

    def resize(self, export: Attachment) -> str:
        """Tell the kernel."""
        with self._lock:
            device = self._devices.get(export.name)
        if device is not None:
            with self._control() as control:
                control.resize(device.index, device.identifier, export.size)
        return ""
