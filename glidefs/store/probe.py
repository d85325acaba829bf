"""Tries whether a store behaves as GlideFS needs: conditional puts, ranges, consistent lists.

Fencing rests on conditional puts and reading on ranges. A provider that does not know a condition
mostly ignores it and answers "done", and two hosts then write one volume: so a store is tried once,
before the first use, and refused.
"""

from __future__ import annotations

import contextlib
import secrets

from glidefs.errors import NotFound, PreconditionFailed, StoreError, StoreUnavailable, StoreUnsupported
from glidefs.store.base import ObjectStore


def _refuse(store: ObjectStore, what: str) -> StoreUnsupported:
    return StoreUnsupported(f"{store.url}: {what}; GlideFS cannot keep volumes safe on it", op="probe")


def probe_store(store: ObjectStore, prefix: str = "") -> None:
    """Try the features on an object of its own below ``.probe/`` (below ``prefix`` if given).

    Raises StoreUnsupported that names the feature which is missing, or any other StoreError that
    the requests met (no bucket, no access, no answer). The object is deleted.
    """
    key = f"{prefix}/.probe/" if prefix else ".probe/"
    key += secrets.token_hex(16)
    try:
        _probe_conditions(store, key)
        _probe_ranges(store, key)
    except StoreUnavailable:
        raise  # a delete would only wait for as long again
    except BaseException:
        _tidy(store, key)
        raise
    _tidy(store, key)


def _tidy(store: ObjectStore, key: str) -> None:
    with contextlib.suppress(StoreError):
        store.delete(key)


def _accepted(store: ObjectStore, key: str, data: bytes, if_match: str | None = None) -> str | None:
    """The new ETag, or None if the store refused the condition."""
    try:
        return store.put(key, data, if_match=if_match, if_none_match=if_match is None)
    except PreconditionFailed as error:
        if error.ambiguous:
            raise StoreError(
                "the probe was disturbed by a failed request; run it again", op="probe"
            ) from error
        return None


def _probe_conditions(store: ObjectStore, key: str) -> None:
    first = _accepted(store, key, b"first")
    if first is None:
        raise _refuse(store, "a put with If-None-Match is refused although there is no object")
    if _accepted(store, key, b"second") is not None:
        raise _refuse(store, "If-None-Match is ignored (an existing object was overwritten)")
    second = _accepted(store, key, b"0123456789", if_match=first)
    if second is None:
        raise _refuse(store, "a put with the right If-Match is refused")
    if second == first:
        raise _refuse(store, "the ETag does not change with the content")
    if _accepted(store, key, b"stale", if_match=first) is not None:
        raise _refuse(store, "If-Match is ignored (a stale ETag was accepted)")
    found = store.get(key)
    if found.data != b"0123456789" or found.etag != second:
        raise _refuse(store, "a read does not see the last write")
    if _accepted(store, f"{key}-absent", b"x", if_match=second) is not None:
        with contextlib.suppress(StoreError):
            store.delete(f"{key}-absent")
        raise _refuse(store, "If-Match is ignored where there is no object")


def _probe_ranges(store: ObjectStore, key: str) -> None:
    try:
        suffix = store.get_suffix(key, 4)
        middle = store.get_range(key, 2, 3)
    except NotFound:
        raise _refuse(store, "an object that was just written is not found") from None
    if suffix != (b"6789", 10):
        raise _refuse(store, "suffix ranges (Range: bytes=-N) are ignored")
    if middle != b"234":
        raise _refuse(store, "ranges (Range: bytes=A-B) are ignored")
