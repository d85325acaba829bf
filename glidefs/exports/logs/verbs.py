"""The verbs on write logs of this host, including those that were set aside."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import msgspec

from glidefs.core.gather import log_segments
from glidefs.errors import ConfigError, GlideError, InUse, UnknownExport
from glidefs.exports.table import ExportTable, RecordDirectory
from glidefs.manifest import local
from glidefs.names import check_id
from glidefs.volume import aside, log_damage, logs


class LogVerbs:
    """``directory`` holds the logs. Thread-safe."""

    def __init__(
        self, records: RecordDirectory, table: ExportTable, directory: Path, state_dir: Path
    ) -> None:
        self._records = records
        self._table = table
        self._directory = directory
        self._state_dir = state_dir

    def _unsent(self, directory: Path, volume: bytes, own: bytes) -> int:
        """Bytes that the store lacks of a log that no export uses. Raises CorruptLog."""
        return logs.unsent_bytes(directory, volume, own, self._sent(directory, volume, own))

    def _sent(self, directory: Path, volume: bytes, own: bytes) -> int | None:
        """The last segment of a log that the store has; None if nothing here knows."""
        for entry in self._table.all():
            record, opened = entry.record, entry.volume
            if record is not None and (record.volume_id, record.log_id) == (volume, own):
                if opened is not None and opened.log_id == own:
                    return opened.root.last_segment
                if not record.root_published:
                    return 0
        if aside.is_noted(directory):
            return aside.sent_segment(aside.read(directory))
        roots = (root for root in local.every(self._state_dir) if root.log_id == own)
        return next((root.last_segment for root in roots if root.volume_id == volume), None)

    def _known(self) -> tuple[dict[tuple[bytes, bytes], str], Collection[str]]:
        """The logs that records name, and whose they are: never to be deleted by hand. And damaged records.

        A record whose file was damaged since the start is still known to the export itself.
        """
        records, damaged = self._records.load()
        records += [entry.record for entry in self._table.all() if entry.record is not None]
        return {(record.volume_id, record.log_id): record.name for record in records}, damaged

    def _is_fenced(self, name: str) -> bool:
        entry = self._table.find(name)
        return entry is not None and entry.is_fenced()

    def list(self) -> list[dict[str, Any]]:
        """All write logs of this host, those set aside too.

        "fenced": another host has the volume, and its export is still listed here. "was": the export whose
        log was set aside, if that is known. "record lost": `glidefs attach` of "was" replays it; without a
        name it can be exported only.
        """
        known, _ = self._known()
        lost = {(root.volume_id, root.log_id): root.name for root in local.every(self._state_dir)}
        found = []
        for info in logs.list_logs(self._directory, known.keys()):
            ids = (bytes.fromhex(info.volume_id), bytes.fromhex(info.log_id))
            name = known.get(ids)
            state = "set aside" if not name else "fenced" if self._is_fenced(name) else "in use"
            noted = None if name else aside.read(Path(info.path))
            was = noted.name if noted is not None else None
            if not name and not aside.is_noted(Path(info.path)) and (ids in lost or info.segments):
                state, was = "record lost", lost.get(ids)
            found.append({**msgspec.structs.asdict(info), "export": name, "was": was, "state": state})
        return found

    def export(self, volume_id: str, log_id: str, path: str, *, partial: bool = False) -> dict[str, Any]:
        """Write what a log holds to a sparse file. Raises UnknownExport, ConfigError, CorruptLog.

        A log with damage to synced data is refused, and nothing is written; with ``partial`` its whole parts
        are written, and "note" and "lost" say what is missing.
        """
        volume, own = bytes.fromhex(check_id(volume_id)), bytes.fromhex(check_id(log_id))
        directory = logs.log_dir(self._directory, volume, own)
        if not directory.is_dir():
            raise UnknownExport(f"{volume_id}/{log_id}", "no such log; 'glidefs logs list' shows them")
        target = Path(path)
        if not target.is_absolute() or "\0" in path:
            raise ConfigError("name the file by an absolute path")
        copy, sent = self._copy(directory, volume, own, target, partial=partial)
        notes = [log_damage.note(copy.damage, directory)]
        if sent is None and log_segments(directory)[:1] != [1]:
            notes.append("nothing says how much of the log the store has: its first segments may be missing")
        data = sum(extent.length for extent in copy.extents if not extent.zero)
        return {
            "path": path,
            "bytes": data,
            "extents": [msgspec.to_builtins(extent) for extent in copy.extents],
            "lost": msgspec.to_builtins(copy.damage),
            "note": "; ".join(filter(None, notes)),
        }

    def _copy(
        self, directory: Path, volume: bytes, own: bytes, target: Path, *, partial: bool
    ) -> tuple[logs.LogCopy, int | None]:
        """The export, and what the store is known to have; again if segments went while it was read."""
        while True:
            found, sent = log_segments(directory)[:1], self._sent(directory, volume, own)
            failed: GlideError | None = None
            try:
                copy = logs.export_log(directory, volume, own, target, sent=sent, partial=partial)
            except GlideError as error:
                failed = error
            if failed is None and not copy.damage.losses:
                return copy, sent
            if log_segments(directory)[:1] == found and self._sent(directory, volume, own) == sent:
                if failed is not None:
                    raise failed
                return copy, sent

    def delete(self, volume_id: str, log_id: str, *, force: bool = False) -> dict[str, Any]:
        """Delete a log that was set aside.

        Raises InUse for one that an export uses; also, unless ``force``, where it holds what the store does
        not have, or may be that of an export whose record is damaged. Raises UnknownExport.
        """
        known, damaged = self._known()
        for (volume, log), name in known.items():
            if (volume.hex(), log.hex()) == (volume_id, log_id) and self._is_fenced(name):
                raise InUse(f"log {log_id} belongs to {name}, which is fenced; detach {name} first")
        lost = self._lost(volume_id, log_id, known, damaged)
        if lost and not force:
            raise InUse(
                f"log {log_id}: {lost}; 'glidefs logs export' copies what it holds, "
                "'glidefs logs delete --force' deletes it all the same"
            )
        logs.delete_log(self._directory, volume_id, log_id, known.keys())
        return {"volume_id": volume_id, "log_id": log_id, "deleted": True, "note": lost}

    def _lost(
        self, volume_id: str, log_id: str, known: Collection[tuple[bytes, bytes]], damaged: Collection[str]
    ) -> str:
        """What is lost with a log, for people; empty if nothing is."""
        volume, own = bytes.fromhex(check_id(volume_id)), bytes.fromhex(check_id(log_id))
        directory = logs.log_dir(self._directory, volume, own)
        if (volume, own) in known or not directory.is_dir():
            return ""  # refused for that
        lost = []
        noted = aside.read(directory)
        if damaged and (noted is None or noted.name in damaged) and volume not in {v for v, _ in known}:
            some = ", ".join(sorted(damaged)[:3])
            lost.append(f"it may belong to an export whose record is damaged ({some})")
        try:
            if unsent := self._unsent(directory, volume, own):
                lost.append(f"the store does not have {unsent} bytes of it")
        except GlideError as error:
            lost.append(f"its content is not known ({str(error).split(';')[0]})")
        return ", and ".join(lost)
