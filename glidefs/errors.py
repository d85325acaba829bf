"""Every error that GlideFS raises on purpose, named by what it means.

An error carries what an operator needs (key, offset, volume) as attributes, says on one line what
is wrong and what to do, and knows whether it is ``temporary``: the retry wrapper
(:mod:`glidefs.store.resilient`) asks the error and keeps no list of its own.
"""

from __future__ import annotations

from typing import ClassVar


class GlideError(Exception):
    """Base of all of them.

    ``temporary`` is true where the same call may succeed later without anybody changing anything.
    """

    temporary: bool = False

    def __init__(self, message: str = "") -> None:
        super().__init__(message or type(self).__name__)

    @property
    def message(self) -> str:
        """The one-line text for logs, the CLI and the API."""
        return str(self)


class CorruptObject(GlideError):
    """An object or a local file does not hold what its format promises.

    ``key`` is the store key or local path, ``offset`` the byte in it where the fault was seen.
    """

    def __init__(self, key: str, offset: int, why: str) -> None:
        self.key = key
        self.offset = offset
        self.why = why
        super().__init__(
            f"{key}: corrupt at byte {offset}: {why}; restore it from another copy or go back to a snapshot"
        )


class WrongObject(CorruptObject):
    """An object is whole and valid, but the wrong one for its place: swapped, copied or restored amiss."""

    def __init__(self, key: str, why: str) -> None:
        super().__init__(key, 0, why)
        self.args = (f"{key}: not the object that belongs here: {why}; put the right one back",)


class NewerFormat(CorruptObject):
    """The object is whole, but of a version or with flags that are not known here."""


class OlderFormat(CorruptObject):
    """The object is whole, but of a version from before the first release that promised to stay readable."""

    def __init__(self, key: str, offset: int, found: int, known: int) -> None:
        super().__init__(key, offset, f"format {found}; this GlideFS reads format {known}")
        self.args = (
            f"{key}: written by an early GlideFS (format {found}; this one reads format {known}): "
            "export it with the version that wrote it",
        )


class CorruptLog(GlideError):
    """A write log on this host has damage below a position that was known to be durable."""

    def __init__(
        self, path: str, why: str, remedy: str = "see `glidefs logs` to export what is readable"
    ) -> None:
        self.path = path
        self.why = why
        super().__init__(f"{path}: damaged write log: {why}; {remedy}")


class Fenced(GlideError):
    """Another host (or a removal) took the volume; this host's copy must not be served any more."""

    def __init__(self, volume: str, why: str) -> None:
        self.volume = volume
        self.why = why
        super().__init__(f"volume {volume} is fenced: {why}; its local log is kept, see `glidefs logs`")


class NotOpen(GlideError):
    """An export is not served here now, or cannot be known: `glidefs show` says why."""


class NotServed(GlideError):
    """A verb did what it should, but the export cannot be served, for ``reason``."""

    def __init__(self, name: str, reason: str, *, retried: bool) -> None:
        self.name, self.reason = name, reason
        again = "; it is tried again by itself" if retried else ""
        super().__init__(f"{name} cannot be served: {reason}{again}")


class StoreError(GlideError):
    """A request to the object store failed.

    ``ambiguous`` is true on an error of a conditional put when an earlier attempt of the same put
    may have been applied although its answer was lost: the caller must read the key to find out.
    """

    default_temporary: ClassVar[bool] = False
    waits: ClassVar[bool] = False
    """Whether a serving daemon waits until it is over, although somebody must act first."""

    def __init__(
        self,
        why: str = "",
        *,
        key: str = "",
        op: str = "",
        temporary: bool | None = None,
        ambiguous: bool = False,
    ) -> None:
        self.why = why or (type(self).__doc__ or "").split("\n", 1)[0].rstrip(".")
        self.key = key
        self.op = op
        self.temporary = self.default_temporary if temporary is None else temporary
        self.ambiguous = ambiguous
        where = " ".join(part for part in (op, key) if part)
        super().__init__(f"{where}: {self.why}" if where else self.why)


class StoreUnavailable(StoreError):
    """The store does not answer, or answered that it cannot serve now."""

    default_temporary = True


class Throttled(StoreError):
    """The store asks for fewer requests."""

    default_temporary = True


class NotFound(StoreError):
    """No such object in the store."""


class PreconditionFailed(StoreError):
    """The object changed, exists already or is gone, so the conditional request was refused."""


class StoreWentBack(StoreError):
    """The store has an older root than this host: a bucket was restored, or a replica lags behind.

    Nothing is adopted, put or given up until it has caught up, or an operator says that the older one counts.
    """

    def __init__(self, key: str, ours: int, found: int) -> None:
        self.ours = ours
        self.found = found
        super().__init__(
            f"the store went back in time: it has commit {found} of this volume, this host has {ours}; bring "
            "the store up to date, or take the older state with 'glidefs attach NAME --accept-older'",
            key=key,
        )


class Conflict(StoreError):
    """Another conditional request on the same key was in flight; try again."""

    default_temporary = True


class StoreRefused(StoreError):
    """The store refused the request."""

    waits = True


class AccessDenied(StoreError):
    """The store refused the credentials; check them and the bucket's policy."""

    waits = True


class NoSuchBucket(StoreError):
    """The bucket does not exist; create it or correct the store url.

    Some providers answer this for a moment about a bucket that does exist, so a store object that
    has worked before raises it as temporary.
    """

    waits = True


class StoreUnsupported(StoreError):
    """The store ignores a feature that correctness rests on; use another store."""

    waits = True


class InvalidName(GlideError):
    """A name that may not become part of a path or a key."""

    def __init__(self, kind: str, name: str) -> None:
        self.kind = kind
        self.name = name
        shown = name if len(name) <= 140 else name[:140] + "..."
        super().__init__(
            f"invalid {kind} name {shown!r}: use 1-128 of letters, digits, '.', '_', '-', "
            "beginning with a letter or a digit"
        )


class ConfigError(GlideError):
    """The configuration cannot work as written."""


class ExportExists(GlideError):
    """The name is taken by an export, volume or base."""

    def __init__(self, name: str, why: str = "") -> None:
        self.name = name
        super().__init__(f"{name}: {why or 'exists already; choose another name or remove it first'}")


class UnknownExport(GlideError):
    """No export, volume, base, snapshot or tag of that name."""

    def __init__(self, name: str, why: str = "") -> None:
        self.name = name
        super().__init__(f"{name}: {why or 'no such export; `glidefs list` shows what this host serves'}")


class OwnedElsewhere(GlideError):
    """Another host serves the volume. ``note`` says what else is known about that host."""

    def __init__(self, volume: str, node: str, note: str = "") -> None:
        self.volume = volume
        self.node = node
        what = f" {note}" if note else ""
        super().__init__(
            f"volume {volume} is owned by node {node or '(unnamed)'}{what}: detach it there, "
            "or take it over with --take-over, which fences that node"
        )


class InUse(GlideError):
    """A verb would take something away that is in use, or that exists here alone; nothing was done."""


class NotSupported(GlideError):
    """This kernel, transport, volume or build cannot do what was asked."""


class GcRefused(GlideError):
    """A run of gc stopped, because it could not be sure that what it was about to delete is garbage."""

    def __init__(self, prefix: str, why: str) -> None:
        self.prefix = prefix
        super().__init__(f"gc of prefix {prefix} stopped: {why}")


class DeviceError(GlideError):
    """A block device could not be made, recovered or removed."""

    def __init__(self, why: str, *, device: str = "", errno: int = 0) -> None:
        self.device = device
        self.errno = errno
        super().__init__(f"{device}: {why}" if device else why)


class Refused(GlideError):
    """The daemon takes no verbs just now: it stops, or hands over to another process."""

    temporary = True


class Abandoned(GlideError):
    """A wait was ended because its client has gone; nothing was done."""


class CacheBusy(GlideError):
    """Another daemon uses the cache directory."""

    def __init__(self, path: str, pid: int | None = None) -> None:
        self.path = path
        self.pid = pid
        holder = f" by process {pid}" if pid else ""
        super().__init__(f"{path}: in use{holder}; stop that daemon or set another [cache] dir")
