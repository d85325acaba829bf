"""The verbs that copy a volume or prepare forks of it: snapshot, tag, promote, profile."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace

from glidefs.asked import asker, check_listening
from glidefs.bases.manifest_cache import BaseLibrary
from glidefs.bases.profile import IDLE, recording, wait
from glidefs.bases.stored import list_bases, remove_base
from glidefs.bless.bless import bless
from glidefs.errors import ConfigError, Fenced, GlideError, NotOpen, NotSupported
from glidefs.exports.copies.lineage import PATIENCE, Lineage
from glidefs.exports.opener import Opener
from glidefs.exports.requests import (
    BlessRequest,
    ExportStatus,
    ProfileRequest,
    PromoteRequest,
    SnapshotRequest,
    TagRequest,
    check_named,
)
from glidefs.exports.table import Entry, ExportTable, RecordDirectory, new_record
from glidefs.formats.hot_set import HotSet, make_hot_set
from glidefs.formats.manifest import Root
from glidefs.host.host import Host
from glidefs.manifest import lease, local
from glidefs.manifest.lease import put_first_root
from glidefs.manifest.view import Manifest
from glidefs.names import Source, check_name, check_prefix, manifest_key, parse_source
from glidefs.reading.reader import block_key
from glidefs.store.resilient import ResilientStore
from glidefs.volume.volume import Volume


class ForkVerbs:
    """Every method may be called from any thread and may block; locks are those of the router's verbs."""

    def __init__(
        self,
        table: ExportTable,
        records: RecordDirectory,
        opener: Opener,
        host: Host,
        store: ResilientStore,
        bases: BaseLibrary,
        lineage: Lineage,
        stopping: threading.Event,
    ) -> None:
        self._table = table
        self._records = records
        self._opener = opener
        self._host = host
        self._store = store
        self._bases = bases
        self._lineage = lineage
        self._stopping = stopping

    def _volume(self, name: str) -> tuple[Entry, Volume]:
        entry = self._table.get(name)
        volume = entry.volume
        if entry.is_fenced():
            raise Fenced(name, entry.fence_reason())
        if volume is None or entry.record is None:
            raise NotOpen(f"{name} is not served here now; 'glidefs show {name}' says why")
        return entry, volume

    def _prefix(self, name: str, prefix: str | None) -> str:
        """The prefix of a volume: that of the export of this name, else the one asked for."""
        entry = self._table.find(check_name("volume", name))
        if prefix is None and entry is not None and entry.record is not None:
            return entry.record.prefix
        return check_prefix(prefix or self._opener.places.prefixes[0])

    # -- snapshots and tags ------------------------------------------------------------------------

    def snapshot(self, name: str, wanted: SnapshotRequest) -> dict[str, Any]:
        """Upload what was acknowledged before the call and keep the manifest that has it.

        Guests go on; no lock is held. Raises DrainTimeout, Fenced, StoreError.
        """
        if wanted.tag is not None:
            check_name("tag", wanted.tag)
        _, volume = self._volume(name)
        if volume.read_only:
            raise NotSupported(f"{name} is read-only; fork or tag what it shows instead")
        with self._lineage.committed(volume, wanted.timeout) as root:
            sequence = self._lineage.keep(volume.prefix, root)
            if wanted.tag is not None:
                self._lineage.tag(volume.prefix, wanted.tag, root)
        return {
            "name": name,
            "sequence": sequence,
            "source": str(Source("snapshot", name, sequence)),
            "tag": wanted.tag,
            "size": root.size,
        }

    def snapshots(self, name: str, prefix: str | None = None) -> list[dict[str, Any]]:
        """The snapshots of a volume, served here or not."""
        return self._lineage.snapshots(self._prefix(name, prefix), name)

    def delete_snapshot(self, name: str, sequence: int, prefix: str | None = None) -> dict[str, Any]:
        """Delete one snapshot. Raises UnknownExport."""
        self._lineage.delete_snapshot(self._prefix(name, prefix), name, sequence)
        return {"name": name, "sequence": sequence, "deleted": True}

    def tag(self, name: str, wanted: TagRequest) -> dict[str, Any]:
        """Let a tag name the volume as it is now, or one of its snapshots."""
        check_name("tag", wanted.tag)
        source = _source(name, wanted.sequence)
        prefix = self._prefix(name, None)
        with self._lineage.origin(prefix, source) as origin:
            self._lineage.tag(prefix, wanted.tag, origin.root)
            return {"tag": wanted.tag, "source": str(source), "prefix": prefix, "note": origin.note}

    def tags(self, prefix: str | None) -> list[dict[str, Any]]:
        """The tags of a prefix. Raises StoreError."""
        return self._lineage.tags(check_prefix(prefix or self._opener.places.prefixes[0]))

    def delete_tag(self, tag: str, prefix: str | None) -> dict[str, Any]:
        """Delete a tag; forks that were made of it keep their data. Raises UnknownExport, StoreError."""
        prefix = check_prefix(prefix or self._opener.places.prefixes[0])
        self._lineage.delete_tag(prefix, tag)
        return {"tag": tag, "prefix": prefix, "deleted": True}

    # -- promote -----------------------------------------------------------------------------------

    def make_base(self, name: str, wanted: PromoteRequest) -> dict[str, Any]:
        """A volume, or a snapshot of it, becomes a base without moving its data. Raises ExportExists."""
        assert wanted.base is not None
        return self._lineage.make_base(
            self._prefix(name, wanted.prefix), _source(name, wanted.sequence), wanted.base
        )

    def promote(self, name: str) -> ExportStatus:
        """A read-only export becomes read-write; guests must connect again.

        A view of a base or a snapshot becomes a fork of it. Raises UnknownExport where that is gone,
        NotSupported where it was replaced, StoreError, Fenced.
        """
        with self._table.locked(name) as entry:
            entry.check_served()
            record, volume = entry.record, entry.volume
            assert record is not None
            assert volume is not None
            if not record.read_only:
                return entry.status(note="it is read-write already")
            self._opener.close_entry(entry, remove_device=True)
            try:
                root, etag = self._writable(entry, volume.root, volume.etag)
            except BaseException:
                self._opener.reopen(entry)
                raise
            if etag is not None:
                local.save(self._opener.places.state_dir, root, manifest_key(record.prefix, name), etag)
            fresh = new_record(root, record.prefix, record.transport, published=etag is not None)
            self._opener.begin(entry, replace(fresh, size=record.size, device_id=record.device_id))
            if root.volume_id != record.volume_id:
                self._host.forget_state(record.volume_id)
            self._opener.try_open(entry, root, etag)
            return entry.status(note="guests must connect again to write")

    def _writable(self, entry: Entry, root: Root, etag: str | None) -> tuple[Root, str | None]:
        """The root of the read-write export: a fork's, or the volume's own without the label."""
        assert entry.record is not None
        record = entry.record
        view = self._store.view("upload", PATIENCE)
        if record.is_view:
            source = parse_source(record.source)
            with self._lineage.shown(record.prefix, source, root):
                fork = lease.fork_root(
                    root,
                    root.name,
                    root.size,
                    self._opener.places.owner,
                    source=record.source,
                    transport=root.transport,
                    flush=root.flush,
                )
                return fork, None if source.kind == "base" else put_first_root(view, record.prefix, fork)
        own = lease.next_root(root, read_only=False)
        local.save_tried(self._opener.places.state_dir, root.volume_id, [own.nonce])
        result = lease.commit_root(view, manifest_key(record.prefix, root.name), own, etag, base=root)
        return result.adopted or own, result.etag

    # -- bases -------------------------------------------------------------------------------------

    def _bases_prefix(self, prefix: str | None) -> str:
        return check_prefix(prefix or self._opener.places.prefixes[0])

    def list_bases(self, prefix: str | None) -> list[dict[str, Any]]:
        """The bases of a prefix, removed ones that gc has not deleted yet too."""
        found = list_bases(self._store.view("read", PATIENCE), self._bases_prefix(prefix))
        return [msgspec.to_builtins(base) for base in found]

    def bless(self, base: str, wanted: BlessRequest) -> dict[str, Any]:
        """Make a base of a raw image on this host; see :func:`glidefs.bless.bless.bless`."""
        image = Path(wanted.image)
        if not image.is_absolute() or "\0" in wanted.image:
            raise ConfigError("name the image by an absolute path")
        settings, prefix = self._host.settings, self._bases_prefix(wanted.prefix)
        check_named(prefix, self._opener.places.prefixes, new=wanted.new_prefix)
        result = bless(
            self._store.view("background", PATIENCE),
            prefix,
            check_name("base", base),
            image,
            pack_bytes=settings.pack_bytes,
            level=settings.compression_level,
            max_age=settings.gc_grace / 2,
        )
        return result._asdict()

    def remove_base(self, base: str, prefix: str | None) -> dict[str, Any]:
        """Leave a tombstone: no new forks; those that exist go on. gc deletes what only it needed."""
        prefix = self._bases_prefix(prefix)
        info = remove_base(self._store.view("upload", PATIENCE), prefix, check_name("base", base))
        self._bases.forget(prefix, base)
        return {"name": base, "prefix": prefix, "removed_at": info.removed_at}

    # -- profiles ----------------------------------------------------------------------------------

    def profile(self, name: str, wanted: ProfileRequest) -> dict[str, Any]:
        """Record the faults of a fork of a base, and store them as the base's hot set.

        Returns when the time is over, or when no new block was touched for a while (the default). If the
        client has gone, it ends and nothing is stored.
        """
        entry, volume = self._volume(name)
        assert entry.record is not None
        source = parse_source(entry.record.source) if entry.record.source else None
        if source is None or source.kind != "base":
            raise NotSupported(f"{name} is not a fork of a base; a hot set belongs to a base")
        if volume.profiling:
            raise ConfigError(f"{name} is being profiled already")
        base = self._bases.get(entry.record.prefix, source.name)
        idle = wanted.idle if wanted.idle is not None or wanted.stop_after is not None else IDLE
        gone = asker().gone
        with recording(volume) as recorder:
            wait(
                volume,
                recorder,
                stop_after=wanted.stop_after,
                idle=idle,
                cancelled=lambda: self._stopping.is_set() or gone.is_set(),
            )
            touched = recorder.touched()
        if self._stopping.is_set() or volume.closing:
            raise GlideError(f"{name} was closed while it was profiled; nothing was stored")
        check_listening(f"the profile of {name}")
        hot_set = make_hot_set(base.manifest_hash, self._from_base(volume, base.root, touched))
        self._bases.store_hot_set(entry.record.prefix, source.name, hot_set)
        return _described(name, source.name, touched, hot_set)

    def _from_base(self, volume: Volume, base: Root, touched: dict[int, Root]) -> Iterator[int]:
        """Those of the touched blocks that showed data of the base: neither zeros nor the fork's own."""
        view = self._store.view("read", PATIENCE)
        of_base = Manifest(base, volume.prefix, self._host.meta, view)
        manifests: dict[int, Manifest] = {}
        for block, root in touched.items():
            manifest = manifests.setdefault(id(root), Manifest(root, volume.prefix, self._host.meta, view))
            key = block_key(of_base, block)
            if key is not None and key == block_key(manifest, block):
                yield block


def _source(name: str, sequence: int | None) -> Source:
    check_name("volume", name)
    return Source("volume", name) if sequence is None else Source("snapshot", name, sequence)


def _described(name: str, base: str, touched: dict[int, Root], hot_set: HotSet) -> dict[str, Any]:
    return {
        "name": name,
        "base": base,
        "touched_blocks": len(touched),
        "hot_blocks": hot_set.block_count,
        "manifest_hash": hot_set.manifest_hash.hex(),
    }
