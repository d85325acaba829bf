"""The shapes of answers that the code below gives as plain objects, for the OpenAPI document.

Nothing here is on the way of an answer; tests decode each one as what is declared, with no field more.
"""

from __future__ import annotations

from typing import Any, Literal

from msgspec import Struct

from glidefs.core.gather import LogDamage
from glidefs.events import PastEvent
from glidefs.handoff.history import PastHandoff
from glidefs.live.view import Host, LiveExport
from glidefs.live.wrong import Wrong
from glidefs.volume.logs import LogExtent


class Removed(Struct, forbid_unknown_fields=True, kw_only=True):
    """An export is gone. `restorable_until` (unix seconds): it can be undeleted until gc runs after that."""

    name: str
    removed: bool
    note: str = ""
    restorable_until: int = 0


class Undeleted(Struct, forbid_unknown_fields=True, kw_only=True):
    """A volume is back in the store. `size` in bytes."""

    name: str
    prefix: str
    size: int
    undeleted: bool
    note: str


class Detached(Struct, forbid_unknown_fields=True, kw_only=True):
    """An export is not served here any more. `note`: what was lost or kept, if anything."""

    name: str
    detached: bool
    note: str
    prefix: str = ""
    size: int = 0


class VolumeInStore(Struct, forbid_unknown_fields=True, kw_only=True):
    """A volume of the store. Times are unix seconds; `removed_at` is 0 unless it was removed.

    `owner_host` is the id of the host that serves it, empty if none does; `candidate`: another host with the
    node name of this one. `damaged` says why its root cannot be read; then only its name is known.
    """

    name: str
    prefix: str
    size: int
    volume_id: str
    owner_host: str
    owner_node: str
    sequence: int
    created_at: int
    removed_at: int
    source: str
    damaged: str
    served_here: bool
    candidate: bool


class MadeSnapshot(Struct, forbid_unknown_fields=True, kw_only=True):
    """A snapshot, by its number. `source` is what `source` of a create takes."""

    name: str
    sequence: int
    source: str
    tag: str | None
    size: int


class Snapshot(Struct, forbid_unknown_fields=True, kw_only=True):
    """A snapshot of a volume. `created_at` in unix seconds."""

    name: str
    sequence: int
    source: str
    size: int
    created_at: int


class DeletedSnapshot(Struct, forbid_unknown_fields=True, kw_only=True):
    """The snapshot is gone."""

    name: str
    sequence: int
    deleted: bool


class MadeTag(Struct, forbid_unknown_fields=True, kw_only=True):
    """What the tag names."""

    tag: str
    source: str
    prefix: str
    note: str


class Tag(Struct, forbid_unknown_fields=True, kw_only=True):
    """A tag and the volume that it names. `damaged` says why it cannot be read."""

    tag: str
    prefix: str
    damaged: str
    volume: str
    sequence: int
    size: int
    created_at: int


class DeletedTag(Struct, forbid_unknown_fields=True, kw_only=True):
    """The tag is gone; forks of it keep their data."""

    tag: str
    prefix: str
    deleted: bool


class MadeBase(Struct, forbid_unknown_fields=True, kw_only=True):
    """A base that was made of a volume."""

    base: str
    prefix: str
    source: str
    size: int
    note: str


class Profile(Struct, forbid_unknown_fields=True, kw_only=True):
    """What a profile found: blocks that guests touched, and those of the base among them."""

    name: str
    base: str
    touched_blocks: int
    hot_blocks: int
    manifest_hash: str


class Blessed(Struct, forbid_unknown_fields=True, kw_only=True):
    """A base that was made of an image; `created` is false where it was there with this content."""

    name: str
    prefix: str
    created: bool
    size: int
    data_bytes: int
    packs: int
    reused_packs: int
    stored_bytes: int
    manifest_hash: str
    content_hash: str
    note: str


class RemovedBase(Struct, forbid_unknown_fields=True, kw_only=True):
    """The base has a tombstone since then (unix seconds)."""

    name: str
    prefix: str
    removed_at: int


class WriteLog(Struct, forbid_unknown_fields=True, kw_only=True):
    """A write log of this host. `export` uses it, or `was` the one that did, if that is known."""

    volume_id: str
    log_id: str
    path: str
    segments: int
    bytes: int
    live: bool
    export: str | None
    was: str | None
    state: Literal["in use", "fenced", "set aside", "record lost"]


class ExportedLog(Struct, forbid_unknown_fields=True, kw_only=True):
    """What of a log was written to `path`, and what of it is `lost`."""

    path: str
    bytes: int
    extents: list[LogExtent]
    lost: LogDamage
    note: str


class DeletedLog(Struct, forbid_unknown_fields=True, kw_only=True):
    """The log is gone. `note`: what was lost with it."""

    volume_id: str
    log_id: str
    deleted: bool
    note: str


class StoreHealth(Struct, forbid_unknown_fields=True, kw_only=True):
    """Whether the store answers."""

    url: str
    state: Literal["up", "down"]
    down_seconds: float
    reason: str


class Health(Struct, forbid_unknown_fields=True, kw_only=True):
    """The state of the daemon. `reasons`: one line for each thing that is wrong.

    `exports` counts them by state. `waiting_verbs`: requests that wait without bound.
    """

    status: Literal["ok", "degraded", "starting", "stopping"]
    reasons: list[str]
    ready: bool
    pid: int
    version: str
    commit: str
    node: str
    uptime_seconds: float
    exports: dict[str, int]
    store: StoreHealth
    waiting_verbs: int


class Live(Struct, forbid_unknown_fields=True, kw_only=True):
    """What a host does now. `wrong`: what is wrong and what to do, the worst first.

    `states` counts exports by state. `handoffs` and `events` have the newest first.
    """

    host: Host
    store: dict[str, Any]
    log: dict[str, int]
    maps: dict[str, int]
    cache: dict[str, int]
    wrong: list[Wrong]
    states: dict[str, int]
    totals: dict[str, float]
    handoffs: list[PastHandoff]
    events: list[PastEvent]
    exports: list[LiveExport]


class LiveHistory(Struct, forbid_unknown_fields=True, kw_only=True):
    """The last hour of an export: samples of `step_seconds`, the newest ends at `until` (unix seconds)."""

    name: str
    step_seconds: float
    until: float
    series: dict[str, list[float | None]]


Document = dict[str, Any]
"""An answer whose shape another standard has."""
