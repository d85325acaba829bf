"""`glidefs list` and `glidefs show NAME`, which scripts and people run all the time, without Typer.

Its import takes longer than both. `main` declares them, too, and has what is said about wrong arguments and
the help: whatever is not plainly one of the two goes there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from glidefs.api.client import export_path
from glidefs.cli import output
from glidefs.cli.common import connect, reported


def list_exports(config: str | None, as_json: bool) -> None:
    """Print the exports of the daemon's host."""
    with reported(as_json):
        exports = connect(config).call("GET", "/api/exports")
        if as_json:
            output.emit(exports)
        else:
            output.table(
                ["NAME", "SIZE", "STATE", "TRANSPORT", "DEVICE", "DIRTY", "REASON"],
                [_row(export) for export in exports],
                right=(1, 5),
            )


def _row(export: dict[str, Any]) -> list[str]:
    return [
        export["name"],
        output.size_text(export["size"]),
        export["state"],
        export["transport"],
        export["device"] or "-",
        output.size_text((export.get("volume") or {}).get("dirty_bytes", 0)),
        export["reason"] if export["state"] != "serving" else export["trouble"],
    ]


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
    if command == ["list"] and not names:
        list_exports(config, as_json)
    elif command == ["show"] and len(names) == 1:
        show(names[0], config, as_json)
    else:
        return False
    return True
