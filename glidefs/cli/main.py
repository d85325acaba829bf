"""glidefs: the commands. Each decodes its arguments, asks the daemon or a tool, and prints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from glidefs.api.client import absolute
from glidefs.cli import completion, cost, exports, forks, token, watching
from glidefs.cli.common import connect, reported, seconds, show_result
from glidefs.cli.contexts import app as contexts_app
from glidefs.cli.devices import app as devices_app
from glidefs.cli.lean import narrow
from glidefs.cli.logs import app as logs_app
from glidefs.cli.options import ConfigOption, Json, NewPrefix, Prefix
from glidefs.cli.target import Given, Place, give
from glidefs.errors import ConfigError

HANDOFF_TIMEOUT = 600.0
ON_THIS_HOST = frozenset(
    {"init", "run", "completion", "doctor", "inspect", "export-image", "bless", "bases", "gc", "devices"}
    | {"token", "context", "cost"}
)
"""Commands that ask no daemon."""

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
exports.add_commands(app)
forks.add_commands(app)
token.add_commands(app)
watching.add_commands(app)
cost.add_commands(app)
bases_app = typer.Typer(help="Bases in the store: list, remove.", rich_markup_mode=None)
app.add_typer(bases_app, name="bases")
app.add_typer(devices_app, name="devices")
app.add_typer(contexts_app, name="context")


def _say_version(wanted: bool) -> None:
    if wanted:
        from glidefs.version import commit, version

        print(f"glidefs {version()} (commit {commit()})")
        raise typer.Exit


@app.callback()
def glidefs(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", "-V", help="Print the version.", is_eager=True, callback=_say_version),
    ] = False,
    host: Annotated[
        str | None,
        typer.Option("--host", help="Daemon on another host: https://HOST:PORT; else GLIDEFS_HOST."),
    ] = None,
    token_file: Annotated[
        str | None, typer.Option("--token-file", help="File with the token for it; else GLIDEFS_TOKEN_FILE.")
    ] = None,
    ca: Annotated[
        str | None, typer.Option("--ca", help="CA to trust instead of the system's; else GLIDEFS_CA.")
    ] = None,
    named: Annotated[
        str | None,
        typer.Option("--context", help="The same by name, see 'glidefs context'; else GLIDEFS_CONTEXT."),
    ] = None,
) -> None:
    """Fast local disks backed by an object store."""
    with reported(False):
        if (host or named) and context.invoked_subcommand in ON_THIS_HOST:
            raise ConfigError(f"{context.invoked_subcommand} works on this host alone; leave --host out")
        give(Given(Place(host or "", token_file, ca), named))


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


@app.command("completion")
def shell_completion(
    shell: Annotated[
        str, typer.Argument(metavar="SHELL", help=f"{', '.join(completion.SHELLS)}.", show_default=False)
    ],
) -> None:
    """Print what makes a shell complete commands and names: source <(glidefs completion bash)."""
    with reported(False):
        print(completion.script(shell))


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
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help="Name of the base.", show_default=False, autocompletion=completion.bases
        ),
    ],
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


def run_command(args: Sequence[str]) -> None:
    """Run ``args``, the words behind `glidefs`. Ends the process."""
    if completion.is_asked():
        app(prog_name=completion.PROGRAM)
    narrow(app, args)
    app(list(args))
