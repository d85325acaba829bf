"""The manual, from the command line itself: docs/cli.md and the man pages.

``python -m glidefs.cli.manual FILE.md`` writes the first, the same with a directory the others.
Made of the commands' own tables and not of the text of --help, whose layout changes between versions.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import typer

INTRO = """\
# Commands

Made from the commands themselves by `python -m glidefs.cli.manual`; a test compares.

Every command but `run` has `--json`: one JSON document on stdout. Progress and notes go to stderr. A
command that fails prints one line with the reason and what to do about it, and exits non-zero. Commands
that speak to the daemon find it through `GLIDEFS_SOCKET`, or through the configuration: `--config`,
`GLIDEFS_CONFIG`, or the system-wide file. With `--host https://HOST:PORT` before the command, or with
`GLIDEFS_HOST`, they speak to a daemon on another host; `--token-file` (`GLIDEFS_TOKEN_FILE`) names the file
with the token, `--ca` (`GLIDEFS_CA`) the CA to trust, `GLIDEFS_CERT` and `GLIDEFS_KEY` a certificate for a
daemon that wants one. `--context` (`GLIDEFS_CONTEXT`) takes all of this from a context. Paths of `logs
export` are those of the daemon's host. `GLIDEFS_TRACEBACK=1` shows where an error came from.

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

    program: Any = typer.main.get_command(app)
    for name, command in program.commands.items():
        if not command.hidden:
            visit(f"glidefs {name}", command)
    return found


def _parameters(command: Any) -> tuple[list[Any], list[Any]]:
    """Arguments and options of a command, without --help."""
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and "--help" not in p.opts]
    return arguments, options


def _rows(parameters: list[Any]) -> list[tuple[list[str], str, Any]]:
    """For each: how it is written, and what it is."""
    return [
        (
            [p.metavar or p.name.upper()]
            if p.param_type_name == "argument"
            else [*p.opts, *p.secondary_opts],
            p.help or "",
            p,
        )
        for p in parameters
    ]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _default(parameter: Any) -> str:
    value = parameter.default
    if getattr(parameter, "is_flag", False) or not isinstance(value, str | int | float | Path):
        return ""
    return f" Default: `{value}`."


def markdown() -> str:
    """All of docs/cli.md."""
    parts = [INTRO]
    for name, command in commands().items():
        arguments, options = _parameters(command)
        usage = [(p.metavar or p.name.upper()) for p in arguments]
        parts.append(f"\n## {name}\n")
        parts.append(f"`{' '.join([name, *usage])}`: {_cell(command.help or '')}\n")
        rows = _rows([*arguments, *options])
        if rows:
            parts.append("| | |\n|---|---|")
        for words, text, parameter in rows:
            left = ", ".join(f"`{word}`" for word in words)
            needed = " Required." if parameter.required and parameter in options else ""
            parts.append(f"| {left} | {_cell(text)}{needed}{_default(parameter)} |")
    return "\n".join(parts) + "\n"


# -- man pages -------------------------------------------------------------------------------------


def man_pages() -> dict[str, str]:
    """A page of section 1 for the program and for each command, by file name."""
    every = commands()
    pages = {f"{_page(name)}.1": _man_page(name, command) for name, command in every.items()}
    paragraphs = [part for part in INTRO.split("\n\n")[1:] if not part.startswith("Made from")]
    lines = [
        *_title("glidefs", "fast local disks backed by an object store"),
        ".SH SYNOPSIS",
        ".B glidefs",
        ".I COMMAND",
        "[options]",
        ".SH DESCRIPTION",
        *("\n.PP\n".join(_roff(" ".join(part.split()).replace("`", "")) for part in paragraphs)).split("\n"),
        ".SH COMMANDS",
    ]
    for name, command in every.items():
        lines += [".TP", f".BR {_page(name)} (1)", _roff(" ".join((command.help or "").split()))]
    return pages | {"glidefs.1": "\n".join(lines) + "\n"}


def _page(name: str) -> str:
    return name.replace(" ", "-")


def _title(name: str, what: str) -> list[str]:
    page = _page(name)
    heading = rf"{_roff(page)} \- {_roff(what)}"
    return [f'.TH "{page.upper()}" 1 "" "GlideFS"', ".SH NAME", heading]


def _man_page(name: str, command: Any) -> str:
    summary, _, more = (command.help or "").strip().partition("\n\n")
    arguments, options = _parameters(command)
    usage = " ".join(p.metavar or p.name.upper() for p in arguments)
    lines = [
        *_title(name, " ".join(summary.split()).rstrip(".")),
        ".SH SYNOPSIS",
        f".B {_roff(name)}",
        f"[options] {_roff(usage)}".rstrip(),
        ".SH DESCRIPTION",
        _roff(" ".join(summary.split())),
    ]
    if more:
        lines += [".PP", _roff(" ".join(more.split()))]
    for heading, parameters in ((".SH ARGUMENTS", arguments), (".SH OPTIONS", options)):
        lines += [heading] if parameters else []
        for left, text, parameter in _rows(parameters):
            shown = ", ".join(rf"\fB{_roff(word)}\fR" for word in left)
            lines += [".TP", shown, _roff(f"{' '.join(text.split())}{_default(parameter)}".replace("`", ""))]
    lines += [".SH SEE ALSO", ".BR glidefs (1)"]
    return "\n".join(line for line in lines if line) + "\n"


def _roff(text: str) -> str:
    escaped = text.replace("\\", r"\e").replace("-", r"\-")
    return rf"\&{escaped}" if escaped[:1] in (".", "'") else escaped


def main(target: str) -> None:
    """Write the manual: a file gets Markdown, a directory man pages."""
    path = Path(target)
    if path.suffix == ".md":
        path.write_text(markdown(), encoding="utf-8")
        return
    path.mkdir(parents=True, exist_ok=True)
    for name, text in man_pages().items():
        (path / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
