"""Pins: a source is pinned before it is copied, so that gc keeps everything that the copy will name.

Between the moment that a root is read and the moment that a copy of it is put, the source may drop what the
copy will name: it is removed, or commits. A run of gc in between sees it without a root, and if something
like that happened at an earlier run too, deletes it. So a copy of the source is put under a name of its own
first, the pin, and the source is looked at again. If it has not changed, what the pin names was named all the
time. The copy is then made from the pin, which is deleted when the copy is in the store.

A pin that a crash left is deleted by gc when it is older than the grace. It lies among the tags, where
versions of gc that know no pins see a root like any other.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import time
from collections.abc import Iterator

from msgspec.structs import replace

from glidefs.errors import GlideError, NotFound, StoreError, UnknownExport
from glidefs.formats.manifest import NO_ID, Root, decode_root, encode_root
from glidefs.formats.pack import ID_SIZE
from glidefs.names import Source, pin_key
from glidefs.store.base import ObjectStore
from glidefs.store.checked import get_checked
from glidefs.volume.volume import Volume

log = logging.getLogger(__name__)

TRIES = 10


def kept_copy(root: Root) -> Root:
    """The root as a snapshot, tag or pin keeps it: no host's."""
    return replace(
        root,
        owner_host=NO_ID,
        owner_node="",
        log_id=NO_ID,
        last_segment=0,
        epoch=0,
        read_only=True,
        created_at=int(time.time()),
    )


@contextlib.contextmanager
def pinned(store: ObjectStore, prefix: str, source: Source, volume: Volume | None) -> Iterator[Root]:
    """The root of ``source``, all of which the store names until the block ends.

    ``volume`` is the source where this host may commit to it, with everything committed that matters. Raises
    UnknownExport, CorruptObject, Fenced, StoreError; GlideError if the source keeps changing.
    """
    key = pin_key(prefix, secrets.token_hex(ID_SIZE))
    try:
        if volume is None:
            yield _pin_stored(store, prefix, source, key)
        else:
            yield volume.committer.copy(store, lambda root: _put(store, key, root))
    except StoreError:
        raise  # it has kept the caller waiting for long: a pin that it has is left to gc
    except BaseException:
        _delete(store, key)
        raise
    _delete(store, key)


def _delete(store: ObjectStore, key: str) -> None:
    try:
        store.delete(key)
    except StoreError as error:
        log.warning("%s: a pin stays in the store until gc deletes it: %s", key, error)


def read_source(store: ObjectStore, prefix: str, source: Source) -> tuple[Root, str]:
    """The root of a source in the store, and its ETag. Raises UnknownExport, CorruptObject, StoreError."""
    key = source.key(prefix)
    try:
        root, found = get_checked(store, key, decode_root)
    except NotFound:
        raise UnknownExport(str(source), f"prefix {prefix} has no such {source.kind}") from None
    if root.removed_at:
        raise UnknownExport(str(source), "it was removed")
    return root, found.etag


def _pin_stored(store: ObjectStore, prefix: str, source: Source, key: str) -> Root:
    for _ in range(TRIES):
        root, etag = read_source(store, prefix, source)
        _put(store, key, root)
        with contextlib.suppress(NotFound):
            if store.head(source.key(prefix)).etag == etag:
                return root
    owner = f" on node {root.owner_node}" if root.owner_node else ""
    raise GlideError(f"{source} changes all the time; make a snapshot of it{owner}, and use that")


def _put(store: ObjectStore, key: str, root: Root) -> None:
    store.put(key, encode_root(kept_copy(root), key))
