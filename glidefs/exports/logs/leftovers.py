"""Leftovers: prefixes that no configuration on this host names, records that nobody serves, logs set aside.

It only reads: no directory, file or object is made for the sake of looking.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from urllib.parse import unquote, urlsplit

from msgspec import Struct

from glidefs.config import Config
from glidefs.errors import InvalidName
from glidefs.exports.table import RecordDirectory
from glidefs.names import check_id, check_prefix
from glidefs.store.base import dir_name
from glidefs.volume.aside import is_noted

KINDS = frozenset({"volumes", "bases", "packs", "pages", "tags", "gc"})
"""What lies below a prefix."""


class Logs(Struct, frozen=True):
    """Of a log directory: logs (volume and log id) that no record names, their bytes, and what is no log.

    ``lost`` are those that were not set aside: their records are lost or damaged.
    """

    aside: tuple[str, ...]
    lost: tuple[str, ...]
    size: int
    strange: tuple[str, ...]


def unnamed_prefixes(list_dirs: Callable[[str], Iterable[str]], named: Collection[str]) -> list[str]:
    """Prefixes that contain something of ours but are not named; ``list_dirs`` is a store's.

    Raises StoreError.
    """
    found = []
    for path in list_dirs(""):
        name = dir_name(path)
        try:
            check_prefix(name)
        except InvalidName:
            continue
        if name not in named and any(dir_name(below) in KINDS for below in list_dirs(path)):
            found.append(name)
    return found


def directory_of(url: str) -> Path | None:
    """The directory of a ``file://`` store."""
    parts = urlsplit(url)
    return Path(unquote(parts.path)) if parts.scheme == "file" else None


def dirs_below(root: Path) -> Callable[[str], list[str]]:
    """``list_dirs`` of a directory, without opening a store in it."""

    def list_dirs(prefix: str) -> list[str]:
        return sorted(f"{prefix}{path.name}/" for path in (root / prefix).iterdir() if path.is_dir())

    return list_dirs


def recorded(config: Config) -> tuple[set[str], set[str]]:
    """Names of the export records of this host: those that can be read, and those that are damaged."""
    records, damaged = RecordDirectory(Path(config.cache.dir) / "exports").load()
    return {record.name for record in records}, set(damaged)


def logs_aside(config: Config) -> Logs:
    """Logs that no record of this host names."""
    records, _ = RecordDirectory(Path(config.cache.dir) / "exports").load()
    known = {(record.volume_id.hex(), record.log_id.hex()) for record in records}
    aside: list[str] = []
    lost: list[str] = []
    strange: list[str] = []
    size = 0
    for volume in _entries(config.cache.logs):
        for path in _entries(volume) if _is_id(volume) else ():
            if path.is_dir() and not _is_id(path):
                strange.append(str(path))
            elif path.is_dir() and (volume.name, path.name) not in known:
                where = aside if is_noted(path) else lost
                where.append(f"{volume.name}/{path.name}")
                size += sum(file.lstat().st_blocks * 512 for file in _entries(path))
        if not _is_id(volume) and volume.is_dir():
            strange.append(str(volume))
    return Logs(tuple(aside), tuple(lost), size, tuple(strange))


def _entries(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _is_id(path: Path) -> bool:
    try:
        check_id(path.name)
    except InvalidName:
        return False
    return path.is_dir()
