"""What the commands share: errors as one line, the connection to the daemon. No option, and no Typer."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from glidefs.api.client import Client, socket_path
from glidefs.cli import output
from glidefs.cli.target import remote


@contextmanager
def reported(as_json: bool) -> Iterator[None]:
    """Turn errors into one line on stderr (and the JSON document), exit code 1."""
    try:
        yield
    except KeyboardInterrupt:
        output.fail(
            InterruptedError(None, "interrupted; the daemon may still finish the command"), as_json, 130
        )
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise SystemExit(1) from None
    except Exception as error:
        if os.environ.get("GLIDEFS_TRACEBACK"):
            raise
        output.fail(error, as_json)


def connect(config: str | None) -> Client:
    """The daemon that options, environment, context or configuration name, in this order."""
    return remote(config) or Client(socket_path(config))


def seconds(text: str | None) -> float | None:
    """A duration option. Raises ConfigError."""
    from glidefs.config import parse_duration
    from glidefs.errors import ConfigError

    try:
        return None if text is None else parse_duration(text)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def show_result(value: dict[str, Any], as_json: bool, line: str) -> None:
    """The JSON document, or one line for people."""
    if as_json:
        output.emit(value)
    else:
        print(f"{output.printable(line)}\n", end="", flush=True)  # in one piece: threads do this
    if value.get("note"):
        output.say(f"note: {value['note']}")
