"""What keeps a command from waiting for the other commands, and for modules that it does not need.

Typer builds all commands of a program to run one: it evaluates the annotations of every parameter, which
takes longer than most commands. And it has pydantic check every value, also texts, which need no check,
and options that were not given; to import that takes as long again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup


class _Value:
    """Typer's check of a parameter, made only for a value that needs one."""

    def __init__(self, kind: object) -> None:
        self._kind = kind

    def coerce(self, value: Any, param: Any, ctx: Any) -> Any:
        """The value as the command takes it."""
        if value is None or (self._kind is str and isinstance(value, str)):
            return value
        param._runtime_param = None  # typer makes its own
        return param.get_runtime_param().coerce(value, param=param, ctx=ctx)


def _relieved(params: list[Any]) -> list[Any]:
    """Versions of typer without these names check values in another way, without pydantic."""
    for param in params:
        kind = getattr(getattr(param, "type_descriptor", None), "annotation", None)
        unmade = getattr(param, "_runtime_param", param) is None
        if kind is not None and unmade and param.nargs == 1 and not param.multiple:
            param._runtime_param = _Value(kind)
    return params


class LeanCommand(TyperCommand):
    """A command whose texts are taken as they are."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Its parameters, that of `--help` among them."""
        return _relieved(super().get_params(ctx))


class LeanGroup(TyperGroup):
    """The same of a group's own parameters."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Its parameters, that of `--help` among them."""
        return _relieved(super().get_params(ctx))


def narrow(app: typer.Typer, args: Sequence[str]) -> None:
    """Leave of the program what runs ``args``: the command named first. All stays where that names none.

    So `--help` and what is said about an unknown command are complete.
    """
    asked = args[0] if args else ""
    commands = [command for command in app.registered_commands if _name(command) == asked]
    groups = [group for group in app.registered_groups if group.name == asked]
    if commands or groups:
        app.registered_commands, app.registered_groups = commands, groups
    _lean(app)


def _lean(app: typer.Typer) -> None:
    app.info.cls = LeanGroup
    for command in app.registered_commands:
        command.cls = LeanCommand
    for group in app.registered_groups:
        if group.typer_instance is not None:
            _lean(group.typer_instance)


def _name(command: Any) -> str:
    return str(command.name or command.callback.__name__.replace("_", "-"))
