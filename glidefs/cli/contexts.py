"""`glidefs context`: names for daemons on other hosts, and which of them commands are for."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from glidefs.cli import output
from glidefs.cli.common import reported, show_result
from glidefs.cli.options import Json
from glidefs.cli.target import (
    HERE,
    Place,
    check_context_name,
    contexts_path,
    read_contexts,
    write_contexts,
)
from glidefs.errors import ConfigError

app = typer.Typer(help="Daemons on other hosts by name: set, list, use, delete.", rich_markup_mode=None)
Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of the context.", show_default=False)]


@app.callback(invoke_without_command=True)
def contexts(context: typer.Context, as_json: Json = False) -> None:
    """Daemons on other hosts by name: list (the default), set, use, delete."""
    if context.invoked_subcommand is None:
        _list(as_json)


@app.command("list")
def context_list(as_json: Json = False) -> None:
    """List the contexts of this user; a star marks the one that commands are for."""
    _list(as_json)


def _list(as_json: bool) -> None:
    with reported(as_json):
        known = read_contexts(contexts_path())
        places = {HERE: Place(), **known["contexts"]}
        if as_json:
            output.emit(
                [
                    {"name": name, "current": name == known["current"], **p._asdict()}
                    for name, p in places.items()
                ]
            )
            return
        rows = [
            ["*" if name == known["current"] else "", name, place.host or "the daemon of this host"]
            for name, place in places.items()
        ]
        output.table(["", "NAME", "HOST"], rows)


@app.command("set")
def context_set(
    name: Name,
    host: Annotated[str, typer.Option("--host", help="https://HOST:PORT of the daemon.", show_default=False)],
    token_file: Annotated[str | None, typer.Option("--token-file", help="File with the token.")] = None,
    ca: Annotated[str | None, typer.Option("--ca", help="CA to trust instead of the system's.")] = None,
    cert: Annotated[str | None, typer.Option("--cert", help="Certificate of this client.")] = None,
    key: Annotated[str | None, typer.Option("--key", help="Its key.")] = None,
    as_json: Json = False,
) -> None:
    """Name a daemon on another host, or change what the name stands for."""
    with reported(as_json):
        from glidefs.api.client import absolute
        from glidefs.api.remote import RemoteClient

        files = [None if path is None else absolute(path) for path in (token_file, ca, cert, key)]
        place = Place(host, *files)
        RemoteClient(*place)  # what is wrong with it is said now
        path = contexts_path()
        known = read_contexts(path)
        write_contexts(path, known["current"], known["contexts"] | {check_context_name(name): place})
        text = f"{name}: {host}; 'glidefs context use {name}' makes commands go there"
        show_result({"name": name, **place._asdict()}, as_json, text)


@app.command("use")
def context_use(name: Name, as_json: Json = False) -> None:
    """Send commands to this daemon from now on; `local` is the one of this host."""
    with reported(as_json):
        path = contexts_path()
        known = read_contexts(path)
        if name != HERE and name not in known["contexts"]:
            raise ConfigError(f"there is no context {name[:64]!r}; 'glidefs context set' makes one")
        if name != HERE or os.path.exists(path):
            write_contexts(path, name, known["contexts"])
        host = known["contexts"][name].host if name != HERE else ""
        show_result(
            {"name": name, "host": host}, as_json, f"commands go to {host or 'the daemon of this host'}"
        )


@app.command("delete")
def context_delete(name: Name, as_json: Json = False) -> None:
    """Forget a context; its files stay."""
    with reported(as_json):
        path = contexts_path()
        known = read_contexts(path)
        if name not in known["contexts"]:
            raise ConfigError(
                f"there is no context {name[:64]!r}; 'glidefs context list' shows those there are"
            )
        places = {one: place for one, place in known["contexts"].items() if one != name}
        write_contexts(path, HERE if known["current"] == name else known["current"], places)
        show_result({"name": name, "deleted": True}, as_json, f"{name}: deleted")
