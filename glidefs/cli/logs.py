"""The commands on write logs; they ask the daemon."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from glidefs.api.client import absolute
from glidefs.cli import output
from glidefs.cli.common import connect, reported, show_result
from glidefs.cli.options import ConfigOption, Force, Json

app = typer.Typer(help="Write logs on this host: list, export, delete.", rich_markup_mode=None)


@app.callback(invoke_without_command=True)
def logs(context: typer.Context, config: ConfigOption = None, as_json: Json = False) -> None:
    """Write logs on this host: list (the default), export, delete."""
    if context.invoked_subcommand is None:
        _list_logs(config, as_json)


@app.command("list")
def logs_list(config: ConfigOption = None, as_json: Json = False) -> None:
    """List write logs: in use, fenced (another host has the volume), set aside, or of a lost record."""
    _list_logs(config, as_json)


def _list_logs(config: str | None, as_json: bool) -> None:
    with reported(as_json):
        found = connect(config).call("GET", "/api/logs")
        if as_json:
            output.emit(found)
            return
        rows = [
            [
                entry["volume_id"],
                entry["log_id"],
                entry.get("export") or entry.get("was") or "-",
                entry["state"],
                str(entry["segments"]),
                output.size_text(entry["bytes"]),
            ]
            for entry in found
        ]
        output.table(["VOLUME", "LOG", "EXPORT", "STATE", "SEGMENTS", "SIZE"], rows, right=(4, 5))


Volume = Annotated[str, typer.Argument(metavar="VOLUME", help="Volume id, as `logs list` shows it.")]
Log = Annotated[str, typer.Argument(metavar="LOG", help="Log id, as `logs list` shows it.")]


@app.command("export")
def logs_export(
    volume: Volume,
    log: Log,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Sparse image to write.")],
    partial: Annotated[
        bool, typer.Option("--partial", help="Export the intact part of a damaged log.")
    ] = False,
    config: ConfigOption = None,
    as_json: Json = False,
) -> None:
    """Write what a log holds to a sparse file: each sector where it belongs, holes elsewhere."""
    with reported(as_json):
        target = {"path": absolute(str(file)), "partial": partial}
        result = connect(config).call("POST", f"/api/logs/{_id(volume)}/{_id(log)}/export", target)
        show_result(result, as_json, f"{file}: {output.size_text(result.get('bytes', 0))} of data")


@app.command("delete")
def logs_delete(
    volume: Volume, log: Log, force: Force = False, config: ConfigOption = None, as_json: Json = False
) -> None:
    """Delete a log that no export uses; one with data that the store does not have needs --force."""
    with reported(as_json):
        query = {"force": "true"} if force else None
        result = connect(config).call("DELETE", f"/api/logs/{_id(volume)}/{_id(log)}", query=query)
        show_result(result, as_json, f"{log}: deleted")


def _id(text: str) -> str:
    from glidefs.names import check_id

    return check_id(text)
