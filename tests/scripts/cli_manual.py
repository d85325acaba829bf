"""docs/cli.md from the command line itself: `python tests/scripts/cli_manual.py` rewrites it.

Rendered from the commands' own tables rather than from the text of --help, whose layout changes
between versions of click.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import typer

ROOT = Path(__file__).resolve().parents[2]
MANUAL = ROOT / "docs" / "cli.md"

INTRO = """\
# Commands

Made from the commands themselves by `tests/scripts/cli_manual.py`; a test compares.

Every command but `run` has `--json`: one JSON document on stdout. Progress and notes go to stderr. A
command that fails prints one line with the reason and what to do about it, and exits non-zero. Commands
that speak to the daemon find it through `GLIDEFS_SOCKET`, or through the configuration: `--config`,
`GLIDEFS_CONFIG`, or the system-wide file. `GLIDEFS_TRACEBACK=1` shows where an error came from.

`ls` and `rm` are `list` and `remove`. `drain`, `detach`, `attach`, `remove` and `create --count` take several
exports, eight at a time: one that fails is a line on stderr and keeps no other from it, and the exit status
is 1. Their JSON document is then `{"drained": [...], "failed": [{"name", "error", "hint"}]}`, with the word
for the verb. `source <(glidefs completion bash)` completes commands, exports, volumes, tags, bases and
snapshots; there is `zsh` and `fish`, too. Times are RFC 3339, in UTC.
"""


def commands() -> dict[str, Any]:
    """Every command by its full name, "logs export" included."""
    from glidefs.cli.main import app

    found: dict[str, Any] = {}

    def visit(name: str, command: Any) -> None:
        children = getattr(command, "commands", None)
        if children is None or command.callback is not None:
            found[name] = command
        for child, inner in (children or {}).items():
            visit(f"{name} {child}", inner)

    for name, command in typer.main.get_command(app).commands.items():
        if not command.hidden:
            visit(f"glidefs {name}", command)
    return found


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _default(parameter: Any) -> str:
    value = parameter.default
    if getattr(parameter, "is_flag", False) or not isinstance(value, str | int | float | Path):
        return ""
    return f" Default: `{value}`."


def render() -> str:
    """The whole manual."""
    parts = [INTRO]
    for name, command in commands().items():
        options = [p for p in command.params if p.param_type_name == "option" and "--help" not in p.opts]
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        usage = [(p.metavar or p.name.upper()) for p in arguments]
        parts.append(f"\n## {name}\n")
        parts.append(f"`{' '.join([name, *usage])}`: {_cell(command.help or '')}\n")
        rows = [(f"`{p.metavar or p.name.upper()}`", p.help or "", p) for p in arguments]
        rows += [
            (", ".join(f"`{opt}`" for opt in [*p.opts, *p.secondary_opts]), p.help or "", p) for p in options
        ]
        if rows:
            parts.append("| | |\n|---|---|")
            for left, text, parameter in rows:
                needed = " Required." if parameter.required and parameter in options else ""
                parts.append(f"| {left} | {_cell(text)}{needed}{_default(parameter)} |")
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    MANUAL.write_text(render(), encoding="utf-8")
