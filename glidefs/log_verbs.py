"""The verbs on write logs of this host, also those that were set aside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from glidefs.errors import ConfigError, GlideError, UnknownExport
from glidefs.export_table import ExportTable, RecordDirectory
from glidefs.names import check_id
from glidefs.volume import logs


class LogVerbs:
    """``directory`` holds the logs. Thread-safe."""

    def __init__(self, records: RecordDirectory, table: ExportTable, directory: Path) -> None:
        self._records = records
        self._table = table
        self._directory = directory

    def _known(self) -> dict[tuple[bytes, bytes], str]:
        """The logs that records name, and whose they are: never to be deleted by hand."""
        records, _ = self._records.load()
        return {(record.volume_id, record.log_id): record.name for record in records}

    def _is_fenced(self, name: str) -> bool:
        entry = self._table.find(name)
        return entry is not None and entry.is_fenced()

    def list(self) -> list[dict[str, Any]]:
        """All write logs of this host, those set aside too.

        "fenced": another host has the volume, and its export is still listed here.
        """
        known = self._known()
        found = []
        for info in logs.list_logs(self._directory, known.keys()):
            name = known.get((bytes.fromhex(info.volume_id), bytes.fromhex(info.log_id)))
            state = "set aside" if not name else "fenced" if self._is_fenced(name) else "in use"
            found.append({**msgspec.structs.asdict(info), "export": name, "state": state})
        return found

    def export(self, volume_id: str, log_id: str, path: str) -> dict[str, Any]:
        """Write what a log holds to a sparse file. Raises UnknownExport, ConfigError, CorruptLog."""
        volume, own = bytes.fromhex(check_id(volume_id)), bytes.fromhex(check_id(log_id))
        directory = logs.log_dir(self._directory, volume, own)
        if not directory.is_dir():
            raise UnknownExport(f"{volume_id}/{log_id}", "no such log; 'glidefs logs list' shows them")
        target = Path(path)
        if not target.is_absolute() or "\0" in path:
            raise ConfigError("name the file by an absolute path")
        extents = logs.export_log(directory, volume, own, target)
        data = sum(extent.length for extent in extents if not extent.zero)
        return {"path": path, "bytes": data, "extents": [msgspec.to_builtins(extent) for extent in extents]}

    def delete(self, volume_id: str, log_id: str) -> dict[str, Any]:
        """Delete a log that was set aside."""
        known = self._known()
        for (volume, log), name in known.items():
            if (volume.hex(), log.hex()) == (volume_id, log_id) and self._is_fenced(name):
                raise GlideError(f"log {log_id} is that of {name}, which is fenced; detach {name} first")
        logs.delete_log(self._directory, volume_id, log_id, known.keys())
        return {"volume_id": volume_id, "log_id": log_id, "deleted": True}
