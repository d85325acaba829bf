"""Requests and results of the router, as frozen structs; the API and the command line exchange them as JSON.

Unknown fields and wrong types are refused where they are decoded.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from glidefs.config import parse_size
from glidefs.errors import ConfigError
from glidefs.formats.manifest import MAX_SIZE

SIZE_UNIT = 4096
"""Sizes are rounded up to whole sectors."""

Seconds = Annotated[float, Meta(ge=0, le=30 * 86400)]
TransportChoice = Literal["auto", "ublk", "nbd-device", "nbd", "vhost-user"]


class CreateRequest(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A volume to make. `size` in bytes, or text such as "10GiB".

    `source` ("base:B", "volume:V", "snapshot:V@SEQ", "tag:T") makes a fork, by default of its size.
    `prefetch`: make the hot set of its base resident in the background. `new_prefix`: also in a prefix
    that the configuration does not name.
    """

    size: int | str | None = None
    source: str | None = None
    prefetch: bool = True
    transport: TransportChoice = "auto"
    read_only: bool = False
    prefix: str | None = None
    new_prefix: bool = False
    flush: Literal["local", "store"] = "local"
    wait: bool = False


class ResizeRequest(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A new size in bytes, or as text; text that begins with + or - changes it by that much.

    `shrink` confirms that a smaller size cuts data off.
    """

    size: int | str
    shrink: bool = False


class TransportRequest(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How guests are to reach the volume."""

    transport: TransportChoice


class DrainRequest(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Seconds to wait; without `timeout` as long as it takes."""

    timeout: Seconds | None = None


class DetachRequest(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Seconds to wait; without `timeout` as long as it takes, except with `force`.

    `force`: even while guests use the export, or when something cannot be uploaded.
    """

    timeout: Seconds | None = None
    force: bool = False


class UndeleteRequest(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The prefix that the volume was in; default: the first of the configuration."""

    prefix: str | None = None


class SnapshotRequest(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A snapshot to make. `tag` names it, too; `timeout` in seconds."""

    tag: str | None = None
    timeout: Seconds | None = None


class TagRequest(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the tag is to name: the volume as it is, or its snapshot `sequence`."""

    tag: str
    sequence: int | None = None


class BlessRequest(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An image to make a base of: the absolute path of a raw image on the daemon's host."""

    image: str
    prefix: str | None = None
    new_prefix: bool = False


class PromoteRequest(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is to become of an export.

    Without `base` a read-only export becomes read-write. With it the volume, or its snapshot
    `sequence`, becomes a base; `prefix` is for a volume that is not served here.
    """

    base: str | None = None
    sequence: int | None = None
    prefix: str | None = None


class ProfileRequest(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How long to record.

    It ends after `stop_after` seconds, or `idle` seconds after the last new block.
    """

    stop_after: Seconds | None = None
    idle: Seconds | None = None


class AttachRequest(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How to get the volume.

    ``take_over`` fences the host that has the volume. ``accept_older`` takes the store's state if the store
    went back in time: what this host has beyond it stays in its log, set aside.
    """

    take_over: bool = False
    accept_older: bool = False
    prefix: str | None = None
    transport: TransportChoice = "auto"


class ExportStatus(Struct, frozen=True, kw_only=True):
    """An export as `show` and `list` print it. `device` is the block device or the NBD URI.

    `state` is "serving", "failed", "fenced" (this host may not serve the volume any more: another one has it,
    or it was removed; since `fenced_at`, unix seconds), "starting", "stopped" or "creating". `reason` says
    why it is not served, or why this transport was chosen. `volume` holds the figures of a served volume.
    `trouble`: what is wrong, even while it is served (requests or uploads that wait).
    """

    name: str
    size: int
    transport: str
    device: str
    state: str
    reason: str = ""
    prefix: str
    read_only: bool
    flush: str
    volume_id: str
    log_id: str
    source: str = ""
    created_at: int = 0
    published: bool = True
    fenced_at: int = 0
    created: bool | None = None
    note: str = ""
    trouble: str = ""
    volume: dict[str, Any] | None = None


def normal_size(size: int | str, now: int | None = None) -> int:
    """Bytes of a requested volume size, rounded up to whole sectors. Raises ConfigError.

    "+1GiB" and "-1GiB" count from ``now``.
    """
    shown = str(size)[:40]
    relative = isinstance(size, str) and size.strip().startswith(("+", "-"))
    try:
        wanted = parse_size(size)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if relative and now is None:
        raise ConfigError(f"size {shown} is not possible: a new volume has no size that it could change")
    wanted += (now or 0) if relative else 0
    if wanted <= 0:
        raise ConfigError(f"size {shown} is not possible: a volume has at least {SIZE_UNIT} bytes")
    rounded = -(-wanted // SIZE_UNIT) * SIZE_UNIT
    if rounded > MAX_SIZE:
        raise ConfigError(f"size {shown} is too large: a volume has at most {MAX_SIZE} bytes (1EiB)")
    return rounded


def check_named(prefix: str, named: Collection[str], *, new: bool) -> None:
    """Something is about to be made in ``prefix``. Raises ConfigError if no configuration looks after it."""
    if prefix not in named and not new:
        raise ConfigError(
            f"[store] prefixes does not name {prefix}: gc and starts of this host would not look there; "
            "add it, or make it all the same with --new-prefix"
        )
