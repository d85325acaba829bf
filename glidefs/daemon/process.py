"""The daemon and the system: directories, locks, resource limits, systemd."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import resource
import socket
import sys
from pathlib import Path
from typing import NoReturn

from glidefs.errors import CacheBusy, ConfigError

LOCK_FILE = "daemon.lock"

log = logging.getLogger(__name__)


def end(code: int) -> NoReturn:
    """End the process at once, when all is closed: Python would free its memory piece by piece first."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def make_directory(key: str, path: Path, section: str = "cache") -> None:
    """Create a directory of ours (mode 0700) and see that files can be made in it. Raises ConfigError."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        probe = path / f".write-test.{os.getpid()}"
        fd = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        os.close(fd)
        os.unlink(probe)
    except OSError as error:
        why = "it is not a directory" if isinstance(error, FileExistsError) else error.strerror
        raise ConfigError(
            f"[{section}] {key} {path}: {why}; give the daemon's user a directory that it can write"
        ) from error


class DirectoryLock:
    """One daemon per directory: an flock that the kernel drops when the process dies."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / LOCK_FILE
        self._fd = -1

    def acquire(self, inherited: dict[tuple[int, int], int] | None = None) -> None:
        """Take the lock. Raises CacheBusy naming the process that has it.

        `inherited`: descriptors that hold locks, by inode and device; the one of this directory is taken out.
        """
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        status = os.fstat(fd)
        held = (inherited or {}).pop((status.st_ino, status.st_dev), None)
        if held is not None:
            os.close(fd)
            self._fd = held
            return
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            text = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
            os.close(fd)
            if not isinstance(error, BlockingIOError):
                raise ConfigError(f"{self.path}: cannot lock: {error.strerror}; use a local disk") from error
            raise CacheBusy(str(self.path.parent), int(text) if text.isdecimal() else None) from None
        self._fd = fd
        self.sign()

    def fileno(self) -> int:
        """The descriptor that holds the lock: a duplicate holds it too."""
        return self._fd

    def sign(self) -> None:
        """Write this process's number into the file."""
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    def leave(self) -> None:
        """Another process has it, by a duplicate: it must not need this one's end to give it back."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def release(self) -> None:
        """Give the lock back."""
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, 0)
            self.leave()


def raise_file_limit() -> int:
    """RLIMIT_NOFILE up to the hard limit; returns what it is now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError) as error:
            log.warning("cannot raise the limit of open files from %d: %s", soft, error)
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def notify(*lines: str) -> bool:
    """Tell the service manager; False when there is none. Source: sd_notify(3)."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address or address[0] not in "/@":
        return False
    if address[0] == "@":
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
            channel.connect(address)
            channel.sendall("\n".join(lines).encode())
    except OSError as error:
        log.warning("cannot notify the service manager: %s", error)
        return False
    return True
