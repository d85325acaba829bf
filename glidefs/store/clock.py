"""The time by the store's clock, which measures the ages of objects."""

from __future__ import annotations

import secrets

from glidefs import names
from glidefs.store.base import ObjectStore

_BODY = 16
"""Bytes of the object that is put; random ones, because bodies that replace each other must not repeat."""


def store_time(store: ObjectStore, prefix: str) -> float:
    """What the store's clock says now, in unix seconds: the time of an object that is put for that.

    Raises StoreError.
    """
    key = names.gc_clock_key(prefix)
    store.put(key, secrets.token_bytes(_BODY))
    return store.head(key).last_modified
