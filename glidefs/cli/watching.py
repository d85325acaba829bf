"""The commands for those who watch: `top` and `ui`. What they need is imported when they run."""

from __future__ import annotations

from typing import Annotated

import typer

from glidefs.cli.common import reported, seconds
from glidefs.cli.options import ConfigOption, Json


def add_commands(app: typer.Typer) -> None:
    """Put the commands of this file into the program."""
    app.command()(top)
    app.command()(ui)


def top(
    sort: Annotated[str, typer.Option("--sort", help="iops, mibs, latency or dirty.")] = "iops",
    count: Annotated[
        int | None, typer.Option("-n", "--count", min=1, help="At most so many exports.", show_default=False)
    ] = None,
    interval: Annotated[str, typer.Option("--interval", help="Time from frame to frame.")] = "2s",
    once: Annotated[bool, typer.Option("--once", help="Print one frame and end.")] = False,
    config: ConfigOption = None,
    as_json: Json = False,
) -> None:
    """Show what exports do now: requests, latency, hits, data not uploaded; q ends it."""
    from glidefs.cli.top import top_command

    with reported(as_json):
        every = seconds(interval) or 0.0
    top_command(sort, count, every, once, config, as_json)


def ui(
    port: Annotated[
        int | None,
        typer.Option(
            "--port", min=0, max=65535, help="Serve it on this port of 127.0.0.1; 0: any.", show_default=False
        ),
    ] = None,
    config: ConfigOption = None,
    as_json: Json = False,
) -> None:
    """Say how to reach the dashboard, or serve it to a browser on this host."""
    from glidefs.cli.ui import ui_command

    ui_command(port, config, as_json)
