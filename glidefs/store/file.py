"""A directory as an object store: one plain file per object.

Writes go to ``.tmp`` and are renamed (or, for If-None-Match, linked) into place after an fsync, and
the directories are fsynced after that: an object is there whole or not at all, after any crash. Large ones
are written past the page cache: a copy in new pages costs more than all else that a put does.

**ETags and conditional puts.** An ETag is mtime, inode and size of the file. The mtime is not left to
the kernel, whose clock ticks in milliseconds: it is set before the fsync, and under the key's lock
made later than that of the file it replaces. So each overwrite has a new ETag even for equal
content, and the ETag a stale owner remembers does not come back (no ABA), while objects remain
plain files that ``cp`` and ``rsync`` understand. Locks are ``flock`` on a fixed set of files in
``.locks``, by hash of the key: right across processes and threads (each call opens its own), gone
with a dead process, and there is no lock file to clean up. flock on a network file system is only
as good as that file system; the probe of :mod:`glidefs.store.probe` does not see that.

A root that is not there (an unmounted disk) must not read as a store without objects. A directory that is
there may be the place where the disk is mounted: :mod:`glidefs.store.which` sees that the id is not in it,
and a root that changed under a process takes no write.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import mmap
import os
import secrets
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from stat import S_ISREG

from glidefs.errors import (
    AccessDenied,
    ConfigError,
    CorruptObject,
    NotFound,
    PreconditionFailed,
    StoreError,
    StoreUnavailable,
)
from glidefs.formats.atomic import fsync_dir, write_all
from glidefs.store.base import (
    LIST_PAGE,
    Body,
    Keys,
    ListPage,
    Object,
    ObjectInfo,
    ObjectStore,
    Source,
    body_length,
    buffers,
    check_condition,
    check_key,
    check_list_prefix,
    check_range,
)

_LOCKS = ".locks"
_TMP = ".tmp"
_LARGE = 1 << 20
_LOCK_COUNT = 256
_STALE_TMP = 24 * 3600
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)
_FULL = (errno.ENOSPC, errno.EDQUOT)
_SECOND = 1_000_000_000


def _write(fd: int, views: list[memoryview]) -> None:
    """Write a new file, a large first buffer past the page cache where file system and memory allow it."""
    for number, view in enumerate(views):
        if not number and view.nbytes >= _LARGE:
            view = view[_write_pages(fd, view) :]
        write_all(fd, view)


def _write_pages(fd: int, view: memoryview) -> int:
    """Write the whole pages of ``view`` at the start of a file, without the page cache; how many bytes.

    Fewer, and none, where O_DIRECT is refused: by the file system, or for a buffer that is not at the
    beginning of a page. The rest is for :func:`write_all`.
    """
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    whole = view.nbytes - view.nbytes % mmap.PAGESIZE
    done = 0
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT)
        while done < whole:
            done += os.write(fd, view[done:whole])
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags)
    return done


def _etag(stat: os.stat_result) -> str:
    return f'"{stat.st_mtime_ns:x}-{stat.st_ino:x}-{stat.st_size:x}"'


class FileStore(ObjectStore):
    """Objects as files below ``root``, which is made only with ``create``: a disk may be mounted there."""

    def __init__(self, root: str | os.PathLike[str], *, create: bool = False) -> None:
        self._root = Path(root).absolute()
        self.url = self._root.as_uri()
        self._settled: tuple[int, int] | None = None
        try:
            if create:
                self._root.mkdir(parents=True, exist_ok=True)
            elif self._root.exists() and not self._root.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        except OSError as error:
            raise ConfigError(f"{self._root}: cannot be used as a store: {error.strerror}") from error
        if self._root.is_dir():
            self.settle_on()
        self._remove_stale()

    def check_there(self) -> None:
        if not self._root.is_dir():
            raise ConfigError(
                f"{self._root}: the store's directory is not there; mount its disk, or make a new store with "
                "'glidefs run --init-store'"
            )

    def settle_on(self) -> None:
        self._settled = self._location()

    def _location(self) -> tuple[int, int]:
        """Device and inode of the root: others where another file system is mounted, or none any more."""
        try:
            found = os.stat(self._root)
        except OSError as error:
            raise self._error(error, "", "stat") from error
        return found.st_dev, found.st_ino

    def _is_ours(self) -> bool:
        """Whether the root is there, and the one that was settled on."""
        return self._root.is_dir() and self._settled in (None, self._location())

    def _prepare(self, key: str, op: str) -> None:
        """Before a write: the root is the one that was settled on, and has its own directories."""
        if not self._is_ours():
            raise StoreUnavailable(
                f"{self._root} is gone or another directory; is it mounted?", key=key, op=op
            )
        try:
            for name in (_LOCKS, _TMP):
                (self._root / name).mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise self._error(error, key, op) from error

    def _remove_stale(self) -> None:
        """Unlink what writers that died left behind."""
        oldest = time.time() - _STALE_TMP
        with contextlib.suppress(OSError), os.scandir(self._root / _TMP) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    if entry.stat(follow_symlinks=False).st_mtime < oldest:
                        os.unlink(entry.path)

    def _path(self, key: str, op: str) -> Path:
        check_key(key, op)
        if key.split("/", 1)[0] in (_LOCKS, _TMP):
            raise StoreError("not a legal key", key=repr(key), op=op)
        return self._root / key

    def _error(self, error: OSError, key: str, op: str) -> StoreError:
        """What an OSError means for the caller."""
        if error.errno in _ABSENT and self._is_ours():
            return NotFound(key=key, op=op)
        if error.errno in _ABSENT:
            return StoreUnavailable(f"{self._root} is not there; is it mounted?", key=key, op=op)
        if error.errno in _DENIED:
            return AccessDenied(f"{error.strerror} in {self._root}", key=key, op=op)
        if error.errno in _FULL:
            why = f"no space left in {self._root}; free some, writers wait until then"
            return StoreUnavailable(why, key=key, op=op)
        if error.errno in (errno.ENAMETOOLONG, errno.EINVAL):
            return StoreError(error.strerror or "refused", key=key, op=op)
        return StoreUnavailable(f"{error.strerror} in {self._root}", key=key, op=op)

    @contextlib.contextmanager
    def _opened(self, key: str, op: str) -> Iterator[tuple[int, os.stat_result]]:
        path = self._path(key, op)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                stat = os.fstat(fd)
                if not S_ISREG(stat.st_mode):
                    raise NotFound(key=key, op=op)
                yield fd, stat
            finally:
                os.close(fd)
        except OSError as error:
            raise self._error(error, key, op) from error

    def _read(self, fd: int, key: str, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes. Files never shrink here: one that is shorter was damaged."""
        data = os.pread(fd, length, offset)
        if len(data) == length:
            return data
        parts = [data]
        done = len(data)
        while done < length:
            data = os.pread(fd, length - done, offset + done)
            if not data:
                raise CorruptObject(key, offset + done, "the object ends before the range that was asked for")
            parts.append(data)
            done += len(data)
        return b"".join(parts)

    def get(self, key: str) -> Object:
        with self._opened(key, "get") as (fd, stat):
            return Object(self._read(fd, key, 0, stat.st_size), _etag(stat))

    def get_range(self, key: str, offset: int, length: int, into: memoryview | None = None) -> bytes:
        check_range(key, offset, length)
        with self._opened(key, "get_range") as (fd, stat):
            if offset + length > stat.st_size:
                raise CorruptObject(key, stat.st_size, "the object ends before the range that was asked for")
            return self._read(fd, key, offset, length)

    def source(self, key: str) -> Source | None:
        check_key(key)
        return Source(os.fsencode(f"{self._root}/{key}"))

    def get_suffix(self, key: str, length: int) -> tuple[bytes, int]:
        check_range(key, 0, length)
        with self._opened(key, "get_suffix") as (fd, stat):
            size = stat.st_size
            length = min(length, size)
            return self._read(fd, key, size - length, length), size

    def head(self, key: str) -> ObjectInfo:
        with self._opened(key, "head") as (_, stat):
            return ObjectInfo(key, stat.st_size, _etag(stat), stat.st_mtime)

    @contextlib.contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        """Exclude every other change of the key, by any process."""
        slot = hashlib.blake2b(key.encode(), digest_size=2).digest()
        path = self._root / _LOCKS / f"{int.from_bytes(slot) % _LOCK_COUNT:02x}"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def _make_dirs(self, directory: Path) -> None:
        """Create ``directory`` below the root, durably; never the root itself."""
        missing = []
        while directory != self._root and not directory.is_dir():
            missing.append(directory)
            directory = directory.parent
        for path in reversed(missing):
            with contextlib.suppress(FileExistsError):
                path.mkdir()
            try:
                fsync_dir(path.parent)
            except OSError:
                with contextlib.suppress(OSError):
                    path.rmdir()  # one that is there counts as durable the next time
                raise

    def _place(self, fd: int, tmp: Path, path: Path, if_match: str | None, if_none_match: bool) -> str:
        """Under the key's lock: check the condition, date the new file and give it its name."""
        try:
            old = os.stat(path, follow_symlinks=False)
        except FileNotFoundError:
            old = None
        if (if_none_match and old) or (if_match is not None and (old is None or _etag(old) != if_match)):
            raise PreconditionFailed(key=str(path.relative_to(self._root)), op="put")
        if old is not None:
            # One nanosecond is later; a file system with grains of up to two seconds needs those.
            for step in (1, 2 * _SECOND):
                if os.fstat(fd).st_mtime_ns <= old.st_mtime_ns:
                    os.utime(fd, ns=(old.st_mtime_ns + step, old.st_mtime_ns + step))
                    os.fsync(fd)
        etag = _etag(os.fstat(fd))
        if if_none_match:
            os.link(tmp, path)
            os.unlink(tmp)
        else:
            os.rename(tmp, path)
        return etag

    def put(self, key: str, data: Body, *, if_match: str | None = None, if_none_match: bool = False) -> str:
        check_condition(key, if_match, if_none_match)
        path = self._path(key, "put")
        self._prepare(key, "put")
        tmp = self._root / _TMP / f"{os.getpid()}.{secrets.token_hex(8)}"
        try:
            fd = os.open(tmp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                _write(fd, buffers(data))
                now = time.time_ns()
                os.utime(fd, ns=(now, now))
                os.fsync(fd)
                if body_length(data) >= _LARGE:
                    # A pack is seldom read soon on the host that made it: its blocks are in log and cache.
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                return self._commit(fd, tmp, key, path, if_match, if_none_match)
            finally:
                os.close(fd)
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(tmp)
        except FileExistsError as error:
            raise PreconditionFailed(key=key, op="put") from error
        except OSError as error:
            classified = self._error(error, key, "put")
            if isinstance(classified, NotFound):
                # Not "no such object" for a put: a part of the key's path is an object itself.
                classified = StoreError("a part of the key is an object", key=key, op="put")
            raise classified from error

    def _commit(
        self, fd: int, tmp: Path, key: str, path: Path, if_match: str | None, if_none_match: bool
    ) -> str:
        for attempt in range(100):
            try:
                self._make_dirs(path.parent)
                with self._locked(key):
                    etag = self._place(fd, tmp, path, if_match, if_none_match)
                fsync_dir(path.parent)
                return etag
            except FileNotFoundError:
                # A delete removed the directory it had emptied, between our mkdir and rename.
                if attempt == 99 or not tmp.exists():
                    raise
        raise AssertionError("unreachable")

    def delete(self, key: str) -> None:
        path = self._path(key, "delete")
        self._prepare(key, "delete")
        try:
            with self._locked(key):
                os.unlink(path)
            fsync_dir(path.parent)
            self._remove_empty(path.parent)
        except OSError as error:
            classified = self._error(error, key, "delete")
            if not isinstance(classified, NotFound):
                raise classified from error

    def _remove_empty(self, directory: Path) -> None:
        """Directories exist only for their objects; a listing must not show one without any."""
        while directory != self._root:
            try:
                directory.rmdir()
            except OSError:
                return
            directory = directory.parent

    def _walk(self, directory: Path, below: str, prefix: str, start_after: str) -> Iterator[ObjectInfo]:
        """Objects in ``directory``, whose keys begin with ``below``, in key order."""
        try:
            with os.scandir(directory) as entries:
                found = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
        except (FileNotFoundError, NotADirectoryError):
            return
        # "a/x" sorts behind "a-b" and before "a0": a directory sorts as its name with the slash.
        for name, is_dir in sorted((f"{name}/" if is_dir else name, is_dir) for name, is_dir in found):
            key = below + name
            if not below and name.rstrip("/") in (_LOCKS, _TMP):
                continue
            if is_dir:
                if key.startswith(prefix) or prefix.startswith(key):
                    if key <= start_after and not start_after.startswith(key):
                        continue
                    yield from self._walk(directory / name, key, prefix, start_after)
            elif key.startswith(prefix) and key > start_after:
                try:
                    stat = os.stat(directory / name, follow_symlinks=False)
                except FileNotFoundError:
                    continue
                yield ObjectInfo(key, stat.st_size, _etag(stat), stat.st_mtime)

    def list_page(self, prefix: str, token: str = "") -> ListPage:
        check_list_prefix(prefix)
        below = prefix.rpartition("/")[0]
        start = f"{below}/" if below else ""
        try:
            if not self._is_ours():
                raise FileNotFoundError(errno.ENOENT, "no store")
            walk = self._walk(self._root / below, start, prefix, token)
            infos = tuple(islice(walk, LIST_PAGE))
        except OSError as error:
            raise self._error(error, prefix, "list") from error
        return ListPage(infos, infos[-1].key if len(infos) == LIST_PAGE else "")

    def list_dirs(self, prefix: str) -> Keys:
        check_list_prefix(prefix, "list_dirs")
        try:
            with os.scandir(self._root / prefix) as entries:
                names = sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
        except OSError as error:
            classified = self._error(error, prefix, "list_dirs")
            if isinstance(classified, NotFound):
                return []
            raise classified from error
        found = [f"{prefix}{name}/" for name in names if prefix or name not in (_LOCKS, _TMP)]
        return [path for path in found if any(True for _ in self._walk(self._root / path, path, path, ""))]
