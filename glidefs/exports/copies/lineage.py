"""Sources and copies of volumes: what a fork comes from; snapshots, tags and bases made of a volume.

All of these are copies of a manifest root that name the same packs; nothing here moves data. A copy
belongs to no host: it has no owner and no log.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from msgspec.structs import replace

from glidefs.bases.manifest_cache import BaseLibrary
from glidefs.bases.stored import base_root, publish_base
from glidefs.errors import (
    CorruptObject,
    Fenced,
    GlideError,
    NotFound,
    NotSupported,
    PreconditionFailed,
    UnknownExport,
)
from glidefs.exports.copies.pins import kept_copy, pinned
from glidefs.exports.table import ExportTable
from glidefs.formats.manifest import Root, decode_root, encode_root
from glidefs.names import (
    Source,
    check_name,
    pins_prefix,
    snapshot_key,
    tag_key,
    tags_prefix,
)
from glidefs.reading.changed import stored_sequences
from glidefs.store.base import ObjectStore
from glidefs.store.checked import get_checked
from glidefs.store.resilient import ResilientStore
from glidefs.volume.volume import Volume

PATIENCE = 30.0
"""Seconds that the store may take for a request of a verb."""
READERS = 8
"""Tags that are read at the same time."""
COMMIT_PATIENCE = 60.0
"""Seconds for the upload that precedes a fork of a volume that is served here."""


class Origin(NamedTuple):
    """The root that something is made from, and what to tell about it."""

    source: Source
    root: Root
    note: str = ""


def _inline_packs(root: Root) -> set[bytes]:
    return set() if root.inline_page is None else {ref.id for ref in root.inline_page.packs}


class Lineage:
    """Reads sources, writes copies. Thread-safe; holds no lock."""

    def __init__(self, table: ExportTable, store: ResilientStore, bases: BaseLibrary) -> None:
        self._table = table
        self._store = store
        self._bases = bases

    def _view(self) -> ObjectStore:
        return self._store.view("upload", PATIENCE)

    # -- sources ---------------------------------------------------------------------------------

    @contextlib.contextmanager
    def origin(self, prefix: str, source: Source) -> Iterator[Origin]:
        """The root to copy, which must be there when the block ends: so long the store names all of it.

        A base holds for long: it, or its tombstone, stays. A volume that is served here is committed first.
        Raises UnknownExport, CorruptObject, DrainTimeout, StoreError, GlideError.
        """
        if source.kind == "base":
            yield Origin(source, self._bases.get(prefix, source.name).root)
            return
        volume = self._served(prefix, source)
        if volume is not None:
            with self.committed(volume, COMMIT_PATIENCE) as root:
                yield Origin(source, root)
            return
        with pinned(self._view(), prefix, source, None) as root:
            owner = root.owner_node if source.kind == "volume" else ""
            note = (
                f"as node {owner} committed it last; what that node has not uploaded is not in it"
                if owner
                else ""
            )
            yield Origin(source, root, note)

    @contextlib.contextmanager
    def shown(self, prefix: str, source: Source, shown: Root) -> Iterator[None]:
        """Until the block ends, the store names all that ``shown``, read from ``source`` long ago, names.

        gc may have deleted what the source no longer names. Raises UnknownExport, NotSupported, StoreError.
        """
        with contextlib.ExitStack() as stack:
            if source.kind == "base":
                now = self._bases.get(prefix, source.name).root
            else:
                now = stack.enter_context(pinned(self._view(), prefix, source, None))
            pages = {page_id for page_id in shown.page_ids if page_id}
            if not (pages <= set(now.page_ids) and _inline_packs(shown) <= _inline_packs(now)):
                raise NotSupported(f"{source} has changed since; make a new fork of it")
            yield

    def _served(self, prefix: str, source: Source) -> Volume | None:
        """The volume of a source, if this host may commit to it."""
        entry = self._table.find(source.name) if source.kind == "volume" else None
        if entry is None or entry.record is None or entry.record.prefix != prefix:
            return None
        if entry.record.is_view or entry.is_fenced():
            return None  # an export of that name, but not the volume
        if entry.volume is None:
            raise GlideError(
                f"{source.name} is not served now, so it cannot be committed; see 'glidefs show'"
            )
        return entry.volume

    @contextlib.contextmanager
    def committed(self, volume: Volume, timeout: float | None) -> Iterator[Root]:
        """The root of a volume that is served here, with all that was acknowledged before the call; pinned.

        One with nothing to upload does not learn by itself that another host took it, and its root may
        name what gc has deleted since: so the store is asked. Raises DrainTimeout, Fenced, StoreError.
        """
        volume.drain(timeout)
        source = Source("volume", volume.name)
        with contextlib.ExitStack() as stack:
            try:
                root = stack.enter_context(pinned(self._view(), volume.prefix, source, volume))
            except Fenced as error:
                volume.fence(error.why)
                raise
            yield root

    def confirm(self, volume: Volume) -> None:
        """Ask the store whether the volume is still this host's; one that is not is fenced. Raises Fenced."""
        try:
            volume.committer.poll(self._view())
        except Fenced as error:
            volume.fence(error.why)
            raise

    # -- copies ----------------------------------------------------------------------------------

    def keep(self, prefix: str, root: Root) -> int:
        """Put a copy of ``root`` as the volume's next snapshot; returns its sequence number.

        Raises StoreError.
        """
        view, copy = self._view(), kept_copy(root)
        sequence = max([copy.sequence, *(kept + 1 for kept in stored_sequences(view, prefix, root.name))])
        while True:
            key = snapshot_key(prefix, root.name, sequence)
            data = encode_root(copy, key)
            try:
                view.put(key, data, if_none_match=True)
                return sequence
            except PreconditionFailed:
                if self._is(view, key, data):
                    return sequence  # ours, its answer was lost
                sequence += 1

    @staticmethod
    def _is(store: ObjectStore, key: str, data: bytes) -> bool:
        try:
            return store.get(key).data == data
        except NotFound:
            return False

    def tag(self, prefix: str, tag: str, root: Root) -> None:
        """Put a copy of ``root`` under a tag, over what the tag named before. Raises StoreError."""
        key = tag_key(prefix, check_name("tag", tag))
        self._view().put(key, encode_root(kept_copy(root), key))

    def tags(self, prefix: str) -> list[dict[str, Any]]:
        """The tags of a prefix by name, the volume of each, or why it cannot be read. Raises StoreError."""
        view = self._store.view("read", PATIENCE)
        place = tags_prefix(prefix)

        def read(key: str) -> dict[str, Any] | None:
            tag: dict[str, Any] = {"tag": key.removeprefix(place), "prefix": prefix, "damaged": ""}
            try:
                root, _ = get_checked(view, key, decode_root)
            except NotFound:
                return None  # deleted meanwhile
            except CorruptObject as error:
                return tag | {"volume": "", "sequence": 0, "size": 0, "created_at": 0, "damaged": str(error)}
            shown = {"volume": root.name, "sequence": root.sequence, "size": root.size}
            return tag | shown | {"created_at": root.created_at}

        keys = [info.key for info in view.list(place) if not info.key.startswith(pins_prefix(prefix))]
        with ThreadPoolExecutor(READERS, "list-tags") as pool:
            return [found for found in pool.map(read, sorted(keys)) if found is not None]

    def delete_tag(self, prefix: str, tag: str) -> None:
        """Delete a tag; what was made of it stays. Raises UnknownExport, StoreError."""
        view, key = self._view(), tag_key(prefix, check_name("tag", tag))
        try:
            view.head(key)
        except NotFound:
            raise UnknownExport(f"tag:{tag}", "no such tag; 'glidefs tags' lists them") from None
        view.delete(key)

    def snapshots(self, prefix: str, name: str) -> list[dict[str, Any]]:
        """The snapshots of a volume, oldest first, with the time of each (unix seconds)."""
        view = self._store.view("read", PATIENCE)
        found = []
        for sequence in stored_sequences(view, prefix, check_name("volume", name)):
            key = snapshot_key(prefix, name, sequence)
            try:
                root, _ = get_checked(view, key, decode_root)
            except NotFound:
                continue  # deleted meanwhile
            found.append(
                {
                    "name": name,
                    "sequence": sequence,
                    "source": f"snapshot:{name}@{sequence}",
                    "size": root.size,
                    "created_at": root.created_at,
                }
            )
        return found

    def delete_snapshot(self, prefix: str, name: str, sequence: int) -> None:
        """Delete one. Raises UnknownExport, StoreError."""
        view, key = self._view(), snapshot_key(prefix, name, sequence)
        try:
            view.head(key)
        except NotFound:
            raise UnknownExport(
                f"{name}@{sequence}", "no such snapshot; 'glidefs snapshots' lists them"
            ) from None
        view.delete(key)

    def delete_snapshots(self, prefix: str, name: str) -> int:
        """Delete all of a volume; returns how many there were. Raises StoreError."""
        view = self._view()
        sequences = stored_sequences(view, prefix, name)
        for sequence in sequences:
            view.delete(snapshot_key(prefix, name, sequence))
        return len(sequences)

    def make_base(self, prefix: str, source: Source, base: str) -> dict[str, Any]:
        """Publish what ``source`` is now as a base, without moving its data.

        Raises ExportExists, and as :meth:`origin`.
        """
        if source.kind == "base":
            raise UnknownExport(str(source), "a base already; promote a volume, snapshot or tag")
        with self.origin(prefix, source) as origin:
            root = replace(base_root(origin.root, check_name("base", base)), source=str(source))
            publish_base(self._view(), prefix, root)
            return {
                "base": base,
                "prefix": prefix,
                "source": str(source),
                "size": root.size,
                "note": origin.note,
            }
