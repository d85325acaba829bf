"""Bases in the store: read, publish once, list, remove.

A base's manifest is written once (If-None-Match) and never changes but to become a tombstone, which
keeps its content: for the collector it stays a root as long as hosts may still fork from it.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import msgspec
from blake3 import blake3

from glidefs import names
from glidefs.errors import Conflict, ExportExists, InvalidName, NotFound, PreconditionFailed, UnknownExport
from glidefs.formats.manifest import NO_ID, Root, decode_root, encode_root, manifest_hash
from glidefs.formats.pack import ID_SIZE
from glidefs.store.base import ObjectStore, dir_name
from glidefs.store.checked import get_checked

LISTING = 8
"""Manifests that a listing reads at the same time."""
_PAUSE = 0.05


class StoredBase(NamedTuple):
    """A base's manifest as the store has it; ``manifest_hash`` (32 bytes) names exactly these bytes."""

    root: Root
    etag: str
    manifest_hash: bytes


class BaseInfo(msgspec.Struct, frozen=True):
    """A base for people. Hashes are hex; ``removed_at`` is 0 unless it is a tombstone.

    ``packs`` and ``stored_bytes`` are None where they are not in the root but in pages.
    """

    name: str
    size: int
    created_at: int
    removed_at: int
    source: str
    manifest_hash: str
    content_hash: str
    etag: str
    packs: int | None = None
    stored_bytes: int | None = None


def load_base(store: ObjectStore, prefix: str, base: str) -> StoredBase:
    """The manifest of a base, or its tombstone. Raises UnknownExport, CorruptObject, StoreError."""
    key = names.base_manifest_key(prefix, base)
    try:
        root, found = get_checked(store, key, decode_root)
    except NotFound:
        raise UnknownExport(
            base, f"no base of that name in prefix {prefix}; `glidefs bases` lists them"
        ) from None
    return StoredBase(root, found.etag, manifest_hash(found.data))


def read_base(store: ObjectStore, prefix: str, base: str) -> StoredBase:
    """The manifest of a base that can be forked from. Raises UnknownExport for a tombstone too."""
    found = load_base(store, prefix, base)
    if found.root.removed_at:
        raise UnknownExport(base, f"this base was removed {_day(found.root.removed_at)}")
    return found


def base_root(root: Root, name: str, *, created_at: int | None = None) -> Root:
    """A base's root with the content of any other root: nobody owns it, nobody writes to it.

    It depends on nothing else, so that publishing it again is seen to be the same. The id is a new one: a
    host may have local state under that of the volume. It says nothing about what was blessed.
    """
    derived = blake3(b"base\0" + root.volume_id + name.encode()).digest(length=ID_SIZE)
    return msgspec.structs.replace(
        root,
        volume_id=derived,
        name=name,
        log_id=NO_ID,
        last_segment=0,
        owner_host=NO_ID,
        owner_node="",
        nonce=NO_ID,
        epoch=0,
        transport="auto",
        flush="local",
        read_only=True,
        created_at=root.created_at if created_at is None else created_at,
        removed_at=0,
        content_hash=b"",
    )


def publish_base(store: ObjectStore, prefix: str, root: Root) -> str:
    """Write a base's manifest, once. Returns its ETag.

    A manifest that is there already with these very bytes is our own, whose answer was lost, or equal to it.
    Raises ExportExists where the name has another one, StoreError (after a temporary one, the same call finds
    out whether the first one worked).
    """
    key = names.base_manifest_key(prefix, root.name)
    data = encode_root(root, key)
    while True:
        try:
            return store.put(key, data, if_none_match=True)
        except Conflict:
            time.sleep(_PAUSE)
        except PreconditionFailed:
            try:
                there, found = get_checked(store, key, decode_root)
            except NotFound:
                continue  # deleted since: the name is free
            if found.data == data:
                return found.etag
            raise name_taken(prefix, there) from None


def name_taken(prefix: str, root: Root) -> ExportExists:
    """The error for whoever wants the name of the base that ``root`` is."""
    if root.removed_at:
        return ExportExists(
            root.name,
            f"a base of this name was removed {_day(root.removed_at)} and still keeps the name in prefix "
            f"{prefix}; choose another name, or wait until gc has deleted it",
        )
    return ExportExists(
        root.name,
        f"prefix {prefix} has a base of this name with other content, and bases never change; "
        "choose another name",
    )


def list_bases(store: ObjectStore, prefix: str) -> list[BaseInfo]:
    """All bases of a prefix by name, tombstones too. Raises CorruptObject, StoreError."""

    def load(directory: str) -> BaseInfo | None:
        try:
            return describe(load_base(store, prefix, dir_name(directory)))
        except (UnknownExport, InvalidName):
            return None  # one that is being blessed, or is gone by now; nothing of ours

    with ThreadPoolExecutor(LISTING, "bases") as pool:
        found = pool.map(load, sorted(store.list_dirs(names.bases_prefix(prefix))))
        return [info for info in found if info is not None]


def remove_base(store: ObjectStore, prefix: str, base: str) -> BaseInfo:
    """Turn a base into a tombstone; one that is a tombstone stays as it is. Nothing is deleted here.

    Raises UnknownExport, CorruptObject, StoreError.
    """
    while True:
        found = load_base(store, prefix, base)
        if found.root.removed_at:
            return describe(found)
        removed = msgspec.structs.replace(found.root, removed_at=int(time.time()))
        key = names.base_manifest_key(prefix, base)
        data = encode_root(removed, key)
        try:
            etag = store.put(key, data, if_match=found.etag)
        except (Conflict, PreconditionFailed):
            time.sleep(_PAUSE)  # somebody else removed it, or we did and did not hear of it: look again
            continue
        return describe(StoredBase(removed, etag, manifest_hash(data)))


def describe(base: StoredBase) -> BaseInfo:
    """What people want to know of it."""
    root = base.root
    packs = None if root.inline_page is None else root.inline_page.packs
    return BaseInfo(
        name=root.name,
        size=root.size,
        created_at=root.created_at,
        removed_at=root.removed_at,
        source=root.source,
        manifest_hash=base.manifest_hash.hex(),
        content_hash=root.content_hash.hex(),
        etag=base.etag,
        packs=None if packs is None else len(packs),
        stored_bytes=None if packs is None else sum(ref.size for ref in packs),
    )


def _day(when: int) -> str:
    return time.strftime("on %Y-%m-%d at %H:%M UTC", time.gmtime(when))
