"""Ownership of a volume: the manifest root names the node and the log id that may commit to it.

The log id is the only fencing token; node and epoch are labels for people. It is drawn when a host
takes a volume and committed before the first write, so a log that the root does not name was set
aside by that fact.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable
from typing import NamedTuple

import msgspec

from glidefs.errors import (
    Conflict,
    ExportExists,
    Fenced,
    NotFound,
    OwnedElsewhere,
    PreconditionFailed,
    UnknownExport,
)
from glidefs.formats.manifest import NO_ID, Root, decode_root, encode_root, page_count
from glidefs.formats.pack import ID_SIZE
from glidefs.names import manifest_key, volumes_prefix
from glidefs.store.base import ObjectStore, dir_name

CONFLICT_PAUSE = 0.05
DOOMED_PATIENCE = 2.0
"""Seconds to wait for a tombstone that somebody is about to delete."""
DOOMED_FOR = 900.0
"""Seconds after which somebody who was about to delete a tombstone has died before that. Far above the
deadline of a request and what the clocks of two hosts differ by."""


class CommitResult(NamedTuple):
    """``etag`` is now the root's. ``adopted`` is what the store has instead of what was put."""

    etag: str
    adopted: Root | None


class OwnedRoot(NamedTuple):
    """A root that names a node as owner."""

    prefix: str
    root: Root
    etag: str


def new_id() -> bytes:
    """A random id of 16 bytes for a volume or a log."""
    return secrets.token_bytes(ID_SIZE)


def empty_root(
    name: str,
    size: int,
    node: str,
    *,
    transport: str = "auto",
    flush: str = "local",
    source: str = "",
    created_at: int | None = None,
) -> Root:
    """The first root of a new, empty volume that ``node`` owns, with ids drawn for it."""
    root = Root(
        volume_id=new_id(),
        name=name,
        size=size,
        page_ids=(b"",) * page_count(size),
        log_id=new_id(),
        owner_node=node,
        epoch=1,
        transport=transport,
        source=source,
        created_at=int(time.time()) if created_at is None else created_at,
    )
    return msgspec.structs.replace(root, flush=flush)


def fork_root(
    base: Root, name: str, size: int, node: str, *, source: str, transport: str = "auto", flush: str = "local"
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
    own = empty_root(name, size, node, transport=transport, flush=flush, source=source)
    if base.inline_page is not None:
        return msgspec.structs.replace(own, inline_page=base.inline_page)
    missing = page_count(size) - len(base.page_ids)
    return msgspec.structs.replace(own, page_ids=base.page_ids + (b"",) * missing)


def commit_root(store: ObjectStore, key: str, data: bytes, etag: str | None, log_id: bytes) -> CommitResult:
    """Put an encoded root over the one of ``etag`` (None: where there is none).

    A refusal may be our own put whose answer was lost, so it is resolved by reading the key: a root
    with our ``log_id`` is adopted whole, and the caller rebuilds on it. Raises Fenced for anything
    else, StoreError when the store fails (the put may have been applied: the same call again finds out).
    """
    while True:
        try:
            if etag is None:
                return CommitResult(store.put(key, data, if_none_match=True), None)
            return CommitResult(store.put(key, data, if_match=etag), None)
        except Conflict:
            time.sleep(CONFLICT_PAUSE)
        except PreconditionFailed:
            found = resolve(store, key, data, log_id, gone_is_fence=etag is not None)
            if found is not None:
                return found


def commit_first(store: ObjectStore, key: str, root: Root, data: bytes) -> CommitResult:
    """Put the first root of a volume where there is none, or the tombstone of one that was removed.

    ``data`` is the root, encoded.
    As :func:`commit_root`: Fenced means that another volume has the name, or that this one was put before,
    taken over and removed. Raises Conflict where somebody is about to delete a tombstone.
    """
    deadline = time.monotonic() + DOOMED_PATIENCE
    while True:
        try:
            return commit_root(store, key, data, None, root.log_id)
        except Fenced:
            try:
                found = store.get(key)
            except NotFound:
                continue  # removed meanwhile
            there = decode_root(key, found.data)
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
            return commit_root(store, key, data, found.etag, root.log_id)
        except Fenced:
            continue  # the tombstone went, or somebody was faster


def resolve(
    store: ObjectStore, key: str, data: bytes | None, log_id: bytes, *, gone_is_fence: bool = True
) -> CommitResult | None:
    """What the store has under ``key`` where it is not what we expected. Raises Fenced,
    CorruptObject.

    None: there is nothing, and ``gone_is_fence`` is false.
    """
    try:
        found = store.get(key)
    except NotFound:
        if gone_is_fence:
            raise Fenced(key, "its manifest is gone from the store") from None
        return None
    if found.data == data:
        return CommitResult(found.etag, None)
    root = decode_root(key, found.data)
    if root.log_id == log_id and log_id != NO_ID:
        return CommitResult(found.etag, root)
    owner = f"node {root.owner_node} has it now" if root.owner_node else "nobody owns it any more"
    raise Fenced(key, f"{owner} (epoch {root.epoch})")


def create(store: ObjectStore, prefix: str, root: Root) -> str:
    """Put the first root of a volume. Returns its ETag.

    Raises ExportExists if the name is taken, StoreError.
    """
    try:
        result = commit_first(store, manifest_key(prefix, root.name), root, encode_root(root))
    except Fenced as error:
        raise ExportExists(root.name) from error
    return result.etag


def tombstone(root: Root, *, doomed: bool) -> Root:
    """What replaces the root of a volume that is removed."""
    return msgspec.structs.replace(
        root,
        owner_node="",
        log_id=NO_ID,
        removed_at=int(time.time()),
        doomed=doomed,
        sequence=root.sequence + 1,
    )


def read_root(store: ObjectStore, prefix: str, name: str) -> tuple[Root, str]:
    """The root of a volume and its ETag. Raises UnknownExport, CorruptObject, StoreError."""
    key = manifest_key(prefix, name)
    try:
        found = store.get(key)
    except NotFound:
        raise UnknownExport(name, f"no volume of that name in prefix {prefix}") from None
    return decode_root(key, found.data), found.etag


def attach(
    store: ObjectStore, prefix: str, name: str, node: str, *, take_over: bool = False
) -> tuple[Root, str]:
    """Make ``node`` the owner, with a new log id. Returns the root and its ETag.

    Raises OwnedElsewhere where another node owns it (unless ``take_over``, which fences that node)
    or was faster, UnknownExport where there is none, or only a tombstone.
    """
    while True:
        root, etag = read_root(store, prefix, name)
        if root.removed_at:
            raise UnknownExport(name, f"it was removed from prefix {prefix}")
        if root.owner_node not in ("", node) and not take_over:
            raise OwnedElsewhere(name, root.owner_node)
        mine = msgspec.structs.replace(
            root,
            owner_node=node,
            log_id=new_id(),
            last_segment=0,
            epoch=root.epoch + 1,
            sequence=root.sequence + 1,
        )
        try:
            result = commit_root(store, manifest_key(prefix, name), encode_root(mine), etag, mine.log_id)
        except Fenced:
            continue  # somebody committed in between: look again at who owns it
        return (mine if result.adopted is None else result.adopted), result.etag


def detach(store: ObjectStore, prefix: str, root: Root, etag: str) -> tuple[Root, str]:
    """Give a drained and closed volume up: its root then names no owner and no log.

    ``root`` and ``etag`` are those of the last commit. Raises Fenced if it is not ours any more.
    """
    key = manifest_key(prefix, root.name)
    while True:
        free = msgspec.structs.replace(
            root, owner_node="", log_id=NO_ID, last_segment=0, sequence=root.sequence + 1
        )
        data = encode_root(free)
        result = commit_root(store, key, data, etag, root.log_id)
        if result.adopted is None:
            return free, result.etag
        root, etag = result.adopted, result.etag


def find_exports(store: ObjectStore, prefixes: Iterable[str], node: str) -> list[OwnedRoot]:
    """The roots that name ``node`` as owner: what a host that lost its disk was serving."""
    owned: list[OwnedRoot] = []
    for prefix in prefixes:
        for directory in store.list_dirs(volumes_prefix(prefix)):
            try:
                root, etag = read_root(store, prefix, dir_name(directory))
            except UnknownExport:
                continue
            if root.owner_node == node:
                owned.append(OwnedRoot(prefix, root, etag))
    return owned
