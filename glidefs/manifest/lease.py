"""Ownership of a volume: the manifest root names the host and the log id that may commit to it.

The log id is the fencing token; host id and node say whose it is, the epoch is a label for people. A log id
is drawn when a host takes a volume and committed before the first write, so a log that the root does not name
counts as set aside.

A root that is not the one we expected is judged by evidence alone (:func:`judge`): its nonce says whether we
tried to put it, its sequence whether the store went back in time, its volume id whether it is this volume at
all. Two hosts with one log id are copies of one cache directory: neither knows the nonces of the other.

A store has no conditional delete. So a root that is removed is first replaced, under its ETag, by a tombstone
that names no owner: whoever lost the volume meanwhile is refused there. One that is about to be deleted says
so (``doomed``), and for some time nobody takes the name, because the delete would hit the new volume; a crash
before the delete leaves a name that a create takes over later, again under the ETag. A tombstone keeps all
that the root had, and gc treats it as a root: :func:`undelete_root` can put the volume back until gc deletes
it, a grace period after it was put. A tombstone is deleted at once only on request, and never that of a
volume that has had more than one owner: the node that made it may not know that the store ever had it,
because no put was answered, and must not put it again.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Collection
from typing import NamedTuple, Protocol

import msgspec

from glidefs.errors import (
    Conflict,
    ExportExists,
    Fenced,
    NotFound,
    OwnedElsewhere,
    PreconditionFailed,
    StoreWentBack,
    UnknownExport,
)
from glidefs.formats.manifest import NO_ID, Root, decode_root, encode_root, page_count
from glidefs.formats.pack import ID_SIZE
from glidefs.names import manifest_key, volumes_prefix
from glidefs.store.base import ObjectStore
from glidefs.store.checked import get_checked

log = logging.getLogger(__name__)

COPIED = "(with this host's id and log, but not by a root from here: a copy of its cache directory has it)"
CONFLICT_PAUSE = 0.05
DOOMED_PATIENCE = 2.0
"""Seconds to wait for a tombstone that somebody is about to delete."""
DOOMED_FOR = 900.0
"""Seconds after which whoever was about to delete a tombstone must have died. Far above the
deadline of a request and what the clocks of two hosts differ by."""


WORTH_A_PAGE = 8
"""Volumes to compare for which a page of a listing is cheaper than as many requests."""


class CommitResult(NamedTuple):
    """``etag`` is now the root's. ``adopted`` is what the store has instead of what was put."""

    etag: str
    adopted: Root | None


class Owner(NamedTuple):
    """A host as roots name it: the id of its cache directory (16 bytes), and its name for people."""

    host: bytes
    node: str


def new_id() -> bytes:
    """A random id of 16 bytes for a volume or a log, or the nonce of a root."""
    return secrets.token_bytes(ID_SIZE)


def next_root(root: Root, **changes: object) -> Root:
    """The root that is to replace ``root``: with these changes, the next sequence and a nonce of its own."""
    return msgspec.structs.replace(root, sequence=root.sequence + 1, nonce=new_id(), **changes)


def empty_root(
    name: str,
    size: int,
    owner: Owner,
    *,
    transport: str = "auto",
    flush: str = "local",
    source: str = "",
    created_at: int | None = None,
) -> Root:
    """The first root of a new, empty volume that ``owner`` has, with ids drawn for it."""
    root = Root(
        volume_id=new_id(),
        name=name,
        size=size,
        page_ids=(b"",) * page_count(size),
        log_id=new_id(),
        nonce=new_id(),
        owner_host=owner.host,
        owner_node=owner.node,
        epoch=1,
        transport=transport,
        source=source,
        created_at=int(time.time()) if created_at is None else created_at,
    )
    return msgspec.structs.replace(root, flush=flush)


def fork_root(
    base: Root,
    name: str,
    size: int,
    owner: Owner,
    *,
    source: str,
    transport: str = "auto",
    flush: str = "local",
) -> Root:
    """The first root of a fork: the chunks of ``base``, everything else its own.

    Where ``size`` needs a page object that the source does not have (its only page is inline), the
    root has the size of the source and the fork's first commit grows it. Raises ValueError for a
    size below the source's.
    """
    if size < base.size:
        raise ValueError(f"a fork has at least the {base.size} bytes of its source")
    if base.inline_page is not None and page_count(size) > 1:
        size = base.size
    own = empty_root(name, size, owner, transport=transport, flush=flush, source=source)
    if base.inline_page is not None:
        return msgspec.structs.replace(own, inline_page=base.inline_page)
    missing = page_count(size) - len(base.page_ids)
    return msgspec.structs.replace(own, page_ids=base.page_ids + (b"",) * missing)


def commit_root(
    store: ObjectStore,
    key: str,
    new: Root,
    etag: str | None,
    *,
    base: Root | None = None,
    tried: Collection[bytes] = (),
) -> CommitResult:
    """Put ``new`` over ``base``, whose ETag is ``etag`` (both None: where there is nothing).

    A refusal may be our own put whose answer was lost, so it is resolved by reading the key. ``tried`` are
    the nonces of roots that were put before and not heard of since: one of these that is newer than
    ``base`` is adopted whole, and the caller rebuilds on it. Raises what :func:`judge` does, StoreError when
    the store fails (the put may have been applied: the same call again finds out).
    """
    data = encode_root(new, key)
    while True:
        try:
            if etag is None:
                return CommitResult(store.put(key, data, if_none_match=True), None)
            return CommitResult(store.put(key, data, if_match=etag), None)
        except Conflict:
            time.sleep(CONFLICT_PAUSE)
        except PreconditionFailed:
            found = resolve(store, key, new, base, tried)
            if found is None:
                continue  # what was in the way is gone
            if found.adopted is None or found.adopted != base:
                return found
            etag = found.etag  # the same root: the store was copied or restored


def commit_first(store: ObjectStore, key: str, root: Root, tried: Collection[bytes] = ()) -> CommitResult:
    """Put the first root of a volume where there is none, or the tombstone of one that was removed.

    As :func:`commit_root`: Fenced means that another volume has the name, or that this one was put before,
    taken over and removed. Raises Conflict where somebody is about to delete a tombstone.
    """
    deadline = time.monotonic() + DOOMED_PATIENCE
    while True:
        try:
            return commit_root(store, key, root, None, tried=tried)
        except Fenced:
            try:
                there, found = get_checked(store, key, decode_root)
            except NotFound:
                continue  # removed meanwhile
            if not there.removed_at:
                raise
            if there.volume_id == root.volume_id:
                raise Fenced(key, "another node took it over and removed it") from None
            if there.doomed and time.time() - there.removed_at < DOOMED_FOR:
                if time.monotonic() > deadline:
                    raise Conflict(f"{key}: a volume of this name is being removed; try again") from None
                time.sleep(CONFLICT_PAUSE)
                continue
        try:
            result = commit_root(store, key, root, found.etag, tried=tried)
        except Fenced:
            continue  # the tombstone went, or somebody was faster
        log.info(
            "%s: takes the name of volume %s, which was removed and cannot be undeleted any more",
            key,
            there.volume_id.hex(),
        )
        return result


def resolve(
    store: ObjectStore, key: str, new: Root | None, base: Root | None, tried: Collection[bytes]
) -> CommitResult | None:
    """What the store has under ``key``, where ``base`` is in use here and ``new`` was to be put over it.

    None: there is nothing, and nothing is expected there (``base`` is None). Raises what :func:`judge`
    does, Fenced if ``base`` is gone, CorruptObject, StoreError.
    """
    try:
        root, found = get_checked(store, key, decode_root)
    except NotFound:
        if base is not None:
            raise Fenced(key, "its manifest is gone from the store") from None
        return None
    if new is not None and root.nonce == new.nonce:
        return CommitResult(found.etag, None)
    if base is not None and root == base:
        return CommitResult(found.etag, base)
    ours = base or new
    # One that came before what is in use was tried here, too: it is back because the store went back.
    missed = root.nonce in tried and (base is None or root.sequence > base.sequence)
    if not missed and ours is not None:
        raise judge(key, root, ours)
    return CommitResult(found.etag, root)


def went_back(found: Root, ours: Root) -> bool:
    """Whether ``found`` is an older root of the volume: the store went back in time.

    One with a later epoch is what somebody made of an older root, which was taken over.
    """
    older = found.sequence < ours.sequence and found.epoch <= ours.epoch
    return older and found.volume_id == ours.volume_id


def judge(key: str, found: Root, ours: Root) -> Fenced | StoreWentBack:
    """Why a root that nobody here tried to put is not that of this host's volume, which is ``ours``."""
    whose = f"node {found.owner_node} has it now" if found.owner_node else "nobody owns it any more"
    if found.volume_id != ours.volume_id:
        return Fenced(key, f"the store has another volume of this name ({found.volume_id.hex()}); {whose}")
    if went_back(found, ours):
        return StoreWentBack(key, ours.sequence, found.sequence)
    if found.log_id == ours.log_id and found.log_id != NO_ID:
        return Fenced(
            key,
            f"a copy of this host's cache directory has committed it (sequence {found.sequence}, "
            f"node {found.owner_node}): a machine was cloned; remove the cache directory of one of the two",
        )
    return Fenced(key, f"{whose} (epoch {found.epoch})")


def create(store: ObjectStore, prefix: str, root: Root) -> str:
    """Put the first root of a volume. Returns its ETag.

    Raises ExportExists if the name is taken, StoreError.
    """
    try:
        result = commit_first(store, manifest_key(prefix, root.name), root)
    except Fenced as error:
        raise ExportExists(root.name) from error
    return result.etag


def tombstone(root: Root, *, doomed: bool) -> Root:
    """What replaces the root of a volume that is removed."""
    return next_root(
        root,
        owner_host=NO_ID,
        owner_node="",
        log_id=NO_ID,
        removed_at=int(time.time()),
        doomed=doomed,
    )


def list_etags(
    store: ObjectStore, prefix: str, due: int, gone: Callable[[], bool] = lambda: False
) -> dict[str, str] | None:
    """The ETags of all roots of a prefix, by key, to compare ``due`` volumes with.

    None where others have so much there that to ask for each is cheaper, and when nobody wants it any more
    (``gone``). Raises StoreError.
    """
    etags: dict[str, str] = {}
    token, pages = "", 0
    while due >= WORTH_A_PAGE * (pages + 1) and not gone():
        page = store.list_page(volumes_prefix(prefix), token)
        etags |= {info.key: info.etag for info in page.infos if info.key.endswith("/manifest")}
        token, pages = page.next_token, pages + 1
        if not token:
            return etags
    return None


def read_root(store: ObjectStore, prefix: str, name: str) -> tuple[Root, str]:
    """The root of a volume and its ETag. Raises UnknownExport, CorruptObject, StoreError."""
    key = manifest_key(prefix, name)
    try:
        root, found = get_checked(store, key, decode_root)
    except NotFound:
        raise UnknownExport(name, f"no volume of that name in prefix {prefix}") from None
    return root, found.etag


def has_no_log(root: Root) -> bool:
    """For :func:`attach`: the log that a root names is not on this host."""
    return False


def attach(
    store: ObjectStore,
    prefix: str,
    name: str,
    owner: Owner,
    *,
    take_over: bool = False,
    has_log: Callable[[Root], bool] = has_no_log,
) -> tuple[Root, str]:
    """Make ``owner`` that of the volume, with a new log id. Returns the root and its ETag.

    Without ``take_over``, which fences the present owner, a volume is taken only if it has no owner, or is
    this host's and its log is here (``has_log``): a copy of this host has the same id, but not that log.
    Raises OwnedElsewhere, UnknownExport where there is none, or only a tombstone.
    """
    while True:
        root, etag = read_root(store, prefix, name)
        if root.removed_at:
            raise UnknownExport(name, f"it was removed from prefix {prefix}")
        if root.owner_host != NO_ID and not take_over:
            if root.owner_host != owner.host:
                raise OwnedElsewhere(name, root.owner_node)
            if not has_log(root):
                raise OwnedElsewhere(name, root.owner_node, "with this host's id, but its log is not here")
        mine = next_root(
            root,
            owner_host=owner.host,
            owner_node=owner.node,
            log_id=new_id(),
            last_segment=0,
            epoch=root.epoch + 1,
        )
        try:
            result = commit_root(store, manifest_key(prefix, name), mine, etag, base=root)
        except Fenced:
            continue  # somebody committed in between: look again at who owns it
        return mine, result.etag


def detach(
    store: ObjectStore, prefix: str, root: Root, etag: str, tried: Collection[bytes] = ()
) -> tuple[Root, str]:
    """Give a drained and closed volume up: its root then names no owner and no log.

    ``root`` and ``etag`` are those of the last commit, ``tried`` the nonces put since. Raises Fenced if it
    is not ours any more, StoreWentBack.
    """
    key = manifest_key(prefix, root.name)
    while True:
        free = next_root(root, owner_host=NO_ID, owner_node="", log_id=NO_ID, last_segment=0)
        result = commit_root(store, key, free, etag, base=root, tried=tried)
        if result.adopted is None:
            return free, result.etag
        root, etag = result.adopted, result.etag


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
        return create(store, prefix, root)
    except ExportExists as error:
        try:
            found, _ = read_root(store, prefix, root.name)
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
            found, etag = read_root(store, prefix, mine.name)
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
            commit_root(store, key, tombstone(found, doomed=not kept), etag, base=found)
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
        found, etag = read_root(store, prefix, name)
        if not found.removed_at:
            raise ExportExists(name, f"the volume in prefix {prefix} was not removed; attach it")
        if found.doomed:
            raise UnknownExport(name, f"it is being deleted from prefix {prefix} for good")
        root = next_root(found, removed_at=0)
        try:
            commit_root(store, manifest_key(prefix, name), root, etag, base=found)
        except Fenced:
            continue  # gc or a create was faster: look at what there is now
        return root
