"""How guests get at exports: which transport an export has, and its start and end."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from glidefs.errors import GlideError
from glidefs.exports.table import Entry, RecordDirectory
from glidefs.formats.export_record import ExportRecord
from glidefs.reading.changed import VolumeSnapshots
from glidefs.store.resilient import ResilientStore
from glidefs.transport.base import KINDS, Attachment, Choice, Transport, choose_transport

log = logging.getLogger(__name__)

SNAPSHOT_PATIENCE = 3.0
"""Seconds that the store may take for a request while an NBD client waits to hear of snapshots."""


class Guests:
    """The transports by kind. The caller holds the lock of the entry."""

    def __init__(
        self, transports: Mapping[str, Transport], records: RecordDirectory, store: ResilientStore
    ) -> None:
        self._transports = transports
        self._records = records
        self._store = store.view("read", SNAPSHOT_PATIENCE)

    def attachment(self, entry: Entry) -> Attachment:
        """The export as transports see it."""
        record, volume = entry.record, entry.volume
        assert record is not None
        assert volume is not None
        return Attachment(
            name=record.name,
            volume_id=record.volume_id,
            size=record.size,
            read_only=record.read_only,
            core=volume.core,
            device_id=record.device_id,
            waits_for_store=record.flush == "store",
            snapshots=VolumeSnapshots(volume, self._store),
        )

    def choose(self, kind: str, last: str = "") -> Choice:
        """The transport that is meant by `kind` on this host. Raises NotSupported.

        `last`: the one that the export had. "auto" stays with it while it can be had, whatever else there is
        by now: its guests are there.
        """
        choice = choose_transport(kind, self._transports)
        stays = kind == "auto" and choice.kind != last and last in KINDS
        kept = self._transports.get(last) if stays else None
        if kept is None or kept.missing() is not None:
            return choice
        why = f"it had {last} before, though this host has {choice.kind}; 'glidefs transport' changes it"
        return Choice(last, why)

    def prepare(self, record: ExportRecord) -> None:
        """Do what is slow the first time; see :meth:`Transport.prepare`. Raises NotSupported, DeviceError."""
        self._transports[self._chosen(record).kind].prepare(record.device_id)

    def _chosen(self, record: ExportRecord) -> Choice:
        return self.choose(record.transport, _served_by(record))

    def start(self, entry: Entry) -> None:
        """Let guests in. Raises NotSupported, DeviceError."""
        assert entry.record is not None
        choice = self._chosen(entry.record)
        if choice.kind != _served_by(entry.record):
            self.discard_device(entry.record, but=choice.kind)
        transport = self._transports[choice.kind]
        endpoint = transport.start(self.attachment(entry))
        entry.transport, entry.endpoint = transport, endpoint
        now = {"device_id": endpoint.device_id, "served_by": choice.kind}
        if any(getattr(entry.record, field) != value for field, value in now.items()):
            entry.change_record(self._records, **now)
        entry.state, entry.reason = "serving", choice.why
        entry.retry = False

    def stop(self, entry: Entry, *, remove_device: bool) -> None:
        """On return no guest reaches the volume. What fails is logged."""
        transport = entry.transport
        if transport is None:
            return
        try:
            if remove_device:
                transport.stop(entry.name)
            else:
                transport.release(entry.name)
        except (GlideError, OSError) as error:
            log.error("%s: %s", entry.name, error)
        entry.transport = entry.endpoint = None
        entry.state, entry.reason = "stopped", ""

    def discard_device(self, record: ExportRecord, *, but: str = "") -> None:
        """An export that is not served, or by the transport `but`, may have a device whose guests wait."""
        if record.device_id is None:
            return
        for kind, transport in self._transports.items():
            if kind == but or transport.missing() is not None:
                continue
            try:
                transport.discard(record.name, record.volume_id, record.device_id)
            except GlideError as error:
                log.warning("%s: %s", record.name, error)


def _served_by(record: ExportRecord) -> str:
    """The transport that the export had last. Records of before that was noted have a number only of ublk."""
    return record.served_by or ("nbd" if record.device_id is None else "ublk")
