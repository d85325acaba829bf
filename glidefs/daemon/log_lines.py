"""The lines of the log: text or JSON, with priorities for the journal, repetitions held back."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from typing import Literal, TextIO

REPEAT_SECONDS = 60.0
REPEATS = 5
MAX_KINDS = 1024

LogFormat = Literal["text", "json"]
_PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
"""Of the journal, as syslog has them; below the last one: 7."""


class RepeatFilter(logging.Filter):
    """Lets a message through a few times a minute; then says once how many were held back.

    Messages are told apart by their format, not their arguments: a retry loop that counts up in its
    text is one message. Events (:mod:`glidefs.events`) all pass. `_lock` guards the table.
    """

    def __init__(self, repeats: int = REPEATS, seconds: float = REPEAT_SECONDS) -> None:
        super().__init__()
        self._repeats = repeats
        self._seconds = seconds
        self._lock = threading.Lock()
        self._seen: dict[tuple[str, int, str], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is printed; it may get a suffix."""
        if hasattr(record, "event"):
            return True
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


class _TextFormatter(logging.Formatter):
    """One line per message: what came from a guest or a store cannot forge another line."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.exc_info or record.stack_info:
            return text
        return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


class _JsonFormatter(logging.Formatter):
    """One JSON object per message: time (unix seconds), level, logger, message, the fields of an event."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "event", {}),
        }
        if record.exc_info:
            fields["trace"] = self.formatException(record.exc_info)
        return json.dumps(fields)


class _JournalHandler(logging.StreamHandler[TextIO]):
    """Puts a priority before each line, which the journal takes off again. Source: sd-daemon(3)."""

    def format(self, record: logging.LogRecord) -> str:
        levels = (priority for level, priority in _PRIORITIES if record.levelno >= level)
        mark = f"<{next(levels, 7)}>"
        return "\n".join(mark + line for line in super().format(record).split("\n"))


def _is_journal(stream: TextIO) -> bool:
    """Whether a stream goes to the journal. Source: systemd.exec(5), JOURNAL_STREAM."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def setup_logging(level: str, form: LogFormat = "text") -> None:
    """Log to stderr: with times on a terminal or in a file, with priorities into the journal."""
    journal = _is_journal(sys.stderr)
    handler = (_JournalHandler if journal else logging.StreamHandler)(sys.stderr)
    line = "%(levelname)s %(name)s: %(message)s"
    text = _TextFormatter(line if journal else f"%(asctime)s {line}")
    handler.setFormatter(_JsonFormatter() if form == "json" else text)
    handler.addFilter(RepeatFilter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # Below WARNING these print requests, with signatures and headers.
    for name in ("boto3", "botocore", "urllib3", "s3transfer", "asyncio", "uvicorn"):
        logging.getLogger(name).setLevel(logging.WARNING)
