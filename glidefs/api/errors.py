"""Every error as an HTTP status and a problem document: RFC 9457, with our own `error` and `hint` in it.

A kind of problem has a name, which programs tell it by and which stays as it is, and a title for people.
"""

from __future__ import annotations

import logging
from urllib.parse import quote

from msgspec import Struct

from glidefs import errors
from glidefs.api.access import Forbidden, Unauthorized
from glidefs.handoff.predecessor import HandoffFailed
from glidefs.volume.volume import DrainTimeout

log = logging.getLogger(__name__)

URN = "urn:glidefs:problem:"
MEDIA_TYPE = "application/problem+json"


class BadRequest(errors.GlideError):
    """The path, the query or the body of a request is not what the API takes."""


class BodyTooLarge(errors.GlideError):
    """The body of a request has more bytes than any can need."""


class NoSuchPath(errors.GlideError):
    """The API has no such path."""


class WrongMethod(errors.GlideError):
    """The path is there, but not with this method. ``allowed`` are those that it has."""

    def __init__(self, message: str, allowed: str) -> None:
        self.allowed = allowed
        super().__init__(message)


class Problem(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is wrong, as RFC 9457 has it. Programs tell problems apart by `type`.

    `error` says on one line what is wrong and `hint` what to do about it; `detail` is both. `scope` is there
    where a token lacks one: the scope that it takes.
    """

    type: str
    title: str
    status: int
    detail: str
    instance: str
    error: str
    hint: str = ""
    scope: str = ""


class Kind(Struct, frozen=True):
    """A kind of problem: its name behind :data:`URN`, its status and its title."""

    name: str
    status: int
    title: str

    @property
    def type(self) -> str:
        """The URI of the kind."""
        return URN + self.name


INTERNAL = Kind("internal", 500, "The daemon failed")
STATE = Kind("state", 500, "The operation failed")
LOCAL_FILE = Kind("local-file", 500, "A file or device of the daemon's host could not be used")
KINDS: tuple[tuple[type[Exception], Kind], ...] = (
    (Unauthorized, Kind("unauthorized", 401, "A token is needed")),
    (Forbidden, Kind("forbidden", 403, "The token does not allow this")),
    (BadRequest, Kind("bad-request", 400, "The request is not as the API takes it")),
    (BodyTooLarge, Kind("body-too-large", 413, "The request body is too large")),
    (NoSuchPath, Kind("no-such-path", 404, "The API has no such path")),
    (WrongMethod, Kind("wrong-method", 405, "The path does not take this method")),
    (errors.UnknownExport, Kind("unknown-name", 404, "Nothing has this name")),
    (errors.ExportExists, Kind("name-taken", 409, "The name is taken")),
    (errors.OwnedElsewhere, Kind("owned-elsewhere", 409, "Another host has the volume")),
    (errors.CacheBusy, Kind("cache-busy", 409, "Another daemon uses the cache directory")),
    (errors.InUse, Kind("in-use", 409, "It is in use, or exists here alone")),
    (errors.NotOpen, Kind("not-open", 409, "The export is not served here now")),
    (errors.Fenced, Kind("fenced", 410, "This host may not serve the volume any more")),
    (errors.InvalidName, Kind("invalid-name", 400, "The name is not possible")),
    (errors.ConfigError, Kind("invalid-request", 400, "What was asked cannot be done as it was written")),
    (errors.NotSupported, Kind("not-supported", 422, "This host or volume cannot do that")),
    (errors.NotFound, Kind("not-in-store", 404, "The store does not have it")),
    (errors.PreconditionFailed, Kind("changed-meanwhile", 409, "The store has another state by now")),
    (errors.AccessDenied, Kind("store-access-denied", 502, "The store refused the credentials")),
    (errors.NoSuchBucket, Kind("no-such-bucket", 502, "The bucket does not exist")),
    (errors.StoreUnsupported, Kind("store-unsupported", 502, "The store lacks what GlideFS needs")),
    (errors.StoreWentBack, Kind("store-went-back", 503, "The store is older than this host knows it to be")),
    (errors.StoreError, Kind("store-failed", 503, "The store did not do what it was asked")),
    (errors.Refused, Kind("refused", 503, "The daemon takes no such request now")),
    (errors.NotServed, Kind("not-served", 503, "The export cannot be served")),
    (errors.Abandoned, Kind("abandoned", 503, "The wait was given up")),
    (HandoffFailed, Kind("handoff-failed", 503, "The handoff did not come about")),
    (DrainTimeout, Kind("drain-timeout", 504, "The upload did not end in time")),
    (errors.CorruptObject, Kind("corrupt-object", 500, "An object or a file is damaged")),
    (errors.CorruptLog, Kind("corrupt-log", 500, "A write log is damaged")),
    (errors.DeviceError, Kind("device", 500, "A block device could not be made or changed")),
    (errors.GlideError, STATE),
    (OSError, LOCAL_FILE),
)
"""The first line that fits an error counts."""


def problem_of(error: Exception, instance: str) -> Problem:
    """The answer for ``error`` at the path ``instance``, which is not quoted.

    An error that is not ours is logged in full; the answer names its kind only.
    """
    kind = next((kind for known, kind in KINDS if isinstance(error, known)), INTERNAL)
    if isinstance(error, errors.GlideError):
        reason, hint = split_hint(str(error))
    elif isinstance(error, OSError):
        log.error("operation failed: %s", error)
        where = f"{error.filename}: " if error.filename else ""
        reason, hint = f"{where}{error.strerror or error}", "see the daemon's log"
    else:
        log.error("unexpected error", exc_info=error)
        reason, hint = f"internal error: {type(error).__name__}", "see the daemon's log"
    return Problem(
        type=kind.type,
        title=kind.title,
        status=kind.status,
        detail=f"{reason}; {hint}" if hint else reason,
        instance=quote(instance),
        error=reason,
        hint=hint,
        scope=error.scope.word if isinstance(error, Forbidden) else "",
    )


def headers_of(error: Exception) -> dict[str, str]:
    """Header fields that HTTP wants beside a problem."""
    if isinstance(error, Unauthorized):
        return {"WWW-Authenticate": "Bearer"}
    if isinstance(error, Forbidden):
        return {"WWW-Authenticate": f'Bearer error="insufficient_scope", scope="{error.scope.word}"'}
    return {"Allow": error.allowed} if isinstance(error, WrongMethod) else {}


def split_hint(message: str) -> tuple[str, str]:
    """Our errors read "what is wrong; what to do"."""
    line = " ".join(message.split())
    reason, _, hint = line.partition("; ")
    return reason, hint
