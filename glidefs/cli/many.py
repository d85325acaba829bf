"""One verb on several exports: side by side, each failure a line of its own, one exit status."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from glidefs.api.client import Client
from glidefs.cli import output
from glidefs.cli.common import show_result
from glidefs.errors import ConfigError, GlideError

AT_ONCE = 8
Call = Callable[[str], dict[str, Any]]


def chosen(client: Client, names: Sequence[str] | None, every: bool) -> list[str]:
    """The exports that are meant: those named, or all of this host. Raises ConfigError."""
    if bool(names) == every:
        raise ConfigError("name one or more exports, or use --all for every export of this host")
    if names:
        return list(dict.fromkeys(names))
    return [export["name"] for export in client.call("GET", "/api/exports")]


def carry_out(
    names: Sequence[str],
    call: Call,
    line: Callable[[str, dict[str, Any]], str],
    *,
    done: str,
    as_json: bool,
    several: bool,
    nothing: str = "nothing to do: this host has no exports",
) -> None:
    """Call ``call`` for each name and say what became of it; exit status 1 if one failed.

    The answer for one name is the JSON document, unless ``several`` could have been meant. Otherwise that is
    ``{done: [answers], "failed": [{"name", "error", "hint"}]}``. ``nothing`` is said where there are no
    names. Raises what ``call`` does for the one name.
    """
    if len(names) == 1 and not several:
        (name,) = names
        result = call(name)
        show_result(result, as_json, line(name, result))
        return
    answers: dict[str, dict[str, Any]] = {}
    failed: dict[str, dict[str, Any]] = {}

    def one(name: str) -> None:
        try:
            answers[name] = result = call(name)
            if not as_json:
                show_result(result, False, line(name, result))
        except (GlideError, OSError) as error:
            reason, hint = output.split_reason(error)
            failed[name] = {"name": name, "error": reason, "hint": hint}
            output.say(f"{name}: {reason}" + (f"; {hint}" if hint else ""))

    side_by_side(names, one)
    if as_json:
        output.emit(
            {
                done: [answers[name] for name in names if name in answers],
                "failed": [failed[name] for name in names if name in failed],
            }
        )
    elif not names:
        output.say(nothing)
    if failed:
        raise SystemExit(1)


def side_by_side(names: Sequence[str], one: Callable[[str], None]) -> None:
    """Call ``one`` for each name on a few threads. They are daemons: an interrupted command ends at once."""
    left = deque(names)

    def work() -> None:
        while left:
            try:
                name = left.popleft()
            except IndexError:
                return
            one(name)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(AT_ONCE, len(names)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():
            thread.join(0.2)  # in pieces: an interrupt comes in between
