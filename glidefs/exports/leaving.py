"""How an export ends on this host: the volume is given up for another host, or removed, and put back."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection
from typing import Any

from glidefs.core.check import Closed
from glidefs.errors import (
    ExportExists,
    Fenced,
    GlideError,
    InUse,
    OwnedElsewhere,
    UnknownExport,
)
from glidefs.exports.copies.lineage import PATIENCE, Lineage
from glidefs.exports.opener import Opener
from glidefs.exports.requests import ExportStatus
from glidefs.exports.roots import STORE_PATIENCE
from glidefs.exports.table import Entry, ExportTable, RecordDirectory
from glidefs.formats.export_record import ExportRecord
from glidefs.formats.manifest import NO_ID, Root
from glidefs.manifest import lease
from glidefs.manifest.lease import delete_root, put_first_root, same_as, undelete_root
from glidefs.names import check_name
from glidefs.store.resilient import ResilientStore


class Leaving:
    """Detach, remove, undelete. Locks are those of the router's verbs. ``grace`` is gc's, in seconds.

    What must not be lost by accident stops a verb unless ``force`` is given: a guest that uses the export,
    bytes that the store does not have, a record that cannot be read. A fenced export is let go even while
    somebody has it open: its I/O fails, and its log is kept.
    """

    def __init__(
        self,
        table: ExportTable,
        records: RecordDirectory,
        opener: Opener,
        store: ResilientStore,
        lineage: Lineage,
        grace: float,
    ) -> None:
        self._table = table
        self._records = records
        self._opener = opener
        self._store = store
        self._lineage = lineage
        self._grace = grace

    # -- what may not be lost by accident --------------------------------------------------------

    @staticmethod
    def _check_unused(entry: Entry, verb: str, *, force: bool) -> str:
        """What `force` costs those who use the export. Raises InUse where somebody does, without it."""
        if entry.is_fenced() or entry.transport is None:
            return ""
        use = entry.transport.in_use(entry.name)
        if not use:
            return ""
        if not force:
            raise InUse(
                f"{entry.name}: {use}; stop that first, or {verb} it with --force and lose what it writes"
            )
        return f"{use}, and was cut off"

    def _unsent(self, record: ExportRecord) -> str:
        """What the store lacks of the log of a closed export, for people; empty if nothing."""
        try:
            unsent = self._opener.logs.unsent_bytes(record)
        except (GlideError, OSError) as error:
            return f"the content of its log is not known ({' '.join(str(error).split(';')[0].split())})"
        return f"{unsent} bytes of its log are not in the store" if unsent else ""

    def has_log(self, root: Root) -> bool:
        """Whether the log that a root names is this host's to go on with, and not a copy's of it."""
        mine = self._opener.logs.is_own(root) and not self._table.is_fenced_log(root.log_id)
        return mine and self._opener.logs.put_here(root) is not False

    # -- another transport -----------------------------------------------------------------------

    def change_transport(self, name: str, kind: str) -> ExportStatus:
        """Serve an export that nobody uses by another transport. If that fails it is served as before.

        Raises InUse, NotSupported, DeviceError.
        """
        with self._table.locked(name) as entry:
            entry.check_served()
            before, served, volume = entry.record, entry.transport, entry.volume
            assert before is not None
            assert served is not None
            assert volume is not None
            choice = self._opener.guests.choose(kind)
            if choice.kind == served.kind:
                entry.change_record(self._records, transport=kind)
                volume.prefer(kind)
                return entry.status()
            self._check_unused(entry, "detach", force=False)
            self._opener.guests.stop(entry, remove_device=True)
            was = {name: getattr(before, name) for name in ("transport", "device_id", "served_by")}
            try:
                entry.change_record(self._records, transport=kind, device_id=None, served_by=choice.kind)
                self._opener.guests.start(entry)
            except BaseException:
                with contextlib.suppress(OSError):  # as full a disk as before; the next start makes up for it
                    entry.change_record(self._records, **was)
                self._opener.restart_transport(entry)
                raise
            volume.prefer(kind)
            return entry.status()

    # -- detach ----------------------------------------------------------------------------------

    def detach(self, name: str, timeout: float | None = None, *, force: bool = False) -> dict[str, Any]:
        """Stop serving, upload everything, give the volume up. If that fails it is served again.

        If the store's answer was lost, it is served again or not once the store says what happened. With
        ``force`` what cannot be uploaded stays in the log, which is set aside. Raises InUse.
        """
        entry = self._table.get(name)
        if force and timeout is None:
            timeout = PATIENCE
        self._check_unused(entry, "detach", force=force)
        if entry.volume is not None and not entry.is_fenced():
            # The bulk, while guests go on and nothing is locked.
            with contextlib.suppress(Fenced, *((GlideError,) if force else ())):
                entry.drain(timeout)
        with self._table.locked(name) as entry:
            record = entry.record
            if record is None:
                return self._drop_damaged(entry, "detach", force=force) | {"detached": True}
            lost = self._check_unused(entry, "detach", force=force)
            if entry.is_fenced():
                note = _set_aside(record)
            elif entry.volume is None and not record.is_view:
                note = self._let_go_unopened(entry, record, force=force)
            else:
                note = self._give_up(entry, record, force=force)
            self._opener.close_entry(entry, remove_device=True)
            self._opener.forget(entry, keep_log=bool(note))
            self._table.drop(entry)
            return {
                "name": name,
                "prefix": record.prefix,
                "size": record.size,
                "detached": True,
                "note": "; ".join(filter(None, (lost, note))),
            }

    def _give_up(self, entry: Entry, record: ExportRecord, *, force: bool) -> str:
        """Let guests go, drain what they wrote last, and commit a root that names no owner.

        Returns why the log must be kept: another host has the volume, or, if forced, something could not be
        uploaded. Empty if it need not be kept.
        """
        self._opener.guests.stop(entry, remove_device=True)
        try:
            if entry.volume is not None:
                entry.drain(STORE_PATIENCE if force else PATIENCE)
                tried = entry.volume.committer.tried
                root, etag = self._opener.close_volume(entry)
        except Fenced as error:
            return self._lost(entry, record, error.why)
        except GlideError as error:
            if force and not isinstance(error, Closed):
                return self._abandon(entry, record, str(error))
            self._opener.restart_transport(entry)
            raise
        except BaseException:
            self._opener.restart_transport(entry)
            raise
        if record.is_view:
            return ""  # owns nothing
        try:
            self._records.set_intent(entry.name, "detach")
            view = self._store.view("upload", PATIENCE)
            if etag is None:  # read-only and never published
                etag = put_first_root(view, record.prefix, root)
            lease.detach(view, record.prefix, root, etag, tried)
        except Fenced as error:  # a clean volume does not ask the store whose it is
            return self._lost(entry, record, error.why)
        except BaseException:
            self._opener.reopen_after_failure(entry)
            raise
        return ""

    def _lost(self, entry: Entry, record: ExportRecord, why: str) -> str:
        """This host turned out not to have the volume any more: it must not be served again after a crash."""
        entry.fence(self._records, record.log_id, why)
        return _set_aside(record)

    def _let_go_unopened(self, entry: Entry, record: ExportRecord, *, force: bool) -> str:
        """Forget an export that could not be opened: nothing of its log can be uploaded."""
        if not force:
            unsent = self._unsent(record) or "the store has all of its log"
            raise InUse(
                f"{entry.name} is not served here now ({entry.reason}), so it cannot be uploaded: {unsent}; "
                "'glidefs attach' tries it again, detach --force gives it up and sets its log aside"
            )
        return self._abandon(entry, record, entry.reason)

    def _abandon(self, entry: Entry, record: ExportRecord, why: str) -> str:
        """Give the volume up as the store has it. Returns what that costs."""
        self._opener.close_entry(entry, remove_device=True)
        lost = self._unsent(record) or "the store has all of its log"
        note = f"not uploaded ({' '.join(why.split())}): {lost}; the log is set aside: {record.log_id.hex()}"
        try:
            view = self._store.view("upload", STORE_PATIENCE)
            root, etag = lease.read_root(view, record.prefix, record.name)
            if root.log_id == record.log_id and self._opener.logs.put_here(root, record):
                lease.detach(view, record.prefix, root, etag)
        except (Fenced, UnknownExport):
            pass  # not ours to give up
        except GlideError as error:
            note += (
                f"; the store still names this host as owner ({error}): attach it elsewhere with --take-over"
            )
        return note

    def _drop_damaged(self, entry: Entry, verb: str, *, force: bool) -> dict[str, Any]:
        """Delete a record that cannot be read. Its log stays, as one that no export uses."""
        name = entry.name
        if not force:
            raise InUse(
                f"{name}: its record on this host is damaged ({entry.reason}), and a log here may belong "
                f"to it; 'glidefs logs' lists them, {verb} --force deletes the record and keeps the log"
            )
        entry.delete_record(self._records)
        self._table.drop(entry)
        note = (
            "its damaged record is deleted; the volume may still be in the store, its log in 'glidefs logs'"
        )
        return {"name": name, "note": note}

    # -- remove ----------------------------------------------------------------------------------

    def remove(
        self, name: str, *, purge: bool = False, force: bool = False, now: bool = False
    ) -> dict[str, Any]:
        """Delete the volume: its root in the store, its log and record here.

        It can be undeleted until gc's grace is over, unless ``now``. A volume that no host serves can be
        removed from any. Raises UnknownExport, OwnedElsewhere, InUse.
        """
        if self._table.find(check_name("export", name)) is None:
            return self._remove_unserved(name, purge, now)
        with self._table.locked(name) as entry:
            record = entry.record
            if record is None:  # damaged: the store alone knows what it was
                return self._drop_damaged(entry, "remove", force=force) | {"removed": True}
            lost = self._check_unused(entry, "remove", force=force)
            tried: Collection[bytes] = ()
            if entry.volume is not None:
                with contextlib.suppress(Fenced):  # a copy of this host may have the volume by the same log
                    self._lineage.confirm(entry.volume)
                tried = (entry.volume.root.nonce, *entry.volume.committer.tried)
            fenced = entry.is_fenced()
            self._opener.close_entry(entry, remove_device=True)
            try:
                removed = record.is_view
                if not (removed or fenced):
                    self._records.set_intent(name, "remove")
                    view = self._store.view("upload", PATIENCE)
                    put_here = self._opener.logs.put_here
                    removed = delete_root(
                        view,
                        record.prefix,
                        record,
                        lambda root: root.nonce in tried or put_here(root, record) is True,
                        now=now,
                    )
            except BaseException:
                self._opener.reopen_after_failure(entry)
                raise
            note = ""
            if not removed:
                lost_it = self._lost(entry, record, "another host has the volume")
                note = f"the store's volume was left alone: {lost_it}"
            self._opener.forget(entry, keep_log=not removed)
            self._table.drop(entry)
        if record.is_view or not removed:
            return {"name": name, "removed": True, "note": "; ".join(filter(None, (lost, note)))}
        if purge:
            self._lineage.delete_snapshots(record.prefix, name)
        return self._removed(name, record.prefix, record.epoch, lost, now)

    def _removed(self, name: str, prefix: str, epoch: int, lost: str, now: bool) -> dict[str, Any]:
        """The answer of a remove: until when the volume can be put back."""
        if now and epoch <= 1:
            return {"name": name, "removed": True, "note": lost, "restorable_until": 0}
        until = int(time.time() + self._grace)
        when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(until))
        note = f"'glidefs undelete {name} --prefix {prefix}' puts it back, until gc runs after {when}"
        return {
            "name": name,
            "removed": True,
            "note": "; ".join(filter(None, (lost, note))),
            "restorable_until": until,
        }

    def _remove_unserved(self, name: str, purge: bool, now: bool) -> dict[str, Any]:
        view = self._store.view("upload", PATIENCE)
        prefixes = self._opener.places.prefixes
        for prefix in prefixes:
            try:
                root, _ = lease.read_root(view, prefix, name)
            except UnknownExport:
                continue
            if root.removed_at and not root.doomed and not now:
                continue
            if root.owner_host not in (NO_ID, self._opener.places.owner.host):
                raise OwnedElsewhere(name, root.owner_node)
            if root.owner_host != NO_ID and not self.has_log(root):
                raise OwnedElsewhere(name, root.owner_node, "with this host's id, but its log is not here")
            if root.owner_host != NO_ID and not self._opener.logs.put_here(root):
                raise OwnedElsewhere(name, root.owner_node, lease.COPIED)
            now = now or root.doomed
            if not delete_root(view, prefix, root, same_as(root), now=now):
                raise OwnedElsewhere(name, root.owner_node)
            if purge:
                self._lineage.delete_snapshots(prefix, name)
            return self._removed(name, prefix, root.epoch, "", now)
        if purge and any(self._lineage.delete_snapshots(prefix, name) for prefix in prefixes):
            return {"name": name, "removed": True, "note": "only snapshots of it were left"}
        raise UnknownExport(name, "neither this host nor the store has a volume of that name")

    def undelete(self, name: str, prefix: str) -> dict[str, Any]:
        """Put a removed volume back as it was, with no owner. Raises UnknownExport, ExportExists."""
        if self._table.find(check_name("export", name)) is not None:
            raise ExportExists(name, "this host has an export of that name; detach or remove it first")
        root = undelete_root(self._store.view("upload", PATIENCE), prefix, name)
        return {
            "name": name,
            "prefix": prefix,
            "size": root.size,
            "undeleted": True,
            "note": f"nobody serves it yet; 'glidefs attach {name} --prefix {prefix}' does",
        }


def _set_aside(record: ExportRecord) -> str:
    log_id = record.log_id.hex()
    return f"another host has the volume, or it was removed; the log of this one is set aside: {log_id}"
