"""`glidefs top`: exports by what they do now, again and again, or one frame of it."""

from __future__ import annotations

import os
import re
import select
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from glidefs.api.client import CommandError
from glidefs.cli import output
from glidefs.cli.common import connect, reported
from glidefs.errors import ConfigError

LIVE = "/v1/live"
PLAIN_WIDTH = 160
"""Columns of a frame that goes to no terminal."""
WRONG = 5
"""Lines about what is wrong; the dashboard has all of them."""
LEAST_INTERVAL = 0.5

Export = dict[str, Any]


def _worst(e: Export) -> float:
    return max(e["read_p99_seconds"] or 0.0, e["write_p99_seconds"] or 0.0)


SORTS: dict[str, Callable[[Export], float]] = {
    "iops": lambda e: float(e["read_iops"] + e["write_iops"]),
    "mibs": lambda e: float(e["read_bytes_per_second"] + e["write_bytes_per_second"]),
    "latency": _worst,
    "dirty": lambda e: float(e["dirty_bytes"]),
}
"""Columns to sort by, the largest first."""


def top_command(
    sort: str, count: int | None, interval: float, once: bool, config: str | None, as_json: bool
) -> None:
    """Show exports until q is pressed; one frame with ``once``, or where there is no terminal."""
    with reported(as_json):
        if sort not in SORTS:
            raise ConfigError(f"--sort {sort[:40]!r} is not possible; choose of {', '.join(SORTS)}")
        if interval < LEAST_INTERVAL:
            raise ConfigError(
                f"--interval {interval:g} is too short; give {LEAST_INTERVAL:g} seconds or more"
            )
        client = connect(config)

        def ask() -> dict[str, Any]:
            found: dict[str, Any] = client.call("GET", LIVE)
            return found

        screen = Screen(sort, count)
        if as_json:
            live = ask()
            output.emit({**live, "exports": screen.chosen(live)})
        elif once or not (sys.stdin.isatty() and sys.stdout.isatty()):
            console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False)
            console.print(screen.frame(ask(), console.width))
        else:
            try:
                _watch(screen, ask, interval)
            except KeyboardInterrupt:
                return


def _watch(screen: Screen, ask: Callable[[], dict[str, Any]], interval: float) -> None:
    console = Console(highlight=False)
    live: dict[str, Any] | None = None
    with _keys() as next_key, Live(console=console, screen=True, auto_refresh=False) as shown:
        while True:
            try:
                live, screen.trouble = ask(), ""
            except CommandError as error:  # a restart or a handoff: it is asked again
                screen.trouble = f"{error.reason}; {error.hint}"
            until = time.monotonic() + interval
            while True:
                shown.update(screen.frame(live, *console.size), refresh=True)
                key = next_key(until - time.monotonic())
                if key == "q":
                    return
                if not key:
                    break
                screen.press(key)


class Screen:
    """What is shown, and from where on. ``count``: exports at most; None: as many as there is room for."""

    def __init__(self, sort: str, count: int | None) -> None:
        self.sort = sort
        self.trouble = ""
        self._count = count
        self._first = 0
        self._page = 1
        self._all = 0

    def press(self, key: str) -> None:
        """s and the arrows to the sides change the sort, the others move."""
        names = list(SORTS)
        moves = {"up": -1, "down": 1, "pageup": -self._page, "pagedown": self._page}
        if key in ("s", "right", "left"):
            step = -1 if key == "left" else 1
            self.sort = names[(names.index(self.sort) + step) % len(names)]
            self._first = 0
        elif key in moves:
            self._first = max(0, min(self._first + moves[key], self._all - self._page))

    def chosen(self, live: dict[str, Any]) -> list[Export]:
        """The exports to show, sorted; those that do the same by name."""
        exports = sorted(live["exports"], key=lambda e: (-SORTS[self.sort](e), e["name"]))
        return exports if self._count is None else exports[: self._count]

    def frame(self, live: dict[str, Any] | None, width: int, height: int | None = None) -> Group:
        """One frame. With a ``height`` the table has what is left of it, and the last line names the keys."""
        if live is None:
            return Group(Text(self.trouble, style="red"))
        lines = [*_head(live), *_wrong(live["wrong"])]
        if self.trouble:
            lines.append(Text(output.printable(self.trouble), style="red"))
        exports = self.chosen(live)
        self._all = len(exports)
        if height is None:
            return Group(*lines, Text(), _table(exports, self.sort, width))
        self._page = max(1, height - len(lines) - 3)
        self._first = max(0, min(self._first, self._all - self._page))
        shown = exports[self._first : self._first + self._page]
        return Group(*(_cut(line) for line in lines), _table(shown, self.sort, width), self._foot(len(shown)))

    def _foot(self, shown: int) -> Text:
        where = f"{self._first + 1}-{self._first + shown} of {self._all}" if shown else "no exports"
        return _cut(Text(f"{where}   ↑ ↓ move   s or ← → sort by another column   q ends", style="dim"))


def _cut(line: Text) -> Text:
    line.no_wrap, line.overflow = True, "ellipsis"
    return line


def _head(live: dict[str, Any]) -> Iterator[Text]:
    host, store, log, cache, totals = (live[key] for key in ("host", "store", "log", "cache", "totals"))
    states = ", ".join(f"{count} {state}" for state, count in sorted(live["states"].items()))
    style = "bold green" if host["status"] == "ok" else "bold yellow"
    yield Text.assemble(
        ("GlideFS ", "bold"),
        output.printable(host["node"]),
        "  ",
        (host["status"], style),
        f"  {output.time_text(host['time'])}  version {host['version']}  exports: {states or 'none'}",
    )
    yield Text(
        f"guests  {_number(totals['read_iops'] + totals['write_iops'])} IOPS, "
        f"read {_mibs(totals['read_bytes_per_second'])}, "
        f"write {_mibs(totals['write_bytes_per_second'])} MiB/s, "
        f"{totals['waiting_requests']} requests wait"
    )
    part = log["dirty_bytes"] / log["limit_bytes"] if log["limit_bytes"] else 0.0
    yield Text(
        f"log     {output.size_text(log['dirty_bytes'])} not uploaded ({part:.1%} of "
        f"{output.size_text(log['limit_bytes'])}), oldest {_age(totals['oldest_dirty_seconds'])}, "
        f"upload {_mibs(totals['upload_bytes_per_second'])} MiB/s"
    )
    used = cache["blocks"] / cache["limit_blocks"] if cache["limit_blocks"] else 0.0
    up = "up" if store["state"] == "up" else f"away for {_age(store['down_seconds'])}"
    latency = f", {_latency(store['latency_seconds'])} a request" if store["latency_seconds"] else ""
    yield Text(
        f"store   {up}{latency}, in {_mibs(store['received_bytes_per_second'])}, "
        f"out {_mibs(store['sent_bytes_per_second'])} MiB/s   cache {used:.1%} full"
    )


def _wrong(wrong: Sequence[dict[str, Any]]) -> Iterator[Text]:
    for one in wrong[:WRONG]:
        what = f"{one['export']}: {one['what']}" if one["export"] else one["what"]
        style = "bold red" if one["severity"] == "error" else "bold yellow"
        yield Text.assemble((f"! {output.printable(what)}", style), f" -> {output.printable(one['todo'])}")
    if len(wrong) > WRONG:
        yield Text(f"! {len(wrong) - WRONG} more; see 'glidefs list'")


_COLUMNS: tuple[tuple[str, str, Callable[[Export], str]], ...] = (
    ("NAME", "", lambda e: str(e["name"])),
    ("STATE", "", lambda e: str(e["state"])),
    ("IOPS", "iops", lambda e: _number(SORTS["iops"](e))),
    ("MIB/S", "mibs", lambda e: _mibs(SORTS["mibs"](e))),
    ("READ", "", lambda e: _latency(e["read_mean_seconds"])),
    ("WRITE", "", lambda e: _latency(e["write_mean_seconds"])),
    ("P99", "latency", lambda e: _latency(_worst(e))),
    ("LOG", "", lambda e: _percent(e["log_hit_ratio"])),
    ("CACHE", "", lambda e: _percent(e["cache_hit_ratio"])),
    ("DIRTY", "dirty", lambda e: output.size_text(e["dirty_bytes"]) if e["dirty_bytes"] else "-"),
    ("AGE", "", lambda e: _age(e["oldest_dirty_seconds"])),
    ("UPLOAD", "", lambda e: _mibs(e["upload_bytes_per_second"])),
    ("WAIT", "", lambda e: str(e["waiting_requests"])),
    ("TROUBLE", "", lambda e: str(e["trouble"])),
)
"""Title, the sort that it belongs to, and the text. READ and WRITE are mean latencies."""
_WORDS = ("NAME", "STATE", "TROUBLE")


_OPTIONAL = ("CACHE", "LOG", "WRITE", "READ", "UPLOAD", "AGE", "STATE")
"""Left out where the terminal is narrow, the first of them first. What is wrong may be cut in any case."""
_GAP = "  "


def _table(exports: Sequence[Export], sort: str, width: int) -> Group:
    """The heading and a line for each export, none wider than ``width``."""
    columns: dict[str, list[str]] = {}
    for title, key, text in _COLUMNS:
        cells = [output.printable(text(export)).replace("\n", " ") for export in exports]
        columns[title] = [f"{title}*" if key == sort else title, *cells]
    widths = {title: max(map(len, cells)) for title, cells in columns.items() if title != "TROUBLE"}
    for title in _OPTIONAL:
        if sum(widths.values()) + len(_GAP) * len(widths) <= width:
            break
        del widths[title], columns[title]
    lines = []
    for at in range(len(exports) + 1):
        cells = [
            cells[at] if title == "TROUBLE" else _justified(cells[at], title, widths[title])
            for title, cells in columns.items()
        ]
        bad = at > 0 and exports[at - 1]["state"] in ("failed", "fenced")
        style = "bold" if at == 0 else "red" if bad else ""
        lines.append(_cut(Text(_GAP.join(cells).rstrip(), style=style)))
    return Group(*lines)


def _justified(cell: str, title: str, width: int) -> str:
    return cell.ljust(width) if title in _WORDS else cell.rjust(width)


def _number(value: float) -> str:
    if not value:
        return "0"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _mibs(value: float) -> str:
    return _number(value / (1 << 20)) if value >= 1 << 14 else "0"


def _latency(seconds: float | None) -> str:
    if not seconds:
        return "-"
    if seconds >= 1:
        return f"{seconds:.1f}s"
    return f"{seconds * 1e3:.1f}ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f}us"


def _percent(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.0%}"


def _age(seconds: float) -> str:
    if seconds < 1:
        return "-"
    if seconds < 60:
        return f"{seconds:.0f}s"
    return f"{seconds // 60:.0f}m{seconds % 60:.0f}s" if seconds < 3600 else f"{seconds / 3600:.1f}h"


_ARROWS = {"A": "up", "B": "down", "C": "right", "D": "left", "5~": "pageup", "6~": "pagedown"}
_KEY = re.compile(r"\x1b[\[O]([A-D]|[56]~)|\x1b|(.)", re.DOTALL)


@contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """Read the terminal key by key: what is given waits so many seconds for one, and returns "" for none."""
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    found: list[str] = []

    def next_key(patience: float) -> str:
        if not found and select.select([fd], [], [], max(0.0, patience))[0]:
            data = os.read(fd, 1024).decode(errors="replace")
            if not data:
                return "q"  # the terminal is gone
            found.extend(
                _ARROWS.get(one[1] or "", "") or (one[2] or " ").lower() for one in _KEY.finditer(data)
            )
        return found.pop(0) if found else ""

    tty.setcbreak(fd)
    try:
        yield next_key
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)
