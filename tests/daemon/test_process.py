"""Locks, log lines, systemd: what a daemon settles with the system."""

from __future__ import annotations

import logging
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from glidefs.daemon import log_lines, process
from glidefs.errors import CacheBusy, ConfigError


def test_second_lock_names_the_holder(tmp_path: Path) -> None:
    first = process.DirectoryLock(tmp_path)
    first.acquire()
    with pytest.raises(CacheBusy, match=f"process {os.getpid()}"):
        process.DirectoryLock(tmp_path).acquire()
    first.release()
    second = process.DirectoryLock(tmp_path)
    second.acquire()
    second.release()


def test_stale_pid_in_the_lock_file_is_no_lock(tmp_path: Path) -> None:
    (tmp_path / process.LOCK_FILE).write_text("1\n")
    lock = process.DirectoryLock(tmp_path)
    lock.acquire()
    lock.release()


def test_directories(tmp_path: Path) -> None:
    made = tmp_path / "a" / "b"
    process.make_directory("dir", made)
    assert stat.S_IMODE(made.stat().st_mode) == 0o700
    assert list(made.iterdir()) == []
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ConfigError, match=r"\[cache\] dir .*file: it is not a directory"):
        process.make_directory("dir", file)
    with pytest.raises(ConfigError, match=r"\[cache\] log_dir"):
        process.make_directory("log_dir", Path("/proc/glidefs"))


def record(message: str, *args: object) -> logging.LogRecord:
    return logging.LogRecord("x", logging.WARNING, "f", 1, message, args, None)


def test_repeats_are_held_back_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(log_lines.time, "monotonic", lambda: now)
    limit = log_lines.RepeatFilter(repeats=3, seconds=60)
    passed = [limit.filter(record("attempt %d failed", n)) for n in range(10)]
    assert passed == [True] * 3 + [False] * 7
    assert limit.filter(record("something else"))
    now = 161.0
    later = record("attempt %d failed", 11)
    assert limit.filter(later)
    assert "7 more" in later.getMessage()


def test_log_lines_cannot_be_forged(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    try:
        log_lines.setup_logging("info")
        logging.getLogger("x").warning("client said %s", "hello\nCRITICAL root: all is lost\x1b[2J")
    finally:
        root.handlers[:], root.level = before, level
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    assert "\x1b" not in text


def test_notify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not process.notify("READY=1")
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(path)
        monkeypatch.setenv("NOTIFY_SOCKET", path)
        assert process.notify("READY=1", "STATUS=x")
        assert manager.recv(100) == b"READY=1\nSTATUS=x"
    assert not process.notify("READY=1")


def test_guests_do_not_wait_for_the_api_s_imports() -> None:
    """They take as long as the rest of a start."""
    code = "import sys, glidefs.daemon.run; sys.exit('starlette' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_who_hands_over_gives_its_copy_of_the_lock_up(tmp_path: Path) -> None:
    """Once the other process ends the directory is free, whether this one has ended or not."""
    before, after = process.DirectoryLock(tmp_path), process.DirectoryLock(tmp_path)
    before.acquire()
    held = os.dup(before.fileno())
    status = os.fstat(held)
    after.acquire({(status.st_ino, status.st_dev): held})
    before.leave()
    with pytest.raises(CacheBusy):
        process.DirectoryLock(tmp_path).acquire()
    after.release()
    again = process.DirectoryLock(tmp_path)
    again.acquire()
    before.release()  # which has none any more
    with pytest.raises(CacheBusy):
        process.DirectoryLock(tmp_path).acquire()
    again.release()
