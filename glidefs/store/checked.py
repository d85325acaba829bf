"""Objects that do not verify are fetched once more from the store before they are called damaged.

Between the store's disk and the decoder are memory, networks, caches and proxies, and each of them has handed
out wrong bytes. What is damaged in the store is so the second time, too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from glidefs.errors import CorruptObject, NewerFormat
from glidefs.store.base import Object, ObjectStore

log = logging.getLogger(__name__)

T = TypeVar("T")


def fetch_checked(store: ObjectStore, key: str, load: Callable[[], T]) -> T:
    """What ``load`` fetches of ``key`` and decodes; once more, with nothing kept here, if it is corrupt.

    Raises CorruptObject if it is so again, and whatever ``load`` raises.
    """
    try:
        return load()
    except NewerFormat:
        raise
    except CorruptObject as error:
        first = error
    store.forget(key)
    result = load()
    log.warning("%s: the first answer did not verify, the second did (%s)", key, first.why)
    return result


def get_checked(store: ObjectStore, key: str, decode: Callable[[str, bytes], T]) -> tuple[T, Object]:
    """An object, decoded, and as it came. Raises NotFound, CorruptObject, StoreError."""

    def load() -> tuple[T, Object]:
        found = store.get(key)
        return decode(key, found.data), found

    return fetch_checked(store, key, load)
