"""The first and the last life event of a manifest root: put where the name is free, and taken away.

A store has no conditional delete. So a root is first replaced, under its ETag, by a tombstone that
names no owner: whoever lost the volume meanwhile is refused there. One that is about to be deleted
says so, and for some time nobody takes the name, for the delete would hit the new volume; a crash
before the delete leaves a name that a create takes over later, again under the ETag.

A tombstone keeps all that the root had, and gc takes it for a root: so :func:`undelete_root` can put the
volume back until gc deletes it, a grace after it was put. At once goes only what was asked to, and never the
tombstone of a volume that has had more than one owner: the node that made it may not know that the store ever
had it, because no put was answered, and must not put it again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from glidefs.errors import ExportExists, Fenced, UnknownExport
from glidefs.formats.manifest import Root
from glidefs.manifest import lease
from glidefs.names import manifest_key
from glidefs.store.base import ObjectStore


class Identity(Protocol):
    """What an export record and a root have in common."""

    @property
    def name(self) -> str:
        """Name of the volume."""
        ...

    @property
    def volume_id(self) -> bytes:
        """16 bytes."""
        ...

    @property
    def log_id(self) -> bytes:
        """16 bytes: the fencing token."""
        ...


def put_first_root(store: ObjectStore, prefix: str, root: Root) -> str:
    """Put the root of a new volume. Returns its ETag. Raises ExportExists, StoreError."""
    try:
        return lease.create(store, prefix, root)
    except ExportExists as error:
        try:
            found, _ = lease.read_root(store, prefix, root.name)
        except UnknownExport:
            raise error from None  # removed since
        owner = f", owned by node {found.owner_node}" if found.owner_node else ""
        raise ExportExists(
            root.name,
            f"the store has a volume of this name in prefix {prefix}{owner}; attach or remove it",
        ) from None


def same_as(root: Root) -> Callable[[Root], bool]:
    """For :func:`delete_root`: this very root, and none that replaced it."""
    return lambda found: found.nonce == root.nonce


def delete_root(
    store: ObjectStore, prefix: str, mine: Identity, ours: Callable[[Root], bool | None], *, now: bool = False
) -> bool:
    """Put a tombstone over a root if it still is that of `mine`; False if another volume or owner has it.

    `ours` says, if it knows, whether this host put a root of this volume and log: a copy of it has both.
    With `now` the tombstone goes, too, where that is safe. A root that is gone already, or a tombstone,
    counts as deleted. Raises StoreError.
    """
    key = manifest_key(prefix, mine.name)
    while True:
        try:
            found, etag = lease.read_root(store, prefix, mine.name)
        except UnknownExport:
            return True
        if found.volume_id != mine.volume_id:
            return False
        if not found.removed_at and (found.log_id != mine.log_id or not ours(found)):
            return False
        kept = not now or found.epoch > 1
        if kept and found.removed_at:
            return True
        try:
            lease.commit_root(store, key, lease.tombstone(found, doomed=not kept), etag, base=found)
        except Fenced:
            continue  # somebody was faster, or a commit of ours came late: look at what there is now
        if not kept:
            store.delete(key)
        return True


def undelete_root(store: ObjectStore, prefix: str, name: str) -> Root:
    """Put back the root that a tombstone kept; it has no owner. Returns it.

    Raises UnknownExport where there is none or it is too late, ExportExists for one that was not removed.
    """
    while True:
        found, etag = lease.read_root(store, prefix, name)
        if not found.removed_at:
            raise ExportExists(name, f"the volume in prefix {prefix} was not removed; attach it")
        if found.doomed:
            raise UnknownExport(name, f"it is being deleted from prefix {prefix} for good")
        root = lease.next_root(found, removed_at=0)
        try:
            lease.commit_root(store, manifest_key(prefix, name), root, etag, base=found)
        except Fenced:
            continue  # gc or a create was faster: look at what there is now
        return root
