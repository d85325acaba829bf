"""The volumes of a prefix as the store knows them: who owns them, and which this host might take."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import msgspec

from glidefs.errors import CorruptObject, InvalidName, UnknownExport
from glidefs.formats.manifest import NO_ID
from glidefs.manifest import lease
from glidefs.names import check_name, volumes_prefix
from glidefs.store.base import ObjectStore, dir_name

READERS = 8
"""Roots that are read at the same time."""


class StoredVolume(msgspec.Struct, frozen=True, kw_only=True):
    """A volume of the store. ``owner_host`` is hex, empty if nobody has it.

    ``removed_at`` is 0 unless it was removed. ``damaged`` says why its root cannot be read; then only its
    name is known.
    """

    name: str
    prefix: str
    size: int = 0
    volume_id: str = ""
    owner_host: str = ""
    owner_node: str = ""
    sequence: int = 0
    created_at: int = 0
    removed_at: int = 0
    source: str = ""
    damaged: str = ""

    def is_candidate(self, owner: lease.Owner) -> bool:
        """Whether a host of the same name as ``owner``, but another one, has it."""
        mine = owner.host.hex()
        return bool(self.owner_host) and self.owner_node == owner.node and self.owner_host != mine


def list_volumes(store: ObjectStore, prefix: str) -> list[StoredVolume]:
    """All volumes of a prefix by name, removed ones that gc has not deleted too. Raises StoreError."""

    def load(name: str) -> StoredVolume | None:
        try:
            root, _ = lease.read_root(store, prefix, check_name("volume", name))
        except (UnknownExport, InvalidName):
            return None  # only its snapshots are left, or nothing of ours
        except CorruptObject as error:
            return StoredVolume(name=name, prefix=prefix, damaged=str(error))
        return StoredVolume(
            name=name,
            prefix=prefix,
            size=root.size,
            volume_id=root.volume_id.hex(),
            owner_host="" if root.owner_host == NO_ID else root.owner_host.hex(),
            owner_node=root.owner_node,
            sequence=root.sequence,
            created_at=root.created_at,
            removed_at=root.removed_at,
            source=root.source,
        )

    names = sorted(dir_name(path) for path in store.list_dirs(volumes_prefix(prefix)))
    with ThreadPoolExecutor(READERS, "list-volumes") as pool:
        return [found for found in pool.map(load, names) if found is not None]
