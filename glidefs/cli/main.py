"""glidefs: the commands. Each decodes its arguments, asks the daemon or a tool, and prints."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from glidefs.api.client import absolute, export_path
from glidefs.cli import output
from glidefs.cli.common import (
    ConfigOption,
    Force,
    Json,
    Name,
    NewPrefix,
    Prefix,
    Timeout,
    connect,
    reported,
    seconds,
    show_result,
)
from glidefs.cli.devices import app as devices_app
from glidefs.cli.forks import add_commands
from glidefs.cli.lean import narrow
from glidefs.cli.logs import app as logs_app
from glidefs.cli.stored import attach_all, list_stored
from glidefs.errors import ConfigError

HANDOFF_TIMEOUT = 600.0

app = typer.Typer(
    name="glidefs",
    help="Fast local disks backed by an object store.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
app.add_typer(logs_app, name="logs")
add_commands(app)
bases_app = typer.Typer(help="Bases in the store: list, remove.", rich_markup_mode=None)
app.add_typer(bases_app, name="bases")
app.add_typer(devices_app, name="devices")


@app.callback()
def glidefs() -> None:
    """What comes before a command: nothing. With it the program has commands even where only one is left."""


@app.command()
def init(
    path: Annotated[Path, typer.Argument(metavar="[PATH]", help="File to write.")] = Path("glidefs.toml"),
    store: Annotated[str | None, typer.Option("--store", help="Store URL.")] = None,
    cache_dir: Annotated[str | None, typer.Option("--cache-dir", help="Directory of log and cache.")] = None,
    run_dir: Annotated[str | None, typer.Option("--run-dir", help="Directory of the sockets.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
    as_json: Json = False,
) -> None:
    """Write a commented configuration file, and make the directory of a file:// store."""
    from glidefs.cli import template
    from glidefs.config import parse_config

    with reported(as_json):
        text = template.render(cache_dir, store, run_dir)
        parsed = parse_config(text, str(path), path.resolve().parent)
        template.write(path, text, force)
        template.make_store(parsed.store.url)
        show_result(
            {"path": absolute(str(path))}, as_json, f"wrote {path}; start with: glidefs run -c {path}"
        )


@app.command()
def run(
    init_store: Annotated[
        bool, typer.Option("--init-store", help="Make the directory of a file:// store that is not there.")
    ] = False,
    config: ConfigOption = None,
) -> None:
    """Run the daemon in the foreground."""
    with reported(False):
        from glidefs.daemon.run import run_daemon

        run_daemon(config, init_store=init_store)


@app.command()
def create(
    name: Name,
    size: Annotated[
        str | None,
        typer.Option(
            "--size", "-s", help='Size, such as "10GiB"; default: the source\'s.', show_default=False
        ),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option("--from", help="Fork base:B, volume:V, snapshot:V@SEQ or tag:T.", show_default=False),
    ] = None,
    transport: Annotated[
        str, typer.Option("--transport", help="auto, ublk, nbd-device, nbd or vhost-user.")
    ] = "auto",
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
        status = connect(config).call("PUT", export_path(name), wanted)
        show_result(status, as_json, f"{status['name']}: {status['transport']} {status['device']}")
        if not as_json:
            output.say(f"{output.size_text(status['size'])} over {status['transport']} ({status['reason']})")


@app.command("list")
def list_exports(
    store: Annotated[
        bool, typer.Option("--store", help="All volumes of a prefix in the store, whoever has them.")
    ] = False,
    prefix: Prefix = None,
    config: ConfigOption = None,
    as_json: Json = False,
) -> None:
    """List the exports of this host, or the volumes of the store."""
    with reported(as_json):
        if store:
            list_stored(connect(config), prefix, as_json)
            return
        exports = connect(config).call("GET", "/api/exports")
        if as_json:
            output.emit(exports)
            return
        rows = [
            [
                e["name"],
                output.size_text(e["size"]),
                e["state"],
                e["transport"],
                e["device"] or "-",
                output.size_text((e.get("volume") or {}).get("dirty_bytes", 0)),
                e["reason"] if e["state"] != "serving" else e["trouble"],
            ]
            for e in exports
        ]
        output.table(["NAME", "SIZE", "STATE", "TRANSPORT", "DEVICE", "DIRTY", "REASON"], rows, right=(1, 5))


@app.command()
def show(name: Name, config: ConfigOption = None, as_json: Json = False) -> None:
    """Show one export."""
    with reported(as_json):
        status = connect(config).call("GET", export_path(name))
        if as_json:
            output.emit(status)
        else:
            output.fields(status)


@app.command()
def resize(
    name: Name,
    size: Annotated[
        str, typer.Argument(metavar="SIZE", help='New size, such as "20GiB".', show_default=False)
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


@app.command()
def transport(
    name: Name,
    kind: Annotated[
        str,
        typer.Argument(metavar="KIND", help="auto, ublk, nbd-device, nbd or vhost-user.", show_default=False),
    ],
    config: ConfigOption = None,
    as_json: Json = False,
) -> None:
    """Serve a volume by another transport; nobody may use it meanwhile."""
    with reported(as_json):
        status = connect(config).call("POST", export_path(name, "transport"), {"transport": kind})
        text = f"{status['name']}: {status['transport']}, {status['device']}"
        show_result(status, as_json, f"{text} ({status['reason']})" if status["reason"] else text)


@app.command()
def drain(name: Name, timeout: Timeout = None, config: ConfigOption = None, as_json: Json = False) -> None:
    """Upload everything that was written until now."""
    _drained("drain", "drained", name, timeout, config, as_json)


@app.command()
def handoff(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Start a successor, see that it could take over, end it.")
    ] = False,
    config: ConfigOption = None,
    as_json: Json = False,
) -> None:
    """Hand all exports to a new daemon process, without I/O errors: for upgrades in use."""
    with reported(as_json):
        answer = connect(config).call("POST", "/admin/handoff", {"dry_run": dry_run}, timeout=HANDOFF_TIMEOUT)
        if dry_run:
            text = f"a successor could take over {answer['exports']} exports; process {answer['pid']} goes on"
        else:
            text = (
                f"{answer['outcome']}: process {answer['pid']} serves {answer['exports']} exports, "
                f"guests waited {answer['stall'] * 1e3:.1f} ms"
            )
        show_result(answer, as_json, text)
        if answer["outcome"] == "revived":
            raise SystemExit(1)


@app.command()
def detach(
    name: Name,
    timeout: Timeout = None,
    force: Force = False,
    config: ConfigOption = None,
    as_json: Json = False,
) -> None:
    """Stop serving here, upload everything, give the volume up: any host can attach it."""
    _drained("detach", "detached", name, timeout, config, as_json, force=True if force else None)


def _drained(
    verb: str,
    done: str,
    name: str,
    timeout: str | None,
    config: str | None,
    as_json: bool,
    **options: bool | None,
) -> None:
    with reported(as_json):
        client = connect(config)

        def left() -> float:
            volume = client.call("GET", export_path(name), timeout=5).get("volume") or {}
            return float(volume.get("dirty_bytes", 0))

        with output.watching(f"{verb} {name}", left):
            wanted = {"timeout": seconds(timeout)} | {key: on for key, on in options.items() if on}
            result = client.call("POST", export_path(name, verb), wanted)
        show_result(result, as_json, f"{name}: {done}")


@app.command()
def attach(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Name of the volume.", show_default=False)
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
    transport: Annotated[
        str, typer.Option("--transport", help="auto, ublk, nbd-device, nbd or vhost-user.")
    ] = "auto",
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
        if (name is None) != every or (node is not None and not every):
            raise ConfigError("name one volume, or use --all, with --node for another node than this one")
        if name is None:
            attach_all(connect(config), node, prefix, wanted, as_json)
            return
        status = connect(config).call("POST", export_path(name, "attach"), wanted)
        show_result(status, as_json, f"{status['name']}: {status['transport']} {status['device']}")


@app.command()
def remove(
    name: Name,
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
        result = connect(config).call("DELETE", export_path(name), query=query)
        line = f"{name}: removed" if result.get("removed") else f"{name}: nothing to remove"
        show_result(result, as_json, line)


@app.command()
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


@app.command()
def doctor(config: ConfigOption = None, as_json: Json = False) -> None:
    """Check kernel, limits, disks, store and daemon: what works, and what to do."""
    from glidefs.cli.offline import doctor_command

    with reported(as_json):
        code = doctor_command(config, as_json)
    raise SystemExit(code)


Store = Annotated[str | None, typer.Option("--store", help="Store URL; default: the configured one.")]


@app.command()
def inspect(
    target: Annotated[str, typer.Argument(metavar="OBJECT", help="File, store key, or URL of an object.")],
    store: Store = None,
    config: ConfigOption = None,
    as_json: Json = False,
) -> None:
    """Print the contents of a GlideFS object or file; needs no daemon."""
    from glidefs.cli.offline import inspect_command

    with reported(as_json):
        inspect_command(target, store, config, as_json)


@app.command("export-image")
def export_image(
    name: Annotated[str, typer.Argument(metavar="NAME", help="NAME, NAME@SEQ, base:NAME or tag:NAME.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Raw image to write (sparse).")],
    prefix: Prefix = None,
    store: Store = None,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE if it exists.")] = False,
    config: ConfigOption = None,
    as_json: Json = False,
) -> None:
    """Read a volume out of the store into a raw image; works without a daemon."""
    from glidefs.cli.offline import export_command

    with reported(as_json):
        export_command(name, file, prefix, store, force, config, as_json)


@app.command()
def bless(
    image: Annotated[
        str, typer.Argument(metavar="IMAGE", help="Raw image: file or block device; - is standard input.")
    ],
    name: Annotated[str, typer.Option("--name", "-n", help="Name of the new base.", show_default=False)],
    prefix: Prefix = None,
    new_prefix: NewPrefix = False,
    store: Store = None,
    config: ConfigOption = None,
    as_json: Json = False,
) -> None:
    """Make a base of a raw image, to fork volumes from; works without a daemon.

    An interrupted bless goes on when it is started again. A base never changes.
    """
    from glidefs.cli.offline import bless_command

    with reported(as_json):
        bless_command(image, name, prefix, store, config, as_json, new_prefix=new_prefix)


@bases_app.callback(invoke_without_command=True)
def bases(
    context: typer.Context,
    prefix: Prefix = None,
    store: Store = None,
    config: ConfigOption = None,
    as_json: Json = False,
) -> None:
    """Bases in the store: list (the default), remove; works without a daemon."""
    if context.invoked_subcommand is None:
        bases_list(prefix, store, config, as_json)


@bases_app.command("list")
def bases_list(
    prefix: Prefix = None, store: Store = None, config: ConfigOption = None, as_json: Json = False
) -> None:
    """List the bases of a prefix, removed ones too until gc deletes them."""
    from glidefs.cli.offline import bases_command

    with reported(as_json):
        bases_command(prefix, store, config, as_json)


@bases_app.command("remove")
def bases_remove(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the base.", show_default=False)],
    prefix: Prefix = None,
    store: Store = None,
    config: ConfigOption = None,
    as_json: Json = False,
) -> None:
    """Remove a base: nothing new is forked from it; existing forks keep their data."""
    from glidefs.cli.offline import bases_remove_command

    with reported(as_json):
        bases_remove_command(name, prefix, store, config, as_json)


@app.command()
def gc(
    prefix: Annotated[
        str | None, typer.Option("--prefix", help="Store prefix; default: all that are configured.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Delete and write nothing.")] = False,
    grace: Annotated[
        str | None, typer.Option("--grace", help="Delete what nothing has named for this long.")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Delete at most this many objects.")] = 10_000,
    store: Store = None,
    force: Annotated[
        bool, typer.Option("--force", help="Allow a --grace that is shorter than the configured one.")
    ] = False,
    config: ConfigOption = None,
    as_json: Json = False,
) -> None:
    """Delete packs and pages that no volume, snapshot, tag or base names; works without a daemon."""
    from glidefs.cli.offline import gc_command

    with reported(as_json):
        code = gc_command(prefix, dry_run, seconds(grace), limit, store, force, config, as_json)
    raise SystemExit(code)


def main() -> None:
    """Entry point of the `glidefs` program."""
    if hasattr(signal, "SIGPIPE") and sys.argv[1:2] != ["run"]:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    narrow(app, sys.argv[1:])
    app()


if __name__ == "__main__":
    main()
