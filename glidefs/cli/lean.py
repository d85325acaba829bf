"""What keeps a command from waiting for the other commands.

Typer builds all commands of a program to run one: it evaluates the annotations of every parameter, which
takes longer than most commands.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import typer


def narrow(app: typer.Typer, args: Sequence[str]) -> None:
    """Leave of the program what runs ``args``: the command named first. All stays where that names none.

    So `--help` and what is said about an unknown command are complete.
    """
    asked = _asked(args)
    commands = [command for command in app.registered_commands if _name(command) == asked]
    groups = [group for group in app.registered_groups if group.name == asked]
    if commands or groups:
        app.registered_commands, app.registered_groups = commands, groups


def _asked(args: Sequence[str]) -> str:
    """The command that is named: the first word that is neither an option before it nor the value of one."""
    words = iter(args)
    for word in words:
        if not word.startswith("-"):
            return word
        if "=" not in word:
            next(words, None)
    return ""


def _name(command: Any) -> str:
    return str(command.name or command.callback.__name__.replace("_", "-"))
