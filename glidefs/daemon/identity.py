"""The identity of this host: one cache directory with its log and block cache directories.

The id is drawn when a cache directory is made, and is the owner that manifest roots name. The node's name
is a label: hosts of one image share it, and a host may be renamed. Each directory that belongs to the
cache directory carries its id, so a disk that is not mounted, or another host's, is seen before
anything is served from it. The copies also bring the id back if ``host.json`` itself is damaged.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Mapping
from pathlib import Path

from msgspec.structs import replace

from glidefs.errors import ConfigError, CorruptObject
from glidefs.formats import identity as format_
from glidefs.formats.atomic import read_file, write_file_atomic
from glidefs.formats.identity import DirectoryMark, HostIdentity

log = logging.getLogger(__name__)

HOST_FILE = "host.json"
MARK_FILE = ".glidefs"
LOG_DIR = "log_dir"
MACHINE_ID = Path("/etc/machine-id")


class CacheIdentity:
    """Who this host is, and which of its directories are its own. Settled once at the start.

    ``directories`` are those beside the cache directory that belong to it, by the key of the configuration.
    ``keeps_logs``: there are records of exports with a log, so an unmarked log directory is not ours.
    """

    def __init__(self, cache_dir: Path, directories: Mapping[str, Path], *, keeps_logs: bool) -> None:
        self._path = cache_dir / HOST_FILE
        self._directories = directories
        self.foreign: dict[str, str] = {}
        """Directories that are not this host's, by key, and why."""
        self._host = self._load() or self._recover() or self._draw()
        for key, path in directories.items():
            self._check(key, path, keeps_logs=keeps_logs)

    @property
    def host_id(self) -> bytes:
        """16 bytes."""
        return bytes.fromhex(self._host.host_id)

    @property
    def store_id(self) -> str | None:
        """The id of the store that this host works with, once it is known; 32 hex digits."""
        return self._host.store_id

    def bind(self, store_id: str) -> None:
        """This host works with that store from now on; durable on return. Raises OSError."""
        self._save(replace(self._host, store_id=store_id))

    def _load(self) -> HostIdentity | None:
        try:
            return format_.decode(str(self._path), read_file(self._path, format_.MAX_FILE), HostIdentity)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ConfigError(f"{self._path}: {error.strerror}; is the disk of the cache sound?") from error
        except CorruptObject as error:
            if self._mark_ids():
                log.error("%s; its copies in the other directories replace it", error)
                return None
            raise ConfigError(
                f"{self._path}: damaged, and no other directory has a copy; remove it to become a new host, "
                "and take this host's volumes with 'glidefs attach --all --take-over'"
            ) from error

    def _mark_ids(self) -> set[str]:
        return {mark.host_id for path in self._directories.values() if (mark := _read_mark(path))}

    def _recover(self) -> HostIdentity | None:
        """The identity that the marks name, where the file is lost."""
        ids = self._mark_ids()
        if not ids:
            return None
        if len(ids) > 1:
            raise ConfigError(
                f"{self._path}: lost, and the directories of this host belong to different ones "
                f"({', '.join(sorted(ids))}); mount the right disks"
            )
        log.warning("%s was lost; the id is that in the other directories of this host", self._path)
        return self._save(HostIdentity(host_id=ids.pop(), created=int(time.time()), machine=machine_id()))

    def _draw(self) -> HostIdentity:
        return self._save(
            HostIdentity(host_id=format_.new_id(), created=int(time.time()), machine=machine_id())
        )

    def _save(self, host: HostIdentity) -> HostIdentity:
        write_file_atomic(self._path, format_.encode(host))
        self._host = host
        return host

    def _check(self, key: str, path: Path, *, keeps_logs: bool) -> None:
        mark = _read_mark(path)
        if mark is not None and mark.host_id != self._host.host_id:
            self.foreign[key] = f"it belongs to another cache directory (host {mark.host_id})"
        elif mark is None and key == LOG_DIR and keeps_logs and not (path / MARK_FILE).exists():
            self.foreign[key] = "it does not have the mark of this cache directory"
        elif mark is None:
            own = DirectoryMark(host_id=self._host.host_id, role=key)
            write_file_atomic(path / MARK_FILE, format_.encode(own))
        if key in self.foreign:
            why = self.foreign[key]
            log.error("[cache] %s %s: %s; mount the right disk and start again", key, path, why)


def _read_mark(directory: Path) -> DirectoryMark | None:
    """The mark of a directory. A damaged one is as good as none: the next start writes it anew."""
    path = directory / MARK_FILE
    try:
        return format_.decode(str(path), read_file(path, format_.MAX_FILE), DirectoryMark)
    except (OSError, CorruptObject):
        return None


def made_elsewhere(cache_dir: Path) -> bool:
    """Whether the cache directory says that another machine made it. A hint: it may have been moved."""
    path = cache_dir / HOST_FILE
    try:
        host = format_.decode(str(path), read_file(path, format_.MAX_FILE), HostIdentity)
    except (OSError, CorruptObject):
        return False
    mine = machine_id()
    return bool(mine and host.machine and host.machine != mine)


def machine_id() -> str:
    """That of the system, or empty."""
    with contextlib.suppress(OSError):
        return MACHINE_ID.read_text(encoding="ascii", errors="replace").strip()[:64]
    return ""
