"""`glidefs list` and `glidefs show NAME`, which scripts and people run all the time, without Typer.

Its import takes longer than both. `main` declares them, too, and has what is said about wrong arguments and
the help: whatever is not plainly one of the two goes there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from glidefs.api.client import export_path
from glidefs.cli import output
from glidefs.cli.common import connect, reported
from glidefs.errors import ConfigError

EVERY = 2.0
"""Seconds between two looks of `list --watch`."""
_Cell = Callable[[dict[str, Any]], str]


def _volume(key: str, text: Callable[[Any], str]) -> _Cell:
    return lambda export: text((export.get("volume") or {}).get(key, 0))


COLUMNS: dict[str, tuple[_Cell, bool]] = {
    "name": (lambda e: str(e["name"]), False),
    "size": (lambda e: output.size_text(e["size"]), True),
    "state": (lambda e: str(e["state"]), False),
    "transport": (lambda e: str(e["transport"]), False),
    "device": (lambda e: e["device"] or "-", False),
    "dirty": (_volume("dirty_bytes", output.size_text), True),
    "reason": (lambda e: str(e["reason"] if e["state"] != "serving" else e["trouble"]), False),
    "prefix": (lambda e: str(e["prefix"]), False),
    "source": (lambda e: e["source"] or "-", False),
    "created": (lambda e: output.time_text(e["created_at"]) if e["created_at"] else "-", False),
    "flush": (lambda e: str(e["flush"]), False),
    "log": (_volume("log_bytes", output.size_text), True),
    "clients": (_volume("connections", str), True),
    "volume-id": (lambda e: str(e["volume_id"]), False),
}
"""What `list -o` knows: the text of an export, and whether it is a number."""
DEFAULT = "name,size,state,transport,device,dirty,reason"


class View(NamedTuple):
    """What of the exports is shown. Empty: all. ``watch``: again and again."""

    patterns: tuple[str, ...] = ()
    columns: str = ""
    state: str = ""
    transport: str = ""
    watch: bool = False

    def has(self, export: dict[str, Any]) -> bool:
        """Whether an export is shown."""
        return (
            matches(export["name"], self.patterns)
            and self.state in ("", export["state"])
            and self.transport in ("", export["transport"])
        )


ALL = View()


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a name is one of the patterns, as a shell's; any name is where there are none."""
    return not patterns or any(fnmatchcase(name, pattern) for pattern in patterns)


def list_exports(config: str | None, as_json: bool, view: View = ALL) -> None:
    """Print the exports of the daemon's host."""
    with reported(as_json):
        chosen = _columns(view.columns)
        if as_json and (view.watch or view.columns):
            raise ConfigError("--json has every export whole, once: leave -o and --watch out")
        client = connect(config)
        while True:
            exports = [export for export in client.call("GET", "/api/exports") if view.has(export)]
            if as_json:
                output.emit(exports)
                return
            if view.watch:
                output.fresh_page()
            cells = [[COLUMNS[name][0](export) for name in chosen] for export in exports]
            right = [at for at, name in enumerate(chosen) if COLUMNS[name][1]]
            output.table([name.upper() for name in chosen], cells, right)
            if not view.watch:
                return
            time.sleep(EVERY)


def _columns(text: str) -> list[str]:
    chosen = [name.strip().lower() for name in (text or DEFAULT).split(",")]
    if unknown := [name for name in chosen if name not in COLUMNS]:
        raise ConfigError(f"there is no column {unknown[0]!r}; choose of {', '.join(COLUMNS)}")
    return chosen


def show(name: str, config: str | None, as_json: bool) -> None:
    """Print one export."""
    with reported(as_json):
        status = connect(config).call("GET", export_path(name))
        if as_json:
            output.emit(status)
        else:
            output.fields(status)


def looked(args: Sequence[str]) -> bool:
    """Carry out ``args``, the words behind `glidefs`, if they are plainly `list` or `show`; else False."""
    command, rest = args[:1], list(args[1:])
    names: list[str] = []
    config: str | None = None
    as_json = False
    while rest:
        word = rest.pop(0)
        if word == "--json":
            as_json = True
        elif word in ("-c", "--config") and rest and not rest[0].startswith("-"):
            config = rest.pop(0)
        elif word and not word.startswith("-"):
            names.append(word)
        else:
            return False
    if command in (["list"], ["ls"]) and not names:
        list_exports(config, as_json)
    elif command == ["show"] and len(names) == 1:
        show(names[0], config, as_json)
    else:
        return False
    return True
