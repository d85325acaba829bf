"""What a command prints: exactly one JSON document with --json, else lines and tables for people."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from glidefs.errors import GlideError

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
Update = Callable[[float, float], None]
"""Called with bytes done and bytes in all, 0 where nobody knows."""
Count = Callable[[str, int, int], None]
"""Called with what is being done, how many are done, and how many there are (0: not known)."""


def size_text(size: float) -> str:
    """10737418240 -> "10GiB", 1500 -> "1.5KiB"."""
    value = float(size)
    for unit in _UNITS:
        if value < 1024 or unit == _UNITS[-1]:
            return f"{value:.1f}".rstrip("0").rstrip(".") + unit
        value /= 1024
    raise AssertionError("unreachable")


def emit(value: Any) -> None:
    """The one JSON document."""
    sys.stdout.write(json.dumps(value, indent=2 if sys.stdout.isatty() else None) + "\n")
    sys.stdout.flush()


def say(text: str) -> None:
    """A line for people, on stderr: stdout is for results."""
    sys.stderr.write(printable(text) + "\n")  # in one piece: threads do this


def printable(text: str) -> str:
    """Text from elsewhere, with control characters shown and not sent to the terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def fail(error: Exception, as_json: bool, code: int = 1) -> NoReturn:
    """End the command: one line of reason on stderr, what to do about it, and the JSON document."""
    reason, hint = split_reason(error)
    if as_json:
        emit({"error": reason, "hint": hint})
    print(f"glidefs: {printable(reason)}" + (f"; {printable(hint)}" if hint else ""), file=sys.stderr)
    raise SystemExit(code)


def split_reason(error: Exception) -> tuple[str, str]:
    """What went wrong, and what to do about it (may be empty)."""
    hint = getattr(error, "hint", "")
    if isinstance(error, GlideError):
        reason = " ".join(str(error).split())
        if not hint:
            reason, _, hint = reason.partition("; ")
        return reason, hint
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}", hint
    return f"{type(error).__name__}: {error}", "this is a bug; run with GLIDEFS_TRACEBACK=1 and report it"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> None:
    """A table: aligned on a terminal, tab-separated otherwise. `right` are columns of numbers."""
    cells = [[printable(cell) for cell in row] for row in rows]
    if not sys.stdout.isatty():
        for row in (columns, *cells):
            print("\t".join(row))
        return
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    bold, plain = ("", "") if os.environ.get("NO_COLOR") else ("\033[1m", "\033[0m")
    print(f"{bold}{_aligned(columns, widths, right)}{plain}")
    for row in cells:
        print(_aligned(row, widths, right))


def fresh_page() -> None:
    """Begin at the top of an empty terminal; elsewhere with an empty line."""
    print("\033[H\033[J" if sys.stdout.isatty() else "", end="" if sys.stdout.isatty() else "\n", flush=True)


def _aligned(row: Sequence[str], widths: Sequence[int], right: Sequence[int]) -> str:
    cells = [
        cell.rjust(width) if index in right else cell.ljust(width)
        for index, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    return "  ".join(cells).rstrip()


def fields(values: dict[str, Any], indent: str = "") -> None:
    """One `key  value` line per entry; nested dictionaries are indented."""
    width = max((len(key) for key in values), default=0)
    for key, value in values.items():
        if isinstance(value, dict):
            print(f"{indent}{key}:")
            fields(value, indent + "  ")
        else:
            print(f"{indent}{key:<{width}}  {printable(_shown(key, value))}")


def _shown(key: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and (key == "size" or key.endswith("bytes")) and value >= 1024:
        return f"{size_text(value)} ({value})"
    return str(value)


def time_text(when: float) -> str:
    """1764091565 -> "2025-11-25T17:26:05Z" (RFC 3339)."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(when))


@contextmanager
def progress(title: str) -> Iterator[Update]:
    """A progress bar on stderr if that is a terminal; else nothing."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(True), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total or None)


@contextmanager
def counting(title: str) -> Iterator[Count]:
    """What is being done and how far, on stderr if that is a terminal; else nothing."""
    if not sys.stderr.isatty():
        yield lambda what, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)

        def update(what: str, done: int, total: int) -> None:
            bar.update(task, description=f"{title}: {what}", completed=done, total=total or None)

        yield update


@contextmanager
def watching(title: str, poll: Callable[[], float], every: float = 0.5) -> Iterator[None]:
    """While the body runs, show how far `poll()` (bytes that are left) has come down. Terminal only."""
    if not sys.stderr.isatty():
        yield
        return
    done = threading.Event()
    with progress(title) as update:
        thread = threading.Thread(target=_watch, args=(poll, update, done, every), daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


def _watch(poll: Callable[[], float], update: Update, done: threading.Event, every: float) -> None:
    most = 0.0
    while not done.wait(every):
        try:
            left = poll()
        except (GlideError, OSError):
            continue
        most = max(most, left)
        update(most - left, most)
