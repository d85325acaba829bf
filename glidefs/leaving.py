"""How an export ends on this host: the volume is given up for another host, or removed."""

from __future__ import annotations

import contextlib
from typing import Any

from glidefs.errors import Fenced, OwnedElsewhere, UnknownExport
from glidefs.export_table import Entry, ExportTable, RecordDirectory
from glidefs.lineage import PATIENCE, Lineage
from glidefs.names import check_name
from glidefs.opener import Opener
from glidefs.roots import delete_root, put_first_root
from glidefs.store.resilient import ResilientStore
from glidefs.volume import lease


class Leaving:
    """Detach and remove. Locks are those of the router's verbs."""

    def __init__(
        self,
        table: ExportTable,
        records: RecordDirectory,
        opener: Opener,
        store: ResilientStore,
        lineage: Lineage,
    ) -> None:
        self._table = table
        self._records = records
        self._opener = opener
        self._store = store
        self._lineage = lineage

    def detach(self, name: str, timeout: float | None = None) -> dict[str, Any]:
        """Stop serving, upload everything, give the volume up. If that fails it is served again.

        Where the answer of the store was lost it is served again, or not, once the store says which it is.
        """
        entry = self._table.get(name)
        if entry.volume is not None and not entry.is_fenced():
            with contextlib.suppress(Fenced):
                entry.drain(timeout)  # the bulk, while guests go on and nothing is locked
        with self._table.locked(name) as entry:
            record, note = entry.known_record(), ""
            if entry.is_fenced() or not self._give_up(entry):
                self._opener.close_entry(entry, remove_device=True)
                note = f"another host has the volume; the log of this one is set aside: {record.log_id.hex()}"
            self._opener.forget(entry, keep_log=bool(note))
            self._table.drop(entry)
            return {
                "name": name,
                "prefix": record.prefix,
                "size": record.size,
                "detached": True,
                "note": note,
            }

    def _give_up(self, entry: Entry) -> bool:
        """Let guests go, drain what they wrote last, and commit a root that names no owner.

        False if it turns out that another host has the volume.
        """
        record = entry.known_record()
        self._opener.stop_transport(entry, remove_device=True)
        try:
            entry.drain(PATIENCE)
            root, etag = self._opener.close_volume(entry)
        except Fenced:
            return False
        except BaseException:
            self._opener.restart_transport(entry)
            raise
        try:
            if record.is_view:
                return True  # owns nothing
            self._records.set_intent(entry.name, "detach")
            view = self._store.view("upload", PATIENCE)
            if etag is None:  # read-only and never published
                etag = put_first_root(view, record.prefix, root)
            lease.detach(view, record.prefix, root, etag)
        except Fenced:
            return False  # a clean volume does not ask the store whose it is
        except BaseException:
            self._opener.reopen_after_failure(entry)
            raise
        return True

    def remove(self, name: str, purge: bool) -> dict[str, Any]:
        """Delete the volume: its root in the store, its log and record here.

        A volume that no host serves can be removed from any. Raises UnknownExport, OwnedElsewhere.
        """
        if self._table.find(check_name("export", name)) is None:
            return self._remove_unserved(name, purge)
        with self._table.locked(name) as entry:
            record = entry.record
            if record is None:  # damaged: the store alone knows what it was
                self._records.delete(name)
                self._table.drop(entry)
                return {"name": name, "removed": True, "note": "the volume may still be in the store"}
            self._opener.close_entry(entry, remove_device=True)
            try:
                removed = record.is_view
                if not removed:
                    self._records.set_intent(name, "remove")
                    view = self._store.view("upload", PATIENCE)
                    removed = delete_root(view, record.prefix, record)
            except BaseException:
                self._opener.reopen_after_failure(entry)
                raise
            note = (
                ""
                if removed
                else (
                    "another host has the volume, so the store's was left alone; "
                    f"the log of this host is set aside: {record.log_id.hex()}"
                )
            )
            self._opener.forget(entry, keep_log=not removed)
            self._table.drop(entry)
        if purge and removed and not record.is_view:
            self._lineage.delete_snapshots(record.prefix, name)
        return {"name": name, "removed": True, "note": note}

    def _remove_unserved(self, name: str, purge: bool) -> dict[str, Any]:
        view = self._store.view("upload", PATIENCE)
        prefixes = self._opener.places.prefixes
        for prefix in prefixes:
            try:
                root, _ = lease.read_root(view, prefix, name)
            except UnknownExport:
                continue
            if root.removed_at and not root.doomed:
                continue
            if root.owner_node not in ("", self._opener.places.node):
                raise OwnedElsewhere(name, root.owner_node)
            delete_root(view, prefix, root)
            if purge:
                self._lineage.delete_snapshots(prefix, name)
            return {"name": name, "removed": True, "note": ""}
        if purge and any(self._lineage.delete_snapshots(prefix, name) for prefix in prefixes):
            return {"name": name, "removed": True, "note": "only snapshots of it were left"}
        raise UnknownExport(name, "neither this host nor the store has a volume of that name")
