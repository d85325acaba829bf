"""Every error as an HTTP status, a one-line reason and a hint."""

from __future__ import annotations

import logging

from msgspec import Struct

from glidefs import errors
from glidefs.handoff.predecessor import HandoffFailed
from glidefs.volume.volume import DrainTimeout

log = logging.getLogger(__name__)


class ErrorAnswer(Struct, frozen=True):
    """Body of every answer that is not 2xx."""

    error: str
    hint: str = ""


_STATUS: tuple[tuple[type[Exception], int], ...] = (
    (errors.UnknownExport, 404),
    (errors.ExportExists, 409),
    (errors.OwnedElsewhere, 409),
    (errors.CacheBusy, 409),
    (errors.InUse, 409),
    (errors.Fenced, 410),
    (errors.InvalidName, 400),
    (errors.ConfigError, 400),
    (errors.NotSupported, 422),
    (errors.NotFound, 404),
    (errors.PreconditionFailed, 409),
    (errors.AccessDenied, 502),
    (errors.NoSuchBucket, 502),
    (errors.StoreUnsupported, 502),
    (errors.StoreError, 503),
    (errors.Refused, 503),
    (errors.NotServed, 503),
    (HandoffFailed, 503),
    (DrainTimeout, 504),
)


def describe(error: Exception) -> tuple[int, ErrorAnswer]:
    """Status and body for `error`. One that is not ours is logged in full; the answer names its kind."""
    for kind, status in _STATUS:
        if isinstance(error, kind):
            return status, split_hint(str(error))
    if isinstance(error, errors.GlideError):
        return 500, split_hint(str(error))
    if isinstance(error, OSError):
        log.error("operation failed: %s", error)
        where = f"{error.filename}: " if error.filename else ""
        return 500, ErrorAnswer(f"{where}{error.strerror or error}", "see the daemon's log")
    log.error("unexpected error", exc_info=error)
    return 500, ErrorAnswer(f"internal error: {type(error).__name__}", "see the daemon's log")


def split_hint(message: str) -> ErrorAnswer:
    """Our errors read "what is wrong; what to do"."""
    line = " ".join(message.split())
    reason, _, hint = line.partition("; ")
    return ErrorAnswer(reason, hint)
