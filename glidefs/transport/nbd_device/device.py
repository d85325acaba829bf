"""`/dev/nbdN`: one per export, with a number that stays, and a name in the kernel that says whose it is.

A device has one connection, a pair of sockets: the kernel has one end, the core the other. When it ends,
however that came, the device waits for another, and :mod:`glidefs.transport.nbd_device.keeper` makes one. A
request that had no answer is sent again when it is `request_timeout` old. So what an ended connection asked
for must not be carried out later, behind the second copy: the core gives it up (``NbdModes.kernel``), and the
next connection begins when the one before is gone. Of two connections the kernel would use the other at once:
that is why there is one. A volume has one worker anyway.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from glidefs.config import NbdDeviceSettings
from glidefs.core.check import Closed, CoreError
from glidefs.errors import DeviceError, GlideError, NotSupported
from glidefs.transport.base import Attachment, Endpoint
from glidefs.transport.device.names import DeviceNames
from glidefs.transport.device.tag import DeviceTags, make_tags
from glidefs.transport.device.use import device_use
from glidefs.transport.nbd.connections import ConnectionTable, Paused
from glidefs.transport.nbd_device.driver import (
    BLOCK,
    NbdState,
    announce_again,
    exists,
    has_node,
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
_GOING = 3
"""Numbers that are about to be free, for which the kernel says that the call is wrong."""
_UPLOAD = 30
"""A flush that waits for the store takes so many times longer than other requests."""
_LONG_WAIT = 1.0
_SOON = 1.0
"""Seconds in which a device shows, or goes, after the call that made or ended it."""


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
    them on. ``on_gone(name)``: somebody else ended the device of an export; False: tell again.
    """

    kind = "nbd-device"

    def __init__(
        self,
        settings: NbdDeviceSettings,
        state_dir: Path,
        connections: ConnectionTable,
        on_gone: Callable[[str], bool],
        *,
        names: DeviceNames | None = None,
        control: Callable[[], NbdControl] = NbdControl,
        block: Path = BLOCK,
        missing: Callable[[], str | None] = nbd_device_missing,
        has_node: Callable[[int], bool] = has_node,
    ) -> None:
        self._settings = settings
        self._state_dir = state_dir
        self._connections = connections
        self._on_gone = on_gone
        self._names = names or DeviceNames("nbd")
        self._control = control
        self._block = block
        self._missing = missing
        self._has_node = has_node
        self._making = threading.Lock()  # held from the choice of a number until it is ours or another's
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
        if not is_own or not self._is_connected(state):
            whose = "is still open" if is_own else "belongs to somebody else"
            log.warning("%s: %s %s; taking another number", export.name, path_of(state.index), whose)
            return None
        log.info("%s: took up %s", export.name, path_of(state.index))
        key = self._names.announce(state.index, export.name)
        return NbdDevice(export, state.index, state.identifier, key)

    def _is_connected(self, state: NbdState) -> bool:
        with self._control() as control:
            try:
                control.probe(state.index, state.identifier)
            except DeviceError as error:
                if error.errno != errno.EINVAL:
                    raise
                return False
        return True

    def _made(self, export: Attachment) -> NbdDevice:
        tags = self._own_tags()
        self._end_lost(export, tags)
        patience = self._settings.request_timeout * (_UPLOAD if export.waits_for_store else 1)
        name = identifier(tags.tag(export.name, export.volume_id))
        shape = DeviceShape(
            size=export.size,
            block_size=BLOCK_SIZE,
            read_only=export.read_only,
            request_timeout=max(1, round(patience)),
            dead_timeout=max(1, round(self._settings.dead_timeout)),
            identifier=name,
        )
        with self._making, self._control() as control:
            index, key = self._connected(control, export, shape)
        if not _soon(lambda: self._has_node(index)):
            with self._control() as control:
                control.disconnect(index)
            self._names.withdraw(index, key)
            raise NotSupported(
                f"{path_of(index)} is not in this /dev: give the container the host's, or use --transport nbd"
            )
        tune(index, self._block)
        return NbdDevice(export, index, name, key)

    def _connected(self, control: NbdControl, export: Attachment, shape: DeviceShape) -> tuple[int, str]:
        """A new device: its number, and the key that udev knows it by."""
        tried: set[int] = set()
        going = 0
        while True:
            index = self._free(export.device_id, tried)
            tried.add(index)
            key = self._names.announce(index, export.name)
            try:
                self._give(export, index, partial(control.connect, index, shape))
            except BaseException as error:
                self._names.withdraw(index, key)
                number = error.errno if isinstance(error, DeviceError) else 0
                going += number == errno.EINVAL  # of a number that is about to be free, and of a wrong call
                if number in (errno.EBUSY, errno.EEXIST) or (number == errno.EINVAL and going <= _GOING):
                    continue
                raise
            if self._names.read(index) != (export.name, key):  # another daemon tried to have it, too
                key = self._names.announce(index, export.name)
                announce_again(index, self._block)
            return index, key

    def _free(self, wanted: int | None, tried: set[int]) -> int:
        """A number without a device. One that was disconnected is there until nobody has it open any more."""
        numbers = range(MOST_DEVICES) if wanted is None else [wanted, *range(MOST_DEVICES)]
        for index in numbers:
            if index not in tried and not exists(index, self._block):
                return index
        raise DeviceError(f"all {MOST_DEVICES} NBD devices of this host are in use", errno=errno.ENOSPC)

    def _give(self, export: Attachment, index: int, to_kernel: Callable[[int], None]) -> int:
        """A new pair of sockets: one end to the core, the other to the kernel, which keeps a copy.

        Returns the id of the connection.
        """
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
        return conn_id

    def _end_lost(self, export: Attachment, tags: DeviceTags) -> None:
        """End devices of this export that no record names: the local disk was lost, or the record late.

        They are not taken up: the log that they promised guests may be gone, and an error is better than
        other data.
        """
        for state in states(self._block):
            tag = tag_of(state)
            if tag is None or not tags.accepts(tag, export.name, export.volume_id):
                continue
            path = path_of(state.index)
            log.warning("%s: ending %s, which no record of this host names", export.name, path)
            try:
                with self._control() as control:
                    control.disconnect(state.index)
            except DeviceError as error:
                log.warning("%s: %s", export.name, error)
            self._is_gone_soon(state.index)

    def _is_gone_soon(self, index: int) -> bool:
        return _soon(lambda: not exists(index, self._block))

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
        if device is None:
            return True
        if self._connections.listing(name):
            return self._has_size(device)
        if not self._is_there(device):
            return self._gone(device)
        try:
            with self._control() as control:
                reconnect = partial(control.reconnect, device.index, device.identifier)
                conn_id = self._give(device.export, device.index, reconnect)
        except Paused:
            return False
        except Closed:
            return True  # the daemon ends, or another process has it by now
        except (CoreError, DeviceError) as error:
            return self._failed(device, error)
        with self._lock:
            is_ours = self._devices.get(name) is device
        if not is_ours:
            self._connections.end(conn_id)
        return False

    def _failed(self, device: NbdDevice, error: CoreError | DeviceError) -> bool:
        """It got no connection. Whether it never will."""
        name, path = device.export.name, path_of(device.index)
        if isinstance(error, DeviceError) and error.errno == errno.EINVAL:
            return self._gone(device)
        if isinstance(error, CoreError) and not error.temporary:
            log.error("%s: ending %s, its volume serves nobody any more: %s", name, path, error)
            with contextlib.suppress(DeviceError), self._control() as control:
                control.disconnect(device.index)
            return self._gone(device)
        log.warning("%s: %s has no connection, its guests wait: %s", name, path, error)
        return False

    def _is_there(self, device: NbdDevice) -> bool:
        state = read_state(device.index, self._block)
        return state is not None and state.identifier == device.identifier

    def _gone(self, device: NbdDevice) -> bool:
        """Somebody else ended it. Whether that was noted."""
        name = device.export.name
        log.error("%s: %s was disconnected", name, path_of(device.index))
        if not self._on_gone(name):
            return False
        with self._lock:
            if self._devices.get(name) is device:
                del self._devices[name]
        self._names.withdraw(device.index, device.key)
        return True

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
            if self._is_there(device):
                with self._control() as control:
                    control.disconnect(device.index)
        finally:
            self._connections.detach(name)
            self._names.withdraw(device.index, device.key)
        if not self._is_gone_soon(device.index):
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
        if state is None or tag is None:
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
        """Not while requests wait: the kernel lets those that are under way end first.

        One that cannot end would stop every call of its driver.
        """
        waiting = export.core.info().longest_wait_ns / 1e9
        if waiting > _LONG_WAIT:
            raise NotSupported(
                f"{export.name}: a request of its guests has waited for {waiting:.0f} s: see 'glidefs show', "
                "and resize it when none does"
            )

    def resize(self, export: Attachment) -> str:
        """Tell the kernel."""
        with self._lock:
            device = self._devices.get(export.name)
            if device is not None:
                device = self._devices[export.name] = replace(device, export=export)
        if device is not None:
            self._set_size(device)
        return ""

    def _set_size(self, device: NbdDevice) -> None:
        with self._control() as control:
            control.resize(device.index, device.identifier, device.export.size)

    def _has_size(self, device: NbdDevice) -> bool:
        """The keeper's, once there is a connection: a size that changed while there was none."""
        state = read_state(device.index, self._block)
        if state is None or state.size == device.export.size:
            return True
        try:
            self.check_resize(device.export, device.export.size)
            self._set_size(device)
        except GlideError as error:
            log.warning(
                "%s: %s keeps its old size for now: %s", device.export.name, path_of(device.index), error
            )
            return False
        return True


def _soon(condition: Callable[[], bool]) -> bool:
    until = time.monotonic() + _SOON
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.005)
    return True
