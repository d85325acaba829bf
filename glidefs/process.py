"""What a daemon settles with the system: its log lines, its directories, its locks, its limits, systemd."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import resource
import socket
import sys
import threading
import time
from pathlib import Path

from glidefs.errors import CacheBusy, ConfigError

LOCK_FILE = "daemon.lock"
REPEAT_SECONDS = 60.0
REPEATS = 5
MAX_KINDS = 1024

log = logging.getLogger(__name__)


class RepeatFilter(logging.Filter):
    """Lets a message through a few times a minute; then says once how many were held back.

    Messages are told apart by their format, not their arguments: a retry loop that counts up in its
    text is one message. `_lock` guards the table.
    """

    def __init__(self, repeats: int = REPEATS, seconds: float = REPEAT_SECONDS) -> None:
        super().__init__()
        self._repeats = repeats
        self._seconds = seconds
        self._lock = threading.Lock()
        self._seen: dict[tuple[str, int, str], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is printed; it may get a suffix."""
        key = (record.name, record.levelno, str(record.msg))
        now = time.monotonic()
        with self._lock:
            since, count = self._seen.get(key, (now, 0))
            held = count - self._repeats
            if now - since >= self._seconds:
                since, count = now, 0
                if held > 0:
                    record.msg = f"{record.msg} (and {held} more of these before)"
            if len(self._seen) >= MAX_KINDS and key not in self._seen:
                self._seen.clear()
            self._seen[key] = (since, count + 1)
        return count < self._repeats


class _LineFormatter(logging.Formatter):
    """One line per message: what came from a guest or a store cannot forge another line."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.exc_info or record.stack_info:
            return text
        return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def setup_logging(level: str) -> None:
    """Log to stderr: with times on a terminal or in a file, without under journald, which has its own."""
    handler = logging.StreamHandler(sys.stderr)
    journal = bool(os.environ.get("JOURNAL_STREAM"))
    form = "%(levelname)s %(name)s: %(message)s"
    handler.setFormatter(_LineFormatter(form if journal else f"%(asctime)s {form}"))
    handler.addFilter(RepeatFilter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # Below WARNING these print requests, with signatures and headers.
    for name in ("boto3", "botocore", "urllib3", "s3transfer", "asyncio", "uvicorn"):
        logging.getLogger(name).setLevel(logging.WARNING)


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

    def release(self) -> None:
        """Give the lock back."""
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, 0)
            os.close(self._fd)
            self._fd = -1


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
