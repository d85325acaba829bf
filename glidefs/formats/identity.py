"""Who is who: the ids of a store and of a host, in small JSON files that an operator can read.

    {"checksum": BLAKE3 in hex of the bytes of the value of "record", "record": {...}}

``store.json`` at the root of a store (:class:`StoreIdentity`), ``host.json`` in a cache directory and
``.glidefs`` in each directory that belongs to it (:class:`HostIdentity`, :class:`DirectoryMark`). Ids are
32 hex digits.
"""

from __future__ import annotations

import secrets
from typing import Annotated, TypeVar

import msgspec
from blake3 import blake3
from msgspec import Meta

from glidefs.errors import CorruptObject, NewerFormat
from glidefs.formats.pack import ID_SIZE

FORMAT = 1
MAX_FILE = 64 << 10
"""Bytes of the largest of these files that is read."""

HexId = Annotated[str, Meta(pattern=r"^[0-9a-f]{32}\Z")]
Format = Annotated[int, Meta(ge=1)]


class StoreIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """Which store this is, wherever it is reached. ``created`` in unix seconds."""

    format: Format = FORMAT
    id: HexId
    created: Annotated[int, Meta(ge=0)]


class HostIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """Which cache directory this is: the owner in manifest roots. ``store_id``: the store it works with.

    ``machine`` is the machine id of the system that drew the id, or empty: that it differs now is a hint.
    """

    format: Format = FORMAT
    host_id: HexId
    store_id: HexId | None = None
    created: Annotated[int, Meta(ge=0)]
    machine: Annotated[str, Meta(max_length=64)] = ""


class DirectoryMark(msgspec.Struct, frozen=True, kw_only=True):
    """Which cache directory a directory of logs or of cached blocks belongs to."""

    format: Format = FORMAT
    host_id: HexId
    role: str


class _File(msgspec.Struct):
    checksum: str
    record: msgspec.Raw


T = TypeVar("T", StoreIdentity, HostIdentity, DirectoryMark)
_decoder = msgspec.json.Decoder(_File)


def new_id() -> str:
    """A random id, in hex."""
    return secrets.token_hex(ID_SIZE)


def encode(record: StoreIdentity | HostIdentity | DirectoryMark) -> bytes:
    """The bytes of the file."""
    body = msgspec.json.encode(record)
    return msgspec.json.encode(_File(blake3(body).hexdigest(), msgspec.Raw(body))) + b"\n"


def decode(where: str, data: bytes, kind: type[T]) -> T:
    """The record in the bytes of a file; ``where`` names it in errors. Raises CorruptObject."""
    try:
        document = _decoder.decode(data)
        body = bytes(document.record)
        if blake3(body).hexdigest() != document.checksum:
            raise ValueError("checksum does not match")
        record = msgspec.json.decode(body, type=kind)
    except (ValueError, RecursionError) as error:
        raise CorruptObject(where, 0, f"{kind.__name__}: {error}") from error
    if record.format > FORMAT:
        raise NewerFormat(where, 0, f"format {record.format} is not known here; a newer GlideFS wrote it")
    return record
