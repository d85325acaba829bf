"""What requests carry that the router does not know: queries, and the bodies of what is not about exports."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

_PREFIX = "Prefix of the store; default: that of the export, else the first in the configuration."
Prefix = Annotated[str | None, Meta(description=_PREFIX)]


class PrefixQuery(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where in the store."""

    prefix: Prefix = None


class RemoveQuery(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How an export is removed."""

    purge: Annotated[bool, Meta(description="Delete its snapshots too, for good.")] = False
    force: Annotated[bool, Meta(description="Even while it is in use, or if something is lost.")] = False
    now: Annotated[bool, Meta(description="Delete it for good: no undelete.")] = False


class DeleteLogQuery(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How a write log is deleted."""

    force: Annotated[bool, Meta(description="Even if it holds what the store does not have.")] = False


class LogExportRequest(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where to write what a log holds: an absolute path on the daemon's host.

    `partial`: a damaged log is exported as far as it is whole.
    """

    path: str
    partial: bool = False


class HandoffRequest(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`dry_run`: start a successor, see that it could take over, end it."""

    dry_run: bool = False
