"""Completion in shells: the script for one, and the names that a daemon knows.

A shell runs the program for each word that is to be completed. What cannot be asked in time is not offered.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import typer

PROGRAM = "glidefs"
VARIABLE = "_GLIDEFS_COMPLETE"
"""Set by a shell that wants words, and how; see typer's completion scripts."""
SHELLS = ("bash", "zsh", "fish")
_PATIENCE = 2.0


def script(shell: str) -> str:
    """What a shell reads at its start. Raises ConfigError for a shell that is not known."""
    from typer.completion import get_completion_script  # type: ignore[attr-defined]

    from glidefs.errors import ConfigError

    if shell not in SHELLS:
        raise ConfigError(f"there is no completion for {shell[:40]!r}; there is for {', '.join(SHELLS)}")
    text: str = get_completion_script(prog_name=PROGRAM, complete_var=VARIABLE, shell=shell)
    # Sources have a colon in them, at which bash ends a word.
    return f"COMP_WORDBREAKS=${{COMP_WORDBREAKS//:}}\n{text}" if shell == "bash" else text


def is_asked() -> bool:
    """Whether a shell asks for words; then all that they are made of is there."""
    if VARIABLE not in os.environ:
        return False
    from typer.completion import completion_init  # type: ignore[attr-defined]

    completion_init()
    return True


def _ask(context: typer.Context, path: str) -> list[dict[str, Any]]:
    from glidefs.cli.common import connect
    from glidefs.errors import GlideError

    try:
        found: list[dict[str, Any]] = connect(context.params.get("config")).call(
            "GET", path, timeout=_PATIENCE
        )
    except (GlideError, OSError):
        return []
    return found


def _beginning(words: Iterator[str], incomplete: str, but: Sequence[str] = ()) -> list[str]:
    return sorted({word for word in words if word.startswith(incomplete)} - set(but))


def exports(context: typer.Context, incomplete: str) -> list[str]:
    """Names of exports that are not on the command line yet."""
    given = context.params.get("names") or ()
    return _beginning((e["name"] for e in _ask(context, "/api/exports")), incomplete, given)


def volumes(context: typer.Context, incomplete: str) -> list[str]:
    """Names of volumes in the store that are not served here."""
    found = (v["name"] for v in _ask(context, "/api/volumes") if not v["served_here"])
    return _beginning(found, incomplete, context.params.get("names") or ())


def tags(context: typer.Context, incomplete: str) -> list[str]:
    """Names of tags."""
    return _beginning((t["tag"] for t in _ask(context, "/api/tags")), incomplete)


def bases(context: typer.Context, incomplete: str) -> list[str]:
    """Names of bases."""
    return _beginning((b["name"] for b in _ask(context, "/api/bases") if not b["removed_at"]), incomplete)


def sources(context: typer.Context, incomplete: str) -> list[str]:
    """What `create --from` takes. Snapshots come once their volume is there."""
    kind, colon, name = incomplete.partition(":")
    if not colon:
        return _beginning(iter(("base:", "snapshot:", "tag:", "volume:")), incomplete)
    if kind == "base":
        found = bases(context, name)
    elif kind == "tag":
        found = tags(context, name)
    elif kind == "volume":
        found = _beginning((v["name"] for v in _ask(context, "/api/volumes")), name)
    elif kind == "snapshot" and "@" in name:
        from glidefs.api.client import export_path

        of = _ask(context, export_path(name.partition("@")[0], "snapshots"))
        found = _beginning((f"{s['name']}@{s['sequence']}" for s in of), name)
    elif kind == "snapshot":
        found = _beginning((f"{v['name']}@" for v in _ask(context, "/api/volumes")), name)
    else:
        found = []
    return [f"{kind}:{word}" for word in found]
