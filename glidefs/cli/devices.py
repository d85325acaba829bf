"""The commands on devices of the kernel; they need no daemon."""

from __future__ import annotations

from typing import Annotated

import typer

from glidefs.cli import output
from glidefs.cli.common import reported, show_result
from glidefs.cli.options import ConfigOption, Json

app = typer.Typer(
    help="ublk and NBD devices of this host: list (the default), remove orphans; works without a daemon.",
    rich_markup_mode=None,
)


@app.callback(invoke_without_command=True)
def devices(context: typer.Context, config: ConfigOption = None, as_json: Json = False) -> None:
    """What to do without a subcommand."""
    if context.invoked_subcommand is None:
        devices_list(config, as_json)


@app.command("list")
def devices_list(config: ConfigOption = None, as_json: Json = False) -> None:
    """List all ublk and NBD devices: what each one does, and whose it is."""
    import msgspec

    from glidefs.cli.offline import settings
    from glidefs.doctor.devices import survey

    with reported(as_json):
        found = survey(settings(config))
        if as_json:
            output.emit(msgspec.to_builtins(found))
            return
        whose = {"export": "export {}", "orphan": "orphan {}", "other": "somebody else's"}
        rows = [
            [
                str(d.id),
                d.device,
                output.size_text(d.size),
                f"{d.state} by {d.server}" if d.server else d.state,
                whose[d.owner].format(f"({d.export})" if d.owner == "orphan" and d.export else d.export),
            ]
            for d in found
        ]
        output.table(["ID", "DEVICE", "SIZE", "STATE", "WHOSE"], rows, right=(0, 2))


@app.command("remove")
def devices_remove(
    which: Annotated[
        str,
        typer.Argument(
            metavar="DEVICE", help="Path of the device, or N for /dev/ublkbN.", show_default=False
        ),
    ],
    config: ConfigOption = None,
    as_json: Json = False,
) -> None:
    """Delete an orphan: a device of this cache directory without an export. No other is touched."""
    from glidefs.cli.offline import settings
    from glidefs.doctor.devices import remove

    with reported(as_json):
        removed = remove(settings(config), which)
        value = {"id": removed.id, "device": removed.device, "export": removed.export, "note": removed.keep}
        show_result(value, as_json, f"{removed.device}: removed")
