"""What the router asks of a transport, and which transport an export gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from msgspec import Struct

from glidefs.errors import ConfigError, NotSupported

if TYPE_CHECKING:
    from glidefs.core.volume import CoreVolume


class Snapshots(Protocol):
    """The snapshots of a volume. Methods may block for seconds, and raise GlideError."""

    def listed(self) -> Sequence[int]:
        """Those that clients are told of, ascending."""

    def has(self, sequence: int) -> bool:
        """Whether there is one of this number, told of or not."""
        ...


class Attachment(Struct, frozen=True):
    """What a transport needs to know about an export. `size` in bytes; `volume_id` 16 bytes.

    ``waits_for_store``: a flush may take as long as an upload.
    """

    name: str
    volume_id: bytes
    size: int
    read_only: bool
    core: CoreVolume
    device_id: int | None = None
    waits_for_store: bool = False
    snapshots: Snapshots | None = None


class Endpoint(Struct, frozen=True):
    """Where guests find the export: a path, of device or socket, or an NBD URI; `device_id`: of a device."""

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


class Choice(Struct, frozen=True):
    """A transport and why it was chosen."""

    kind: str
    why: str


KINDS = ("ublk", "nbd-device", "nbd")
"""By preference: a device that any program can open, before a socket for those that speak NBD."""
ON_REQUEST = ("vhost-user",)
"""Those that "auto" never takes: only hypervisors can use them."""
_ALL = (*KINDS, *ON_REQUEST)


def choose_transport(wanted: str, transports: Mapping[str, Transport]) -> Choice:
    """Settle "auto": ublk where the kernel has a sound one, else its NBD driver, else NBD.

    Loads drivers once if root. Raises NotSupported for one that is asked for and cannot be had, ConfigError
    for another word.
    """
    if wanted not in ("auto", *_ALL):
        raise ConfigError(
            f"transport {wanted[:40]!r} is not known; it is auto, {', '.join(_ALL[:-1])} or {_ALL[-1]}"
        )
    lacking: list[str] = []
    for kind in KINDS if wanted == "auto" else (wanted,):
        transport = transports.get(kind)
        missing = transport.missing() if transport is not None else "this daemon does not serve it"
        if missing is None:
            why = "asked for" if wanted == kind else "; ".join(lacking) or f"this host has {kind}"
            return Choice(kind, why)
        if wanted == kind:
            raise NotSupported(f"{kind} cannot be used: {missing}; or use --transport nbd")
        lacking.append(f"no {kind}: {missing}")
    raise NotSupported(f"no transport can be used: {'; '.join(lacking)}")
