"""Describes the contents of a GlideFS object or file, without a daemon and without secrets."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec

from glidefs import names
from glidefs.core.gather import look_at_segment
from glidefs.errors import ConfigError, CorruptObject
from glidefs.formats import blessing, envelope, export_record, gc_state, hot_set, manifest, pack
from glidefs.store.base import ObjectStore

SEGMENT_MAGIC = b"GLIDELOG"
SEGMENT_VERSION = 2
_HEAD = 2 * pack.SECTOR
"""Two sectors with a copy of the header each, before the journal."""
_RECORD_SIZE = 32
LISTED = 1000
"""Entries shown of a long table."""
MAX_WHOLE = 512 << 20


class Source:
    """Bytes to inspect: `size`, `head(n)`, `tail(n)`, `whole()`."""

    def __init__(self, name: str, size: int, key: str | None = None) -> None:
        self.name = name
        self.size = size
        self.key = key
        """The key that it was asked for; None for a file, which may be a copy of any object."""

    def head(self, length: int) -> bytes:
        """The first bytes, fewer if there are not that many."""
        raise NotImplementedError

    def tail(self, length: int) -> bytes:
        """The last bytes."""
        raise NotImplementedError

    def whole(self) -> bytes:
        """All bytes. Raises ConfigError for something too large to be ours."""
        raise NotImplementedError


class FileSource(Source):
    """A local file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        super().__init__(str(path), path.stat().st_size)

    def _read(self, offset: int, length: int) -> bytes:
        with self._path.open("rb") as file:
            file.seek(offset)
            return file.read(length)

    def head(self, length: int) -> bytes:
        return self._read(0, length)

    def tail(self, length: int) -> bytes:
        return self._read(max(0, self.size - length), length)

    def whole(self) -> bytes:
        if self.size > MAX_WHOLE:
            raise ConfigError(f"{self.name}: {self.size} bytes are too many for a document of ours")
        return self._read(0, self.size)


class StoreSource(Source):
    """An object."""

    def __init__(self, store: ObjectStore, key: str) -> None:
        self._store = store
        super().__init__(key, store.head(key).size, key)

    def head(self, length: int) -> bytes:
        return bytes(self._store.get_range(self.name, 0, min(length, self.size))) if self.size else b""

    def tail(self, length: int) -> bytes:
        return self._store.get_suffix(self.name, length)[0]

    def whole(self) -> bytes:
        if self.size > MAX_WHOLE:
            raise ConfigError(f"{self.name}: {self.size} bytes are too many for a document of ours")
        return self._store.get(self.name).data


def inspect(source: Source) -> dict[str, Any]:
    """Describe `source` as a JSON document. Raises CorruptObject, ConfigError, StoreError, OSError."""
    magic = source.head(8)
    known = {
        manifest.ROOT_MAGIC: _root,
        manifest.PAGE_MAGIC: _page,
        hot_set.HOT_SET_MAGIC: _hot_set,
        blessing.BLESSING_MAGIC: _blessing,
        gc_state.STATE_MAGIC: _gc_state,
        pack.PACK_MAGIC: _pack,
    }
    describe = known.get(magic[:4])
    if describe is None and _is_segment(source):
        describe = _segment
    if describe is None and magic[:1] == b"{":
        describe = _record
    if describe is None:
        raise ConfigError(
            f"{source.name}: not a manifest, page, pack, hot set, checkpoint, gc state, segment or record "
            f"(begins with {magic!r})"
        )
    return {"object": source.name, "bytes": source.size, **describe(source)}


def _key(source: Source, data: bytes) -> str:
    """What the object must be labelled with; a file may say itself."""
    return source.key or envelope.label_of(data).decode("utf-8", "replace")


def _id(source: Source, found: bytes) -> bytes:
    """The id that the key of a pack or page names; a file may say itself."""
    name = (source.key or "").rpartition("/")[2]
    return bytes.fromhex(names.check_id(name)) if name else found


def _root(source: Source) -> dict[str, Any]:
    data = source.whole()
    key = _key(source, data)
    root = manifest.decode_root(key, data, source.name)
    fields = _plain(root)
    fields["page_ids"] = [page.hex() or None for page in root.page_ids[:LISTED]]
    fields["inline_page"] = None if root.inline_page is None else _page_fields(root.inline_page)
    hash_ = manifest.manifest_hash(data).hex()
    return {"kind": "manifest root", "key": key, "manifest_hash": hash_, **fields}


def _page(source: Source) -> dict[str, Any]:
    data = source.whole()
    own = _id(source, manifest.page_id(data))
    page = manifest.decode_page(source.name, data, own)
    return {"kind": "manifest page", "id": own.hex(), **_page_fields(page)}


def _page_fields(page: manifest.Page) -> dict[str, Any]:
    return {
        "pack_count": len(page.packs),
        "pack_bytes": sum(ref.size for ref in page.packs),
        "chunk_count": len(page.chunks),
        "packs": [_plain(ref) for ref in page.packs[:LISTED]],
        "chunks": {str(chunk): list(page.chunks[chunk]) for chunk in sorted(page.chunks)[:LISTED]},
    }


def _pack(source: Source) -> dict[str, Any]:
    pack.check_header(source.name, source.head(pack.HEADER_SIZE))
    trailer = source.tail(pack.TRAILER_SIZE)
    length = int.from_bytes(trailer[:4], "little") + pack.TRAILER_SIZE
    if len(trailer) < pack.TRAILER_SIZE or length > source.size or length > pack.MAX_INDEX_FRAME:
        raise CorruptObject(source.name, source.size, "no index trailer; the pack is cut off")
    index = pack.decode_index(source.name, source.tail(length), source.size, _id(source, b"") or None)
    entries = list(index.entries())
    return {
        "kind": "pack",
        "index_length": length,
        "entries": len(entries),
        "whole_blocks": sum(entry.mask == pack.FULL_MASK for entry in entries),
        "plain_bytes": sum(entry.plain for entry in entries),
        "stored_bytes": sum(entry.stored for entry in entries),
        "blocks": [
            {
                "block": entry.block,
                "mask": f"{entry.mask:08x}",
                "zero_mask": f"{entry.zero_mask:08x}",
                "offset": entry.offset,
                "stored": entry.stored,
                "hash": entry.hash.hex(),
            }
            for entry in entries[:LISTED]
        ],
    }


def _segment(source: Source) -> dict[str, Any]:
    """A segment of a write log (csrc/log/segment.h), by whichever copy of its header is good."""
    found = look_at_segment(source.head(_HEAD))
    if found is None:
        raise CorruptObject(source.name, 0, "a write log segment: neither copy of the header is good")
    if found.version != SEGMENT_VERSION:
        why = f"segment format {found.version}; this release reads {SEGMENT_VERSION}"
        raise CorruptObject(source.name, 8, why)
    found = look_at_segment(source.head(_HEAD + found.sectors * _RECORD_SIZE)) or found
    note = "data is not verified here"
    if not all(found.copies):
        bad = "first" if found.copies[1] else "second"
        note = f"the {bad} copy of its header is damaged, a start of its volume repairs it; {note}"
    return {
        "kind": "write log segment",
        "version": found.version,
        "volume_id": found.volume_id.hex(),
        "log_id": found.log_id.hex(),
        "sequence": found.sequence,
        "previous": found.previous,
        "sectors": found.sectors,
        "records": dict(zip(("WRITE", "ZERO", "SYNC"), found.records, strict=True)),
        "written_bytes": found.written,
        "note": note,
    }


def _is_segment(source: Source) -> bool:
    return SEGMENT_MAGIC in (source.head(8), source.head(pack.SECTOR + 8)[pack.SECTOR :])


def _hot_set(source: Source) -> dict[str, Any]:
    data = source.whole()
    found = hot_set.decode_hot_set(_key(source, data), data, source.name)
    return {
        "kind": "hot set",
        "manifest_hash": found.manifest_hash.hex(),
        "block_count": found.block_count,
        "runs": [list(msgspec.structs.astuple(run)) for run in found.runs[:LISTED]],
    }


def _blessing(source: Source) -> dict[str, Any]:
    data = source.whole()
    found = blessing.decode_blessing(_key(source, data), data, source.name)
    return {
        "kind": "checkpoint of a bless",
        "started_at": found.started_at,
        "saved_at": found.saved_at,
        "pack_count": len(found.packs),
        "pack_bytes": sum(pack.ref.size for pack in found.packs),
        "packs": [{**_plain(pack.ref), "put_at": pack.put_at} for pack in found.packs[:LISTED]],
    }


def _gc_state(source: Source) -> dict[str, Any]:
    data = source.whole()
    found = gc_state.decode_state(_key(source, data), data, source.name)
    packs, pages = gc_state.first_seen(found)
    return {
        "kind": "gc state",
        "run": found.run.hex(),
        "unreferenced_packs": len(packs),
        "unreferenced_pages": len(pages),
        "checkpoints": [_plain(seen) for seen in found.checkpoints[:LISTED]],
        "sightings": [
            {
                "since": sighting.since,
                "packs": len(sighting.packs) // pack.ID_SIZE,
                "pages": len(sighting.pages) // pack.ID_SIZE,
            }
            for sighting in found.sightings[:LISTED]
        ],
    }


def _record(source: Source) -> dict[str, Any]:
    record = export_record.decode_record(source.name, source.whole())
    return {"kind": "export record", **_plain(record)}


def _plain(value: msgspec.Struct) -> dict[str, Any]:
    fields = msgspec.structs.asdict(value)
    return {name: item.hex() if isinstance(item, bytes) else item for name, item in fields.items()}


def open_source(store: ObjectStore | None, name: str) -> Source:
    """The local file `name` if there is one, else the key `name` of the store."""
    path = Path(name.removeprefix("file://"))
    if os.path.isfile(path):
        return FileSource(path)
    if store is None:
        raise ConfigError(f"{name}: no such file; to read a store key, give --store URL or --config")
    return StoreSource(store, name)
