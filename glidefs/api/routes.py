"""The table of the API: for each operation its path, who may call it, what it takes and what it answers.

The application, the OpenAPI document, the audit log and the tests are made from it.
"""

from __future__ import annotations

from typing import Any

from msgspec import Struct

from glidefs.api import answers, inputs
from glidefs.api.access import Scope
from glidefs.api.handlers import Handler, Handlers
from glidefs.bases.stored import BaseInfo
from glidefs.exports import requests
from glidefs.handoff.predecessor import Outcome

VERSION = "1"
PREFIX = f"/v{VERSION}"
OLD_PREFIX = "/api"
"""Paths of before there were versions; processes and commands of such a time use them."""
MAX_BODY = 64 << 10
"""Bytes of a request body."""


class Text(Struct, frozen=True):
    """An answer that is not JSON."""

    media_type: str


class Route(Struct, frozen=True, kw_only=True):
    """One operation.

    ``verb`` is its name in the audit log, and with underscores its operation id. ``path`` stands behind the
    version, or alone where ``versioned`` is off; ``old`` is where it was before, if not in OLD_PREFIX.
    ``takes`` is the struct of the body with PUT and POST, of the query otherwise. Of its fields those in
    ``admin`` take that scope when they are on. ``gives`` is the type of the answer, a tuple where it may be
    one of several, None without a body; ``errors`` are the statuses that it may have beside those that every
    operation has. ``at`` and ``example``: an example's values of the path, and of ``takes``.
    """

    method: str
    path: str
    verb: str
    handler: Handler
    scope: Scope
    group: str
    takes: type[Struct] | None = None
    admin: tuple[str, ...] = ()
    gives: Any = None
    success: tuple[int, ...] = (200,)
    errors: tuple[int, ...] = ()
    at: dict[str, str] = {}
    example: dict[str, Any] = {}
    versioned: bool = True
    old: str = ""

    @property
    def has_body(self) -> bool:
        """Whether ``takes`` comes in the body."""
        return self.takes is not None and self.method in ("PUT", "POST")

    @property
    def changes(self) -> bool:
        """Whether it may change something."""
        return self.method not in ("GET", "HEAD")

    @property
    def place(self) -> str:
        """Its path as the document has it."""
        return PREFIX + self.path if self.versioned else self.path

    @property
    def places(self) -> tuple[str, ...]:
        """All paths at which it is found."""
        old = OLD_PREFIX + self.path if self.versioned and not self.old else self.old
        return (self.place, old) if old else (self.place,)


EXPORT = "/exports/{name}"
LOG = "/logs/{volume}/{log}"
STORE = (502, 503)
"""Answers of what asks the store."""
VERB = (404, 409, 410, 422, *STORE)
"""Answers of what changes an export."""
_VM = {"name": "vm1"}
_IDS = {"volume": "5f0c9a4e7d3b4b0f9a51c2d3e4f50617", "log": "0d6e4f1c2b3a49588776655443322110"}


def _verb(verb: str, handler: Handler, takes: type[Struct], gives: Any, **more: Any) -> Route:
    """POST of a verb to an export."""
    usual: dict[str, Any] = {"method": "POST", "scope": Scope.OPERATE, "group": "exports", "errors": VERB}
    path = f"{EXPORT}/{verb}"
    return Route(path=path, verb=verb, handler=handler, takes=takes, gives=gives, at=_VM, **usual | more)


_EXPORTS = (
    Route(
        method="GET",
        path="/exports",
        verb="list",
        handler=Handlers.list,
        scope=Scope.READ,
        group="exports",
        gives=list[requests.ExportStatus],
        errors=(503,),
    ),
    Route(
        method="GET",
        path=EXPORT,
        verb="show",
        handler=Handlers.show,
        scope=Scope.READ,
        group="exports",
        gives=requests.ExportStatus,
        errors=(404, 503),
        at=_VM,
    ),
    Route(
        method="PUT",
        path=EXPORT,
        verb="create",
        handler=Handlers.create,
        scope=Scope.OPERATE,
        group="exports",
        takes=requests.CreateRequest,
        gives=requests.ExportStatus,
        success=(201, 200),
        errors=VERB,
        at=_VM,
        example={"size": "10GiB", "transport": "nbd"},
    ),
    Route(
        method="DELETE",
        path=EXPORT,
        verb="remove",
        handler=Handlers.remove,
        scope=Scope.OPERATE,
        admin=("purge", "force", "now"),
        group="exports",
        takes=inputs.RemoveQuery,
        gives=answers.Removed,
        errors=VERB,
        at=_VM,
    ),
    _verb(
        "undelete",
        Handlers.undelete,
        requests.UndeleteRequest,
        answers.Undeleted,
        example={"prefix": "default"},
    ),
    _verb(
        "attach",
        Handlers.attach,
        requests.AttachRequest,
        requests.ExportStatus,
        admin=("take_over", "accept_older"),
        example={"transport": "nbd"},
    ),
    _verb(
        "resize",
        Handlers.resize,
        requests.ResizeRequest,
        requests.ExportStatus,
        admin=("shrink",),
        example={"size": "+5GiB"},
    ),
    _verb(
        "transport",
        Handlers.transport,
        requests.TransportRequest,
        requests.ExportStatus,
        example={"transport": "nbd"},
    ),
    _verb(
        "drain",
        Handlers.drain,
        requests.DrainRequest,
        requests.ExportStatus,
        errors=(*VERB, 504),
        example={"timeout": 60},
    ),
    _verb(
        "detach",
        Handlers.detach,
        requests.DetachRequest,
        answers.Detached,
        admin=("force",),
        errors=(*VERB, 504),
        example={"timeout": 60},
    ),
)

_COPIES = (
    _verb(
        "snapshot",
        Handlers.snapshot,
        requests.SnapshotRequest,
        answers.MadeSnapshot,
        success=(201,),
        errors=(*VERB, 504),
        example={"tag": "golden", "timeout": 60},
    ),
    Route(
        method="GET",
        path=f"{EXPORT}/snapshots",
        verb="snapshots",
        handler=Handlers.snapshots,
        scope=Scope.READ,
        group="exports",
        takes=inputs.PrefixQuery,
        gives=list[answers.Snapshot],
        errors=(404, *STORE),
        at=_VM,
    ),
    Route(
        method="DELETE",
        path=f"{EXPORT}/snapshots/{{sequence}}",
        verb="delete-snapshot",
        handler=Handlers.delete_snapshot,
        scope=Scope.ADMIN,
        group="exports",
        takes=inputs.PrefixQuery,
        gives=answers.DeletedSnapshot,
        errors=(404, 409, *STORE),
        at=_VM | {"sequence": "2"},
    ),
    _verb("tag", Handlers.tag, requests.TagRequest, answers.MadeTag, example={"tag": "golden"}),
    _verb(
        "promote",
        Handlers.promote,
        requests.PromoteRequest,
        (requests.ExportStatus, answers.MadeBase),
        example={"base": "golden"},
    ),
    _verb(
        "profile",
        Handlers.profile,
        requests.ProfileRequest,
        answers.Profile,
        example={"stop_after": 0.1},
    ),
    Route(
        method="GET",
        path="/volumes",
        verb="volumes",
        handler=Handlers.volumes,
        scope=Scope.READ,
        group="store",
        takes=inputs.PrefixQuery,
        gives=list[answers.VolumeInStore],
        errors=STORE,
    ),
    Route(
        method="GET",
        path="/tags",
        verb="tags",
        handler=Handlers.tags,
        scope=Scope.READ,
        group="store",
        takes=inputs.PrefixQuery,
        gives=list[answers.Tag],
        errors=STORE,
    ),
    Route(
        method="DELETE",
        path="/tags/{name}",
        verb="delete-tag",
        handler=Handlers.delete_tag,
        scope=Scope.ADMIN,
        group="store",
        takes=inputs.PrefixQuery,
        gives=answers.DeletedTag,
        errors=(404, 409, *STORE),
        at={"name": "golden"},
    ),
    Route(
        method="GET",
        path="/bases",
        verb="bases",
        handler=Handlers.list_bases,
        scope=Scope.READ,
        group="store",
        takes=inputs.PrefixQuery,
        gives=list[BaseInfo],
        errors=STORE,
    ),
    Route(
        method="POST",
        path="/bases/{name}",
        verb="bless",
        handler=Handlers.bless,
        scope=Scope.ADMIN,
        group="store",
        takes=requests.BlessRequest,
        gives=answers.Blessed,
        success=(201, 200),
        errors=(404, 409, *STORE),
        at={"name": "debian-12"},
        example={"image": "/var/lib/images/debian-12.raw"},
    ),
    Route(
        method="DELETE",
        path="/bases/{name}",
        verb="remove-base",
        handler=Handlers.remove_base,
        scope=Scope.ADMIN,
        group="store",
        takes=inputs.PrefixQuery,
        gives=answers.RemovedBase,
        errors=(404, 409, *STORE),
        at={"name": "debian-12"},
    ),
    Route(
        method="HEAD",
        path="/manifests/{prefix}/{name}",
        verb="has-base",
        handler=Handlers.manifest,
        scope=Scope.READ,
        group="store",
        errors=(404,),
        at={"prefix": "default", "name": "debian-12"},
    ),
)

_HOST = (
    Route(
        method="GET",
        path="/logs",
        verb="logs",
        handler=Handlers.logs,
        scope=Scope.READ,
        group="host",
        gives=list[answers.WriteLog],
        errors=(503,),
    ),
    Route(
        method="POST",
        path=f"{LOG}/export",
        verb="export-log",
        handler=Handlers.export_log,
        scope=Scope.ADMIN,
        group="host",
        takes=inputs.LogExportRequest,
        gives=answers.ExportedLog,
        errors=(404, 409, 503),
        at=_IDS,
        example={"path": "/var/tmp/log.raw"},
    ),
    Route(
        method="DELETE",
        path=LOG,
        verb="delete-log",
        handler=Handlers.delete_log,
        scope=Scope.ADMIN,
        group="host",
        takes=inputs.DeleteLogQuery,
        gives=answers.DeletedLog,
        errors=(404, 409, 503),
        at=_IDS,
    ),
    Route(
        method="POST",
        path="/handoff",
        verb="handoff",
        handler=Handlers.hand_over,
        scope=Scope.ADMIN,
        group="host",
        takes=inputs.HandoffRequest,
        gives=Outcome,
        errors=(503,),
        example={"dry_run": True},
        old="/admin/handoff",
    ),
    Route(
        method="GET",
        path="/live",
        verb="live",
        handler=Handlers.live,
        scope=Scope.READ,
        group="host",
        gives=answers.Live,
        errors=(503,),
    ),
    Route(
        method="GET",
        path="/live/{name}",
        verb="live-of",
        handler=Handlers.live_of,
        scope=Scope.READ,
        group="host",
        gives=answers.LiveHistory,
        errors=(404, 503),
        at=_VM,
    ),
    Route(
        method="GET",
        path="/metrics",
        verb="metrics",
        handler=Handlers.metrics,
        scope=Scope.METRICS,
        group="host",
        gives=Text("text/plain"),
        versioned=False,
    ),
    Route(
        method="GET",
        path="/health",
        verb="health",
        handler=Handlers.health,
        scope=Scope.METRICS,
        group="host",
        gives=answers.Health,
        versioned=False,
    ),
    Route(
        method="GET",
        path="/health/ready",
        verb="ready",
        handler=Handlers.ready,
        scope=Scope.METRICS,
        group="host",
        gives=answers.Health,
        success=(200, 503),
        versioned=False,
    ),
    Route(
        method="GET",
        path="/openapi.json",
        verb="openapi",
        handler=Handlers.openapi,
        scope=Scope.NONE,
        group="api",
        gives=answers.Document,
        versioned=False,
    ),
    Route(
        method="GET",
        path="/docs",
        verb="docs",
        handler=Handlers.docs,
        scope=Scope.NONE,
        group="api",
        gives=Text("text/html"),
        versioned=False,
    ),
)

ROUTES: tuple[Route, ...] = (*_EXPORTS, *_COPIES, *_HOST)
OPEN = frozenset(route.place for route in ROUTES if route.scope is Scope.NONE)
"""Paths that need no token."""
