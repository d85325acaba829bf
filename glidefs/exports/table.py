"""The exports of this host: durable records, and what each one is doing now.

A record is one file, `{name}.json`, replaced atomically. It is written before an export serves its
first request and deleted last of all, so that a crash at any moment leaves an export that the next
start can serve, or nothing.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from glidefs.core.figures import VolumeInfo
from glidefs.errors import (
    CorruptObject,
    ExportExists,
    Fenced,
    GlideError,
    NotOpen,
    NotServed,
    Refused,
    UnknownExport,
)
from glidefs.events import happened
from glidefs.exports.requests import ExportStatus
from glidefs.formats import export_record
from glidefs.formats.atomic import fsync_dir, read_file, write_file_atomic
from glidefs.formats.export_record import ExportRecord
from glidefs.formats.manifest import MAX_LABEL, Root, encode_root, manifest_hash
from glidefs.names import check_name, manifest_key
from glidefs.transport.base import Endpoint, Transport
from glidefs.volume.volume import Volume

log = logging.getLogger(__name__)

NOTHING_TOLD: Mapping[int, VolumeInfo] = {}
SUFFIX = ".json"
INTENT = ".intent"
MAX_INTENT = 64
"""Bytes: it is the name of a verb."""
SCANNED = ".scanned"
"""Marker: the store was searched for exports of this node since the directory exists."""


class RecordDirectory:
    """The record files. Callers make sure that one name is written by one thread at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def sync(self) -> None:
        """Make durable what is there: its writer may have died on the way. Raises OSError."""
        with contextlib.suppress(FileNotFoundError):
            fsync_dir(self.path)

    def names(self) -> list[str]:
        """The names of all record files, in order; what is in them is not looked at."""
        with contextlib.suppress(FileNotFoundError):
            found = [name for name in os.listdir(self.path) if name.endswith(SUFFIX) and name[0] != "."]
            return sorted(name.removesuffix(SUFFIX) for name in found)
        return []

    def load(self) -> tuple[list[ExportRecord], dict[str, str]]:
        """All records, and for each file that is damaged its name and why."""
        records: list[ExportRecord] = []
        damaged: dict[str, str] = {}
        for name in self.names():
            path = f"{self.path}/{name}{SUFFIX}"
            try:
                record = export_record.load(path)
                if record.name != name:
                    raise CorruptObject(path, 0, f"it is the record of {record.name}")
                records.append(record)
            except (OSError, GlideError) as error:
                damaged[name] = str(error)
        return records, damaged

    def save(self, record: ExportRecord) -> None:
        """Durable on return. Raises OSError."""
        export_record.save(self._file(record.name), record)

    def delete(self, name: str) -> None:
        """Durable on return; a record that is not there is no error."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._file(name))
            fsync_dir(self.path)
        self.set_intent(name, None)

    def intent(self, name: str) -> str | None:
        """The verb that was begun on an export and must be finished: "remove" or "detach"."""
        try:
            return read_file(self._intent_file(name), MAX_INTENT).decode("ascii", "replace")
        except FileNotFoundError:
            return None

    def set_intent(self, name: str, verb: str | None) -> None:
        """Note durably that `verb` was begun; None: it ended."""
        path = self._intent_file(name)
        if verb is not None:
            write_file_atomic(path, verb.encode("ascii"))
            return
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
            fsync_dir(self.path)

    def _intent_file(self, name: str) -> str:
        return f"{self.path}/{check_name('export', name)}{INTENT}"

    def _file(self, name: str) -> str:
        return f"{self.path}/{check_name('export', name)}{SUFFIX}"

    @property
    def scanned(self) -> bool:
        """Whether the store was searched for exports of this node."""
        return (self.path / SCANNED).exists()

    def mark_scanned(self) -> None:
        """The search is complete."""
        (self.path / SCANNED).touch()
        fsync_dir(self.path)


class Entry:
    """One export. `lock` is held for the length of a verb; fields are read without it by `status`.

    `_record_lock` is held while the record changes, here and on the disk: a fence and the first root come
    from threads that hold no `lock`.
    """

    def __init__(self, name: str, record: ExportRecord | None = None) -> None:
        self.name = name
        self.lock = threading.Lock()
        self._record_lock = threading.Lock()
        self.record = record
        self.volume: Volume | None = None
        self.transport: Transport | None = None
        self.endpoint: Endpoint | None = None
        self.state = "creating"
        self.reason = ""
        self.retry = False
        """The failure was one that may pass (the store did not answer, the disk is full): try again later."""
        self.unsaved = False
        """The record here says more than the one on the disk, which could not be written."""
        self.gone = False

    # -- the record ------------------------------------------------------------------------------

    def set_record(self, records: RecordDirectory, record: ExportRecord) -> None:
        """Another record: of a new volume, or a new life of this one. Durable on return. Raises OSError."""
        with self._record_lock:
            self.record = record
            self._save(records)

    def change_record(self, records: RecordDirectory, **changes: Any) -> None:
        """Other values of some fields, durable on return; the others keep what they are now.

        Raises OSError: then they hold here, and :meth:`save_again` tries the disk again.
        """
        with self._record_lock:
            if self.record is None or self.gone:
                return
            self.record = msgspec.structs.replace(self.record, **changes)
            self._save(records)

    def published(self, records: RecordDirectory) -> None:
        """The store has the first root, or had it: note it. One that is missing later was removed.

        It must not be put again then, neither after a restart nor when the tombstone is gone.
        """
        if self.record is not None and not self.record.root_published:
            self._durably(lambda: self.change_record(records, root_published=True, root=b""))

    def fence(self, records: RecordDirectory, log_id: bytes, why: str) -> None:
        """Note durably that this host may not serve the volume any more. It is final for this log.

        The store has a root of the name, or had one: what is missing there is not put again.
        """
        self._durably(lambda: self._fence(records, log_id, why))

    def save_again(self, records: RecordDirectory) -> None:
        """Write a record that could not be written."""
        self._durably(lambda: self._save_unsaved(records))

    def _durably(self, change: Callable[[], None]) -> None:
        """A change that holds at once; the opener writes it again where the disk does not take it now."""
        try:
            change()
        except OSError as error:
            log.error("%s: its record cannot be written: %s; trying again", self.name, error)

    def _fence(self, records: RecordDirectory, log_id: bytes, why: str) -> None:
        with self._record_lock:
            record = self.record
            if record is None or self.gone or record.fenced or record.log_id != log_id:
                return
            why = " ".join(why.split())[:MAX_LABEL] or "fenced"
            self.record = msgspec.structs.replace(
                record, fenced=why, fenced_at=int(time.time()), root_published=True, root=b""
            )
            self.state, self.reason, self.retry = "fenced", why, False
            self._save(records)
        if self.volume is None or not self.volume.fenced:  # an open volume says it
            text = f"export {self.name} is FENCED: {why}; it is not served here, its log stays"
            volume_id = record.volume_id.hex()
            happened("fence", text, export=self.name, volume_id=volume_id, level=logging.ERROR)

    def _save_unsaved(self, records: RecordDirectory) -> None:
        with self._record_lock:
            if self.unsaved and not self.gone:
                self._save(records)

    def delete_record(self, records: RecordDirectory) -> None:
        """The export ends here; the record goes for good. Durable on return. Raises OSError."""
        with self._record_lock:
            records.delete(self.name)
            self.gone = True

    def _save(self, records: RecordDirectory) -> None:
        assert self.record is not None
        self.unsaved = True
        records.save(self.record)
        self.unsaved = False

    # -- what it is doing --------------------------------------------------------------------------

    def failed(self, error: Exception) -> None:
        """The export cannot be served, for this reason."""
        if self.is_fenced():
            self.state, self.reason, self.retry = "fenced", self.fence_reason(), False
            return
        self.state = "failed"
        self.reason = " ".join(str(error).split()) or type(error).__name__
        # A local disk that is full or fails may do better later, too.
        self.retry = isinstance(error, OSError) or bool(getattr(error, "temporary", False))

    def serves(self) -> bool:
        """Whether guests can use it now."""
        return self.state == "serving" and self.volume is not None and not self.is_fenced()

    def device_down(self) -> bool:
        """Its device is gone. Does not block. False: a verb has the export."""
        if not self.lock.acquire(blocking=False):
            return False
        try:
            if self.state == "serving":
                self.state, self.reason = "failed", "its device was removed; attach the export again"
                log.error("%s: %s", self.name, self.reason)
        finally:
            self.lock.release()
        return True

    def fence_reason(self) -> str:
        """Why this host may not serve the volume any more; empty while it may."""
        record, volume = self.record, self.volume
        if record is not None and record.fenced:
            return record.fenced
        return volume.fenced if volume is not None else ""

    def is_fenced(self) -> bool:
        """Whether this host may not serve the volume any more: another one has it, or it was removed."""
        return bool(self.fence_reason())

    def check_served(self) -> None:
        """Raises Fenced, or NotOpen where guests cannot use it now."""
        if self.is_fenced():
            raise Fenced(self.name, self.fence_reason())
        if not self.serves():
            raise NotOpen(f"{self.name} is not served here now; 'glidefs show {self.name}' says why")

    def known_record(self) -> ExportRecord:
        """The record. Raises NotOpen where that on this host is damaged."""
        if self.record is None:
            raise NotOpen(f"{self.name}: its record on this host is damaged; {self.reason}")
        return self.record

    def served_status(self) -> ExportStatus:
        """The status at the end of a verb after which it should be served. Raises NotServed if it is not."""
        if self.state in ("failed", "fenced"):
            raise NotServed(self.name, self.reason, retried=self.retry)
        return self.status()

    def drain(self, timeout: float | None) -> None:
        """Upload everything acknowledged before the call. Raises DrainTimeout when time is up, Fenced."""
        volume = self.volume
        if self.is_fenced():
            raise Fenced(self.name, self.fence_reason())
        if volume is None:
            raise NotOpen(f"{self.name} is not served here now; 'glidefs show {self.name}' says why")
        volume.drain(timeout)

    def status(
        self,
        *,
        created: bool | None = None,
        note: str = "",
        figures: bool = True,
        told: Mapping[int, VolumeInfo] = NOTHING_TOLD,
    ) -> ExportStatus:
        """What `show` prints, without the volume's figures if they are not asked for. Blocks on nothing.

        ``told``: what the core has just said about volumes, by cookie; it is asked about any other.
        """
        record, volume, endpoint = self.record, self.volume if figures else None, self.endpoint
        numbers: dict[str, Any] | None = None
        state, reason = self.state, self.reason
        if volume is not None:
            try:
                numbers = msgspec.structs.asdict(volume.status(told.get(volume.cookie)))
            except GlideError as error:
                state, reason = "failed", str(error)
        if fenced := self.fence_reason():
            state, reason = "fenced", f"{fenced}; {self._remedy()}"
        elif numbers is not None and numbers["failed"]:
            state, reason = "failed", f"all I/O fails: {os.strerror(numbers['failed'])}"
        kind = self.transport.kind if self.transport is not None else ""
        return ExportStatus(
            name=self.name,
            size=record.size if record else 0,
            transport=kind or (record.transport if record else ""),
            device=endpoint.device if endpoint else "",
            state=state,
            reason=reason,
            prefix=record.prefix if record else "",
            read_only=record.read_only if record else False,
            flush=record.flush if record else "local",
            volume_id=record.volume_id.hex() if record else "",
            log_id=record.log_id.hex() if record else "",
            source=record.source if record else "",
            created_at=record.created_at if record else 0,
            published=record.root_published if record else True,
            fenced_at=record.fenced_at if record else 0,
            created=created,
            note=note,
            volume=numbers,
        )

    def _remedy(self) -> str:
        """What there is to do about a fence."""
        name = self.name
        return (
            f"the log stays here ('glidefs logs'), 'glidefs attach {name}' takes the volume again, "
            f"'glidefs detach {name}' forgets it here"
        )


class ExportTable:
    """Names to entries. `_lock` guards the dictionary and is held for look-ups only."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: dict[str, Entry] = {}
        self._shut = ""

    @contextmanager
    def shut(self, why: str, patience: float) -> Iterator[list[Entry]]:
        """All entries with their locks held: no verb runs inside, and those that come are refused.

        Raises GlideError naming an export whose verb has not ended after `patience` seconds.
        """
        until = time.monotonic() + patience
        held: list[Entry] = []
        self._shut = why
        try:
            while missing := [entry for entry in self.all() if entry not in held]:
                for entry in missing:
                    if not entry.lock.acquire(timeout=max(0.0, until - time.monotonic())):
                        raise GlideError(f"a verb on {entry.name} has not ended in {patience:g} s; try again")
                    held.append(entry)
            yield sorted((entry for entry in held if not entry.gone), key=lambda entry: entry.name)
        except BaseException:
            self._shut = ""
            raise
        finally:
            for entry in held:
                entry.lock.release()

    def reopen(self) -> None:
        """Verbs run again."""
        self._shut = ""

    @property
    def is_shut(self) -> bool:
        """Whether verbs are refused."""
        return bool(self._shut)

    def check_open(self) -> None:
        """Raises GlideError while, and after, the exports are handed to another process."""
        if self._shut:
            raise Refused(self._shut)

    def all(self) -> list[Entry]:
        """Every entry, by name."""
        with self._lock:
            return [self._entries[name] for name in sorted(self._entries)]

    def find(self, name: str) -> Entry | None:
        """The entry of that name, if any."""
        with self._lock:
            return self._entries.get(name)

    def get(self, name: str) -> Entry:
        """The entry of that name. Raises InvalidName, UnknownExport."""
        entry = self.find(check_name("export", name))
        if entry is None:
            raise UnknownExport(name)
        return entry

    def is_fenced_log(self, log_id: bytes) -> bool:
        """Whether a fenced export has this log: a root that names it then belongs to a copy of this host."""
        records = [entry.record for entry in self.all()]
        return any(record is not None and record.fenced and record.log_id == log_id for record in records)

    @contextmanager
    def locked(self, name: str) -> Iterator[Entry]:
        """The entry with its lock held. Raises UnknownExport, also when it went while we waited."""
        entry = self.get(name)
        with entry.lock:
            self.check_open()
            if entry.gone:
                raise UnknownExport(name)
            yield entry

    @contextmanager
    def reserved(self, name: str) -> Iterator[Entry]:
        """A new entry with its lock held; it goes again if the body fails. Raises ExportExists."""
        entry = Entry(check_name("export", name))
        with entry.lock:
            with self._lock:
                self.check_open()
                if name in self._entries:
                    raise ExportExists(name)
                self._entries[name] = entry
            try:
                yield entry
            except BaseException:
                self.drop(entry)
                raise

    def add(self, entry: Entry) -> bool:
        """Add an entry unless its name is there already."""
        with self._lock:
            return self._entries.setdefault(entry.name, entry) is entry

    def drop(self, entry: Entry) -> None:
        """Forget an entry. Its lock is held."""
        entry.gone = True
        with self._lock:
            if self._entries.get(entry.name) is entry:
                del self._entries[entry.name]


def new_record(root: Root, prefix: str, transport: str, *, published: bool) -> ExportRecord:
    """The record of a volume with this root."""
    data = encode_root(root, manifest_key(prefix, root.name))
    return ExportRecord(
        name=root.name,
        volume_id=root.volume_id,
        log_id=root.log_id,
        prefix=prefix,
        manifest_hash=manifest_hash(data),
        root=b"" if published else data,
        size=root.size,
        transport=transport,
        read_only=root.read_only,
        flush=root.flush,
        root_published=published,
        source=root.source,
        epoch=root.epoch,
        created_at=root.created_at,
    )
