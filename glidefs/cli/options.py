"""The arguments and options that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

from glidefs.cli import completion

Name = Annotated[
    str,
    typer.Argument(
        metavar="NAME", help="Name of the export.", show_default=False, autocompletion=completion.exports
    ),
]
Names = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="NAME...", help="Names of exports.", show_default=False, autocompletion=completion.exports
    ),
]
Every = Annotated[bool, typer.Option("--all", help="All exports of this host.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
ConfigOption = Annotated[
    str | None,
    typer.Option("--config", "-c", help="Configuration file; else GLIDEFS_CONFIG.", show_default=False),
]
Prefix = Annotated[str | None, typer.Option("--prefix", help="Store prefix; default: the first configured.")]
Force = Annotated[bool, typer.Option("--force", help="Go on even if something is lost, and say what.")]
NewPrefix = Annotated[
    bool, typer.Option("--new-prefix", help="Allow a prefix that the configuration does not name.")
]
Timeout = Annotated[str | None, typer.Option("--timeout", help='Give up after this time, such as "30s".')]
