"""What the router asks of a transport, and which transport an export gets."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from msgspec import Struct

from glidefs.errors import ConfigError, NotSupported
from glidefs.transport.nbd.export import NbdServer
from glidefs.transport.nbd.negotiation import NbdExport
from glidefs.transport.ublk.kernels import ublk_refused

if TYPE_CHECKING:
    from glidefs.core.volume import CoreVolume

UBLK_CONTROL = Path("/dev/ublk-control")
MODPROBE_TIMEOUT = 20.0
NOTICED = 1.0
"""Seconds in which the end of a connection is noticed."""


class Attachment(Struct, frozen=True):
    """What a transport needs to know of an export. `size` in bytes; `volume_id` 16 bytes."""

    name: str
    volume_id: bytes
    size: int
    read_only: bool
    core: CoreVolume
    device_id: int | None = None


class Endpoint(Struct, frozen=True):
    """Where guests find the export: a device path or an NBD URI; `device_id` for ublk."""

    device: str
    device_id: int | None = None


class Transport(Protocol):
    """One way to serve exports. Every method may block; calls for one export never overlap."""

    kind: str

    def missing(self) -> str | None:
        """Why it cannot be used on this host, in one line with the remedy; None if it can be tried."""

    def prepare(self, device_id: int | None) -> None:
        """Do what is slow the first time: an export is to be started while guests wait.

        ``device_id`` is its device, if it had one. Raises DeviceError.
        """

    def start(self, export: Attachment) -> Endpoint:
        """Serve `export`. Raises DeviceError, NotSupported."""
        ...

    def stop(self, name: str) -> None:
        """Stop serving: on return no guest can reach the volume. An unknown name is no error."""

    def release(self, name: str) -> None:
        """Stop serving because the daemon stops for a while."""

    def discard(self, name: str, volume_id: bytes, device_id: int) -> None:
        """Delete what an earlier daemon left of an export that ends without having been served here."""

    def in_use(self, name: str) -> str:
        """Who uses an export that is served, for people; empty if nobody does."""
        ...

    def check_resize(self, export: Attachment, size: int) -> None:
        """Raise NotSupported if guests of `export` cannot live with `size`; changes nothing."""

    def resize(self, export: Attachment) -> str:
        """Announce the new size. Returns what the operator must know, or nothing."""
        ...


class NbdTransport:
    """Exports by name for the NBD server. `_lock` guards the table."""

    kind = "nbd"

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._exports: dict[str, NbdExport] = {}
        self._server: NbdServer | None = None

    def bind(self, server: NbdServer) -> None:
        """The server that looks exports up here; once, before the first start."""
        self._server = server

    @property
    def server(self) -> NbdServer:
        """The bound server."""
        if self._server is None:
            raise RuntimeError("the NBD transport has no server yet")
        return self._server

    def nbd_export(self, name: str) -> NbdExport | None:
        """The export of that name; the empty name means the only one there is."""
        with self._lock:
            if not name and len(self._exports) == 1:
                return next(iter(self._exports.values()))
            return self._exports.get(name)

    def nbd_exports(self) -> list[NbdExport]:
        """All of them, by name."""
        with self._lock:
            return [self._exports[name] for name in sorted(self._exports)]

    def _put(self, export: Attachment) -> None:
        entry = NbdExport(name=export.name, size=export.size, read_only=export.read_only, core=export.core)
        with self._lock:
            self._exports[export.name] = entry

    def missing(self) -> str | None:
        """Sockets are everywhere."""
        return None

    def prepare(self, device_id: int | None) -> None:
        """Nothing is slow."""

    def start(self, export: Attachment) -> Endpoint:
        """Answer the name from now on."""
        self._put(export)
        return Endpoint(device=self.server.uri(export.name))

    def stop(self, name: str) -> None:
        """Forget the name, end its connections."""
        with self._lock:
            known = self._exports.pop(name, None)
        if known is not None and self._server is not None:
            self._server.close_export(name)

    def release(self, name: str) -> None:
        """The same: NBD clients reconnect by themselves, or not at all."""
        self.stop(name)

    def discard(self, name: str, volume_id: bytes, device_id: int) -> None:
        """Nothing is left of connections."""

    def in_use(self, name: str) -> str:
        """Connections count, whatever they do."""
        if self.server.table.is_idle(name, NOTICED):
            return ""
        peers = [connection.peer for connection in self.server.connections(name)]
        if not peers:
            return ""
        shown = ", ".join(sorted(set(peers))[:3])
        return f"{len(peers)} NBD client{'s are' if len(peers) > 1 else ' is'} connected ({shown})"

    def check_resize(self, export: Attachment, size: int) -> None:
        """Any size will do: what connections see beyond the end fails."""

    def resize(self, export: Attachment) -> str:
        """New connections see the new size; the protocol has no way to tell those that exist."""
        self._put(export)
        if self.server.connections(export.name):
            return "NBD connections that exist keep the old size until they reconnect"
        return ""


class Choice(Struct, frozen=True):
    """A transport and why it was chosen."""

    kind: str
    why: str


def choose_transport(wanted: str, transports: Mapping[str, Transport]) -> Choice:
    """Settle "auto": ublk where the kernel has a sound one, else NBD. Loads the driver once if root.

    Raises NotSupported when "ublk" is asked for and cannot be had, ConfigError for another word.
    """
    if wanted == "nbd":
        return Choice("nbd", "asked for")
    if wanted not in ("auto", "ublk"):
        raise ConfigError(f"transport {wanted[:40]!r} is not known; it is auto, ublk or nbd")
    ublk = transports.get("ublk")
    missing = ublk.missing() if ublk is not None else "this daemon does not serve it"
    if missing is None:
        return Choice("ublk", "asked for" if wanted == "ublk" else f"{UBLK_CONTROL} is there")
    if wanted == "ublk":
        raise NotSupported(f"ublk cannot be used: {missing}; or use --transport nbd")
    return Choice("nbd", f"no ublk: {missing}")


def ublk_missing(allow_kernel: str | None = None) -> str | None:
    """Why this process cannot use ublk, in one line with the remedy; None if it can try.

    ``allow_kernel``: a release that the operator vouches for.
    """
    refused = ublk_refused(platform.release(), allow_kernel)
    if refused is not None:
        return refused
    if not UBLK_CONTROL.exists():
        tried = _load_driver()
        if not UBLK_CONTROL.exists():
            return f"{UBLK_CONTROL} does not exist{tried}"
    if not os.access(UBLK_CONTROL, os.R_OK | os.W_OK):
        return f"no permission for {UBLK_CONTROL}, run the daemon as root"
    return None


_modprobe_lock = threading.Lock()
_modprobe_result: list[str] = []


def _load_driver() -> str:
    """Try modprobe once per process; what came of it, as the rest of a sentence."""
    with _modprobe_lock:
        if not _modprobe_result:
            _modprobe_result.append(_modprobe())
        return _modprobe_result[0]


def _modprobe() -> str:
    if os.geteuid() != 0:
        return " and only root can load the driver: 'modprobe ublk_drv' (Linux 6.1 or later)"
    program = shutil.which("modprobe", path="/usr/sbin:/sbin:/usr/bin:/bin")
    if program is None:
        return " and there is no modprobe to load ublk_drv with"
    try:
        done = subprocess.run(
            [program, "ublk_drv"], capture_output=True, timeout=MODPROBE_TIMEOUT, check=False, text=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        return f" and 'modprobe ublk_drv' failed ({error})"
    if done.returncode:
        return " and 'modprobe ublk_drv' found no driver for this kernel (CONFIG_BLK_DEV_UBLK, Linux 6.1)"
    return " although 'modprobe ublk_drv' worked (is /dev complete in this container?)"
