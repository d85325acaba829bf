"""`glidefs token`: a token for a client of the API over TCP."""

from __future__ import annotations

import re
import time
from typing import Annotated

import typer

from glidefs.cli import output
from glidefs.cli.common import reported
from glidefs.cli.options import Json


def token(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="Who is to have it: a word for the log.", show_default=False)
    ],
    scope: Annotated[
        list[str],
        typer.Option("--scope", help="metrics, read, operate or admin; may be repeated.", show_default=False),
    ],
    expires: Annotated[
        str | None,
        typer.Option("--expires", help='When: days from now, such as "90d", or a time; else never.'),
    ] = None,
    file: Annotated[
        str | None, typer.Option("--file", metavar="FILE", help="Add its entry to this tokens_file.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a token for the API over TCP and print it, this once; needs no daemon.

    Its entry for [api] tokens_file has the hash alone. The daemon takes it within a second.
    """
    with reported(as_json):
        from glidefs.api import tokens
        from glidefs.api.access import WORDS
        from glidefs.errors import ConfigError

        try:
            tokens.check_token_name(name)
        except ValueError as error:
            raise ConfigError(f"{name[:64]!r} cannot be the name of a token: {error}") from None
        if unknown := [word for word in scope if word not in WORDS]:
            raise ConfigError(f"there is no scope {unknown[0][:40]!r}; choose of {', '.join(WORDS)}")
        until = None if expires is None else _time(expires)
        made = tokens.new_token()
        entry = tokens.entry_text(name, made, list(dict.fromkeys(scope)), until)
        if file is not None:
            tokens.append_entry(file, name, entry)
        if as_json:
            output.emit({"name": name, "token": made, "entry": entry, "file": file})
            return
        print(made)
        if file is None:
            output.say("its entry for [api] tokens_file, which is not printed again:")
            print(f"\n{entry}", end="")
        else:
            output.say(f"{file} has its entry; the token is not printed again")


def _time(text: str) -> float:
    """Unix seconds of "90d" from now, or of a time of RFC 3339. Raises ConfigError."""
    from glidefs.api.tokens import unix_time
    from glidefs.errors import ConfigError

    if found := re.fullmatch(r"(\d{1,5})d", text.strip(), re.ASCII):
        return float(int(time.time()) + int(found[1]) * 86400)
    try:
        return unix_time(text)
    except ValueError:
        why = "write days as '90d', or a time as '2027-01-31T00:00:00Z'"
        raise ConfigError(f"{text[:40]!r} is not when a token can expire; {why}") from None


def add_commands(app: typer.Typer) -> None:
    """The command of this module."""
    app.command()(token)
