"""Roots in stores, and hosts that own them, for tests of every layer."""

from __future__ import annotations

from hashlib import blake2b

from glidefs.formats.manifest import Root, encode_root
from glidefs.manifest.lease import Owner
from glidefs.store.base import ObjectStore


def put_root(store: ObjectStore, key: str, root: Root, *, if_match: str | None = None) -> str:
    """Put a root where it says that it belongs; returns its ETag."""
    return store.put(key, encode_root(root, key), if_match=if_match)


def owner_of(node: str) -> Owner:
    """The host of that name: always the same id."""
    return Owner(blake2b(node.encode(), digest_size=16).digest(), node)
