"""The commands on snapshots, tags, bases and profiles."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import quote

import typer

from glidefs.api.client import export_path
from glidefs.cli import completion, output
from glidefs.cli.common import connect, reported, seconds, show_result
from glidefs.cli.options import ConfigOption, Json, Name, Prefix, Timeout
from glidefs.errors import ConfigError

Volume = Annotated[
    str,
    typer.Argument(
        metavar="NAME", help="Name of the volume.", show_default=False, autocompletion=completion.exports
    ),
]


def add_commands(app: typer.Typer) -> None:
    """Put the commands of this file into the program."""
    for function in (snapshot, snapshots, promote, tag, tags, profile):
        app.command()(function)


_snapshots = typer.Typer(
    help="Snapshots of a volume: list, delete.", rich_markup_mode=None, no_args_is_help=True
)


def snapshot(
    name: Name,
    tag: Annotated[str | None, typer.Option("--tag", help="Also give the snapshot this tag.")] = None,
    timeout: Timeout = None,
    config: ConfigOption = None,
    as_json: Json = False,
) -> None:
    """Keep the volume as it is now; guests go on."""
    with reported(as_json):
        wanted = {"tag": tag, "timeout": seconds(timeout)}
        result = connect(config).call("POST", export_path(name, "snapshot"), wanted)
        show_result(result, as_json, result["source"])


def snapshots(
    name: Volume,
    delete: Annotated[
        int | None,
        typer.Option("--delete", metavar="SEQ", min=0, help="Delete this one.", show_default=False),
    ] = None,
    prefix: Prefix = None,
    config: ConfigOption = None,
    as_json: Json = False,
) -> None:
    """List the snapshots of a volume, or delete one; gc then deletes the data that only it needs."""
    with reported(as_json):
        client, query = connect(config), {"prefix": prefix}
        if delete is not None:
            result = client.call("DELETE", export_path(name, f"snapshots/{delete}"), query=query)
            show_result(result, as_json, f"{name}@{delete}: deleted")
            return
        found = client.call("GET", export_path(name, "snapshots"), query=query)
        if as_json:
            output.emit(found)
            return
        rows = [
            [
                s["source"],
                output.size_text(s["size"]),
                output.time_text(s["created_at"]),
            ]
            for s in found
        ]
        output.table(["SNAPSHOT", "SIZE", "CREATED"], rows, right=(1,))


def _split(name: str) -> tuple[str, int | None]:
    """NAME or NAME@SEQ. Raises ConfigError."""
    from glidefs.names import parse_source

    source = parse_source(name)
    return source.name, source.sequence if source.kind == "snapshot" else None


def promote(
    name: Annotated[str, typer.Argument(metavar="NAME[@SEQ]", help="Export, or a snapshot of a volume.")],
    base: Annotated[str | None, typer.Option("--base", help="Make it a base of this name.")] = None,
    prefix: Prefix = None,
    config: ConfigOption = None,
    as_json: Json = False,
) -> None:
    """Make a read-only export read-write; with --base, make a volume or snapshot a base."""
    with reported(as_json):
        volume, sequence = _split(name)
        wanted = {"base": base, "sequence": sequence, "prefix": prefix}
        result = connect(config).call("POST", export_path(volume, "promote"), wanted)
        line = f"base:{base}" if base else f"{result['name']}: {result['transport']} {result['device']}"
        show_result(result, as_json, line)


def tag(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME[@SEQ]]", help="Volume, or a snapshot of it.", show_default=False),
    ] = None,
    tag: Annotated[
        str | None,
        typer.Argument(metavar="[TAG]", help="Name of the tag; one in use moves here.", show_default=False),
    ] = None,
    delete: Annotated[
        str | None,
        typer.Option(
            "--delete",
            metavar="TAG",
            help="Delete this tag.",
            show_default=False,
            autocompletion=completion.tags,
        ),
    ] = None,
    prefix: Annotated[
        str | None,
        typer.Option("--prefix", help="With --delete: its prefix; default: the first configured."),
    ] = None,
    config: ConfigOption = None,
    as_json: Json = False,
) -> None:
    """Give a volume as it is now, or a snapshot, a name to fork from; or delete such a name."""
    with reported(as_json):
        if delete is not None:
            if name is not None:
                raise ConfigError("--delete takes the tag alone")
            path = f"/api/tags/{quote(delete, safe='')}"
            result = connect(config).call("DELETE", path, query={"prefix": prefix})
            show_result(result, as_json, f"tag:{delete}: deleted")
            return
        if name is None or tag is None or prefix is not None:
            raise ConfigError("name the volume and its tag, or a tag with --delete")
        volume, sequence = _split(name)
        wanted = {"tag": tag, "sequence": sequence}
        result = connect(config).call("POST", export_path(volume, "tag"), wanted)
        show_result(result, as_json, f"tag:{tag}")


def tags(prefix: Prefix = None, config: ConfigOption = None, as_json: Json = False) -> None:
    """List the tags of a prefix."""
    with reported(as_json):
        found = connect(config).call("GET", "/api/tags", query={"prefix": prefix})
        if as_json:
            output.emit(found)
            return
        rows = [
            [
                t["tag"],
                t["volume"] or "-",
                output.size_text(t["size"]),
                output.time_text(t["created_at"]) if t["created_at"] else "-",
                t["damaged"],
            ]
            for t in found
        ]
        output.table(["TAG", "VOLUME", "SIZE", "CREATED", "NOTE"], rows, right=(2,))


def profile(
    name: Name,
    stop_after: Annotated[
        str | None, typer.Option("--stop-after", help='End after this time, such as "60s".')
    ] = None,
    until_idle: Annotated[
        bool, typer.Option("--until-idle", help="End once no new block was read for 5 s (the default).")
    ] = False,
    config: ConfigOption = None,
    as_json: Json = False,
) -> None:
    """Record what a boot reads of a fork of a base, as the base's hot set."""
    with reported(as_json):
        wanted = {"stop_after": seconds(stop_after), "idle": 5.0 if until_idle else None}
        result = connect(config).call("POST", export_path(name, "profile"), wanted)
        line = f"base:{result['base']}: {result['hot_blocks']} blocks of 128 KiB"
        show_result(result, as_json, line)
