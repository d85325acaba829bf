"""The commands on exports: make, list, change, and end them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from glidefs.api.client import Client, export_path
from glidefs.cli import completion, look, output
from glidefs.cli.common import connect, reported, seconds, show_result
from glidefs.cli.many import carry_out, chosen
from glidefs.cli.options import ConfigOption, Every, Force, Json, Name, Names, NewPrefix, Prefix, Timeout
from glidefs.cli.stored import list_stored, of_node
from glidefs.errors import ConfigError

COUNTED = "{}"
"""What stands for the number in a name of `create --count`."""
TRANSPORTS = "auto, ublk, nbd-device, nbd or vhost-user."
TransportOption = Annotated[str, typer.Option("--transport", help=TRANSPORTS)]


def add_commands(app: typer.Typer) -> None:
    """Put the commands of this file into the program."""
    for function in (create, transport, drain, detach, attach, remove, undelete, show):
        app.command()(function)
    app.command(context_settings={"ignore_unknown_options": True})(resize)  # -1GiB is a size
    app.command("list")(list_exports)
    app.command("ls", hidden=True)(list_exports)
    app.command("rm", hidden=True)(remove)


def create(
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="Name of the export; {} in it with --count.", show_default=False),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            "--size", "-s", help='Size, such as "10GiB"; default: the source\'s.', show_default=False
        ),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            "--from",
            help="Fork base:B, volume:V, snapshot:V@SEQ or tag:T.",
            show_default=False,
            autocompletion=completion.sources,
        ),
    ] = None,
    count: Annotated[
        int | None,
        typer.Option("--count", metavar="N", min=1, help="Make N of them: {} in the name is 1 to N."),
    ] = None,
    template: Annotated[
        str | None, typer.Option("--name", metavar="NAME", help="The same as the argument.")
    ] = None,
    transport: TransportOption = "auto",
    read_only: Annotated[bool, typer.Option("--read-only", help="Guests cannot write.")] = False,
    prefix: Prefix = None,
    new_prefix: NewPrefix = False,
    flush: Annotated[
        str, typer.Option("--flush", help="local: FLUSH is durable here; store: in the store.")
    ] = "local",
    wait: Annotated[bool, typer.Option("--wait", help="Return when the store knows the volume.")] = False,
    prefetch: Annotated[
        bool, typer.Option("--prefetch/--no-prefetch", help="Fetch the base's hot set in the background.")
    ] = True,
    config: ConfigOption = None,
    as_json: Json = False,
) -> None:
    """Create a volume, empty or a fork, and serve it on this host."""
    with reported(as_json):
        wanted = {
            "size": size,
            "source": source,
            "prefetch": prefetch,
            "transport": transport,
            "read_only": read_only,
            "prefix": prefix,
            "new_prefix": new_prefix,
            "flush": flush,
            "wait": wait,
        }
        client, names = connect(config), _numbered(name, template, count)

        def line(_: str, status: dict[str, Any]) -> str:
            if not as_json:
                size, over = output.size_text(status["size"]), status["transport"]
                output.say(f"{size} over {over} ({status['reason']})")
            return f"{status['name']}: {status['transport']} {status['device']}"

        carry_out(
            names,
            lambda name: client.call("PUT", export_path(name), wanted),
            line,
            done="created",
            as_json=as_json,
            several=count is not None,
        )


def _numbered(name: str | None, template: str | None, count: int | None) -> list[str]:
    """The names that `create` makes. Raises ConfigError."""
    if (name is None) == (template is None):
        raise ConfigError("name the export, as an argument or with --name")
    text = name if name is not None else template
    assert text is not None
    if count is None:
        return [text]
    if text.count(COUNTED) != 1:
        raise ConfigError(f"--count needs a name with one {COUNTED} in it, where the number goes")
    return [text.replace(COUNTED, str(number)) for number in range(1, count + 1)]


def list_exports(
    patterns: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME...]", help="Only these; a name may have * and ?.", show_default=False),
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option("-o", "--columns", metavar="NAMES", help=f"What to show: {', '.join(look.COLUMNS)}."),
    ] = None,
    state: Annotated[
        str | None, typer.Option("--state", help="Only exports in this state, such as failed.")
    ] = None,
    over: Annotated[str | None, typer.Option("--transport", help="Only exports of this transport.")] = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Again every two seconds.")] = False,
    store: Annotated[
        bool, typer.Option("--store", help="All volumes of a prefix in the store, whoever has them.")
    ] = False,
    prefix: Prefix = None,
    config: ConfigOption = None,
    as_json: Json = False,
) -> None:
    """List the exports of this host, or the volumes of the store."""
    if store:
        with reported(as_json):
            list_stored(connect(config), prefix, patterns or [], as_json)
    else:
        view = look.View(tuple(patterns or ()), columns or "", state or "", over or "", watch)
        look.list_exports(config, as_json, view)


def show(name: Name, config: ConfigOption = None, as_json: Json = False) -> None:
    """Show one export."""
    look.show(name, config, as_json)


def resize(
    name: Name,
    size: Annotated[
        str, typer.Argument(metavar="SIZE", help='New size, such as "20GiB", or "+5GiB".', show_default=False)
    ],
    shrink: Annotated[
        bool, typer.Option("--shrink", help="Confirm that a smaller size cuts data off.")
    ] = False,
    config: ConfigOption = None,
    as_json: Json = False,
) -> None:
    """Change the size of a volume while it is served."""
    with reported(as_json):
        status = connect(config).call("POST", export_path(name, "resize"), {"size": size, "shrink": shrink})
        show_result(status, as_json, f"{status['name']}: {output.size_text(status['size'])}")


def transport(
    name: Name,
    kind: Annotated[
        str,
        typer.Argument(metavar="KIND", help=TRANSPORTS, show_default=False),
    ],
    config: ConfigOption = None,
    as_json: Json = False,
) -> None:
    """Serve a volume by another transport; nobody may use it meanwhile."""
    with reported(as_json):
        status = connect(config).call("POST", export_path(name, "transport"), {"transport": kind})
        text = f"{status['name']}: {status['transport']}, {status['device']}"
        show_result(status, as_json, f"{text} ({status['reason']})" if status["reason"] else text)


def drain(
    names: Names = None,
    every: Every = False,
    timeout: Timeout = None,
    config: ConfigOption = None,
    as_json: Json = False,
) -> None:
    """Upload everything that was written until now."""
    _drained("drain", "drained", names, every, timeout, config, as_json)


def detach(
    names: Names = None,
    every: Every = False,
    timeout: Timeout = None,
    force: Force = False,
    config: ConfigOption = None,
    as_json: Json = False,
) -> None:
    """Stop serving here, upload everything, give the volume up: any host can attach it."""
    _drained("detach", "detached", names, every, timeout, config, as_json, force=True if force else None)


def _drained(
    verb: str,
    done: str,
    names: Sequence[str] | None,
    every: bool,
    timeout: str | None,
    config: str | None,
    as_json: bool,
    **options: bool | None,
) -> None:
    with reported(as_json):
        client = connect(config)
        wanted = {"timeout": seconds(timeout)} | {key: on for key, on in options.items() if on}
        meant = chosen(client, names, every)
        with output.watching(f"{verb} {meant[0] if len(meant) == 1 else len(meant)}", _left(client, meant)):
            carry_out(
                meant,
                lambda name: client.call("POST", export_path(name, verb), wanted),
                lambda name, _: f"{name}: {done}",
                done=done,
                as_json=as_json,
                several=every,
            )


def _left(client: Client, names: Sequence[str]) -> Callable[[], float]:
    """Bytes of these exports that are not in the store."""

    def left() -> float:
        exports = client.call("GET", "/api/exports", timeout=5)
        volumes = [export.get("volume") or {} for export in exports if export["name"] in names]
        return float(sum(volume.get("dirty_bytes", 0) for volume in volumes))

    return left


def attach(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME...]",
            help="Names of volumes.",
            show_default=False,
            autocompletion=completion.volumes,
        ),
    ] = None,
    every: Annotated[
        bool, typer.Option("--all", help="All volumes of a node in the store; see --node.")
    ] = False,
    node: Annotated[
        str | None, typer.Option("--node", metavar="NODE", help="With --all: the node; default: this one.")
    ] = None,
    take_over: Annotated[
        bool, typer.Option("--take-over", help="Take it from the node that owns it, which is fenced.")
    ] = False,
    accept_older: Annotated[
        bool, typer.Option("--accept-older", help="The store went back in time: take what it has now.")
    ] = False,
    prefix: Prefix = None,
    transport: TransportOption = "auto",
    config: ConfigOption = None,
    as_json: Json = False,
) -> None:
    """Serve a volume from the store, or with --all the volumes of a lost host or disk."""
    with reported(as_json):
        wanted = {
            "take_over": take_over,
            "accept_older": accept_older,
            "prefix": prefix,
            "transport": transport,
        }
        if bool(names) == every or (node is not None and not every):
            raise ConfigError("name volumes, or use --all, with --node for another node than this one")
        client = connect(config)
        meant = list(dict.fromkeys(names)) if names else of_node(client, node, prefix)
        carry_out(
            meant,
            lambda name: client.call("POST", export_path(name, "attach"), wanted),
            lambda _, status: f"{status['name']}: {status['transport']} {status['device']}",
            done="attached",
            as_json=as_json,
            several=every,
            nothing="nothing to attach: the store has no other volume of that node",
        )


def remove(
    names: Names = None,
    every: Every = False,
    purge: Annotated[bool, typer.Option("--purge", help="Delete its snapshots too, for good.")] = False,
    now: Annotated[bool, typer.Option("--now", help="Delete it for good: no undelete.")] = False,
    force: Force = False,
    config: ConfigOption = None,
    as_json: Json = False,
) -> None:
    """Delete a volume, here and in the store; until gc's grace is over it can be undeleted."""
    with reported(as_json):
        options = {"purge": purge, "now": now, "force": force}
        query = {option: "true" for option, on in options.items() if on} or None
        if every and not force:
            raise ConfigError("--all removes every volume of this host: say --force, too")
        client = connect(config)
        meant = chosen(client, names, every)
        carry_out(
            meant,
            lambda name: client.call("DELETE", export_path(name), query=query),
            lambda name, result: f"{name}: {'removed' if result.get('removed') else 'nothing to remove'}",
            done="removed",
            as_json=as_json,
            several=every,
        )


def undelete(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="Name of the removed volume.", show_default=False)
    ],
    prefix: Prefix = None,
    config: ConfigOption = None,
    as_json: Json = False,
) -> None:
    """Put a removed volume back into the store, as it was; attach it then."""
    with reported(as_json):
        result = connect(config).call("POST", export_path(name, "undelete"), {"prefix": prefix})
        show_result(result, as_json, f"{name}: undeleted, {output.size_text(result['size'])}")
