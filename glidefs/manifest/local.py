"""Local copies of manifests: what a host knows of its volumes while the store is away.

``{state_dir}/volumes/{volume id}/`` holds ``root`` (MessagePack: the ETag or nil, and the bytes of the
encoded root, which carry their own checksum and the key that they belong to) and ``pages/{page id}``.
The copy is durable before segments that the root includes may be unlinked, so the local log and
manifest together never lag behind the store.

``tried`` holds the nonces of the roots that were put since the copy was written, and of the copy's own. It is
one sector that is written in place, durable before the put begins, so it costs one sync for each commit:

    0   4  magic "GLTR"
    4   4  number of nonces n, little-endian
    8  16n the nonces, oldest first
    .  16  BLAKE3-128 of the volume id and all bytes before
"""

from __future__ import annotations

import contextlib
import os
import shutil
import struct
from collections.abc import Collection, Iterator, Mapping, Sequence
from enum import Enum, auto
from pathlib import Path

import msgspec
from blake3 import blake3

from glidefs.errors import CorruptObject, WrongObject
from glidefs.formats import reserve
from glidefs.formats.atomic import fsync_dir, make_directory, read_file, write_file_atomic, write_in_place
from glidefs.formats.manifest import MAX_DOCUMENT, Root, decode_any_root, decode_root, encode_root
from glidefs.formats.pack import ID_SIZE

MAX_TRIED = 128
"""Nonces that are kept. More commits without an answer than that, and the oldest is not ours any more."""
_TRIED = struct.Struct("<4sI")
_TRIED_MAGIC = b"GLTR"
_MAX_TRIED_FILE = _TRIED.size + (MAX_TRIED + 1) * ID_SIZE
_MAX_ROOT_FILE = MAX_DOCUMENT + (1 << 16)
_NO_PAGES: Mapping[bytes, bytes] = {}


class LocalCopy(Enum):
    """What is known of the copy of a root that a volume is opened with."""

    UNKNOWN = auto()
    READ = auto()
    """The root was read from it just now. Its names may not be durable yet."""
    ENOUGH = auto()
    """The same, and it need not be made durable: the log has no segments, so none can go before it is."""


class _Saved(msgspec.Struct, frozen=True, array_like=True):
    etag: str | None
    root: bytes


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Saved)


def volume_dir(state_dir: Path, volume_id: bytes) -> Path:
    """The directory of a volume's copies."""
    return Path(_place(state_dir, volume_id))


def page_dir(state_dir: Path, volume_id: bytes) -> Path:
    """The directory of the copies of its pages."""
    return Path(_place(state_dir, volume_id), "pages")


def _place(state_dir: Path, volume_id: bytes) -> str:
    """The same as text: a start with thousands of volumes opens files of each, and a Path costs as much."""
    return f"{state_dir}/volumes/{volume_id.hex()}"


def _make_dir(state_dir: Path, volume_id: bytes) -> Path:
    directory = volume_dir(state_dir, volume_id)
    make_directory(directory)
    return directory


def save(
    state_dir: Path, root: Root, key: str, etag: str | None, pages: Mapping[bytes, bytes] = _NO_PAGES
) -> None:
    """Replace the copy by ``root``, which the store has or will have as ``key``; add encoded ``pages`` by id.

    Durable on return. Raises OSError, and then the old copy is whole.
    """
    directory = _make_dir(state_dir, root.volume_id)
    pages_at = directory / "pages"
    try:
        _save_pages(directory, pages_at, pages)
    except OSError as error:
        if error.errno not in reserve.NO_ROOM:
            raise
        # The store has the pages. The root is what space waits for: it comes first, and may take theirs.
        shutil.rmtree(pages_at, ignore_errors=True)
    write_file_atomic(directory / "root", _encoder.encode(_Saved(etag, encode_root(root, key))))
    wanted = {page_id.hex() for page_id in root.page_ids}
    with contextlib.suppress(OSError):
        for path in pages_at.iterdir():
            if path.name not in wanted:
                path.unlink()


def _save_pages(directory: Path, pages_at: Path, pages: Mapping[bytes, bytes]) -> None:
    if not pages:
        return
    make_directory(pages_at)
    for page_id, page in pages.items():
        write_file_atomic(pages_at / page_id.hex(), page)


def save_tried(state_dir: Path, volume_id: bytes, nonces: Sequence[bytes]) -> None:
    """Replace the nonces of roots that were put; durable on return. Raises OSError."""
    path = _make_dir(state_dir, volume_id) / "tried"
    body = _TRIED.pack(_TRIED_MAGIC, len(nonces)) + b"".join(nonces)
    write_in_place(path, body + _tried_check(volume_id, body))


def load_tried(state_dir: Path, volume_id: bytes) -> tuple[bytes, ...]:
    """The nonces of :func:`save_tried`; none if the file is absent or damaged: then no root is adopted."""
    try:
        data = read_file(f"{_place(state_dir, volume_id)}/tried", _MAX_TRIED_FILE)
    except (OSError, CorruptObject):
        return ()
    if len(data) < _TRIED.size:
        return ()
    magic, count = _TRIED.unpack_from(data)
    end = _TRIED.size + count * ID_SIZE
    if magic != _TRIED_MAGIC or count > MAX_TRIED or len(data) < end + ID_SIZE:
        return ()
    if data[end : end + ID_SIZE] != _tried_check(volume_id, data[:end]):
        return ()
    return tuple(data[at : at + ID_SIZE] for at in range(_TRIED.size, end, ID_SIZE))


def _tried_check(volume_id: bytes, body: bytes) -> bytes:
    return blake3(volume_id + body).digest(length=ID_SIZE)


def sync(state_dir: Path, volume_id: bytes) -> None:
    """Make a copy that was found durable: the process that saved it may have died on the way. Raises OSError.

    Files are synced before they get their names, so it is the names that may be lost with the power.
    """
    with contextlib.suppress(FileNotFoundError):
        fsync_dir(f"{_place(state_dir, volume_id)}/pages")
    fsync_dir(_place(state_dir, volume_id))


def sync_volumes(state_dir: Path) -> None:
    """The same for which volumes there are copies of: once for a start, not once for each. Raises OSError."""
    for place in (state_dir / "volumes", state_dir):
        with contextlib.suppress(FileNotFoundError):
            fsync_dir(place)


def _read(path: str) -> _Saved:
    try:
        return _decoder.decode(read_file(path, _MAX_ROOT_FILE))
    except FileNotFoundError:
        raise
    except (OSError, msgspec.MsgspecError) as error:
        raise CorruptObject(path, 0, f"local copy of a manifest: {error}") from error


def load(state_dir: Path, volume_id: bytes, key: str) -> tuple[Root, str | None, bytes] | None:
    """The saved root of the volume, which the store has as ``key``, its ETag and its encoded bytes, or None.

    Raises CorruptObject; WrongObject for the copy of another volume.
    """
    path = f"{_place(state_dir, volume_id)}/root"
    try:
        saved = _read(path)
    except FileNotFoundError:
        return None
    root = decode_root(key, saved.root, path)
    if root.volume_id != volume_id:
        raise WrongObject(path, f"it is the root of volume {root.volume_id.hex()}")
    return root, saved.etag, saved.root


def every(state_dir: Path, but: Collection[bytes] = ()) -> Iterator[Root]:
    """The roots of all volumes that there are good copies of, without those of the ids ``but``."""
    left_out = {volume_id.hex() for volume_id in but}
    directory = state_dir / "volumes"
    with contextlib.suppress(FileNotFoundError):
        for name in sorted(set(os.listdir(directory)) - left_out):
            root = _find(f"{directory}/{name}", name)
            if root is not None:
                yield root


def find(state_dir: Path, volume_id: bytes) -> Root | None:
    """The root of one volume, under whatever key, if there is a good copy."""
    return _find(_place(state_dir, volume_id), volume_id.hex())


def _find(directory: str, volume_id: str) -> Root | None:
    path = f"{directory}/root"
    with contextlib.suppress(CorruptObject, OSError):
        root = decode_any_root(path, _read(path).root)
        if root.volume_id.hex() == volume_id:
            return root
    return None


def forget(state_dir: Path, volume_id: bytes) -> None:
    """Delete the copies of a volume that was detached or removed."""
    shutil.rmtree(volume_dir(state_dir, volume_id), ignore_errors=True)
