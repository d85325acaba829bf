"""Which daemon a command is for: that of this host, or one that options, environment or a context name.

It is on the way of every command, so nothing is imported that a command for this host does not need.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from glidefs.errors import ConfigError

if TYPE_CHECKING:
    from glidefs.api.client import Client

HERE = "local"
"""The context that is the daemon of this host; no other may have this name."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


class Place(NamedTuple):
    """A daemon on another host; see :class:`glidefs.api.remote.RemoteClient`."""

    host: str = ""
    token_file: str | None = None
    ca: str | None = None
    cert: str | None = None
    key: str | None = None


class Given(NamedTuple):
    """What the options before the command say."""

    place: Place = Place()
    context: str | None = None


given = Given()
"""Set once, before a command runs."""


def give(options: Given) -> None:
    """The options before the command. Raises ConfigError for two that exclude each other."""
    global given
    if options.place.host and options.context:
        raise ConfigError("--host and --context both name a daemon; leave one out")
    given = options


def remote(config: str | None) -> Client | None:
    """The daemon on another host that the command is for; None: the one of this host. Raises ConfigError.

    ``config``: the configuration that the command names, which is one of this host.
    """
    place = _place(config)
    files = {name: value for name, value in given.place._asdict().items() if value and name != "host"}
    if place is None:
        if files:
            raise ConfigError("--token-file and --ca are for a daemon on another host; add --host")
        return None
    from glidefs.api.remote import RemoteClient

    return RemoteClient(*place._replace(**files))


def _place(config: str | None) -> Place | None:
    environment = os.environ
    if given.place.host or given.context:
        if config is not None:
            raise ConfigError("--config is for the daemon of this host; leave it or --host out")
        return _with_environment(given.place) if given.place.host else _of_context(given.context or "")
    if config is not None:
        return None
    if environment.get("GLIDEFS_HOST"):
        return _with_environment(Place(environment["GLIDEFS_HOST"]))
    if environment.get("GLIDEFS_CONTEXT"):
        return _of_context(environment["GLIDEFS_CONTEXT"])
    if environment.get("GLIDEFS_SOCKET") or environment.get("GLIDEFS_CONFIG"):
        return None
    path = contexts_path()
    return _of_context(str(read_contexts(path)["current"])) if os.path.exists(path) else None


def _with_environment(place: Place) -> Place:
    """With the files that the environment names. A context has its own: no host gets another's token."""
    names = ("token_file", "ca", "cert", "key")
    return Place(
        place.host, *(getattr(place, name) or os.environ.get(f"GLIDEFS_{name.upper()}") for name in names)
    )


def _of_context(name: str) -> Place | None:
    if name == HERE:
        return None
    places: dict[str, Place] = read_contexts(contexts_path())["contexts"]
    if name not in places:
        raise ConfigError(f"there is no context {name[:64]!r}; 'glidefs context list' shows those there are")
    return places[name]


# -- the file of contexts ----------------------------------------------------------------------------


def contexts_path() -> str:
    """Where the contexts of this user are."""
    base = os.environ.get("XDG_CONFIG_HOME") or os.path.join(os.path.expanduser("~"), ".config")
    return os.path.join(base, "glidefs", "contexts.toml")


def read_contexts(path: str) -> dict[str, Any]:
    """{"current": name, "contexts": {name: Place}}. Raises ConfigError naming the file."""
    import tomllib

    if not os.path.exists(path):
        return {"current": HERE, "contexts": {}}
    try:
        raw = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        places = {name: Place(**fields) for name, fields in raw.get("context", {}).items()}
        current = raw.get("current", HERE)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: {error}; correct it, or delete it") from None
    if not isinstance(current, str) or not all(
        isinstance(value, str | None) for place in places.values() for value in place
    ):
        raise ConfigError(f"{path}: every value is a text; correct it, or delete it")
    return {"current": current, "contexts": places}


def write_contexts(path: str, current: str, places: dict[str, Place]) -> None:
    """Replace the file; a reader sees the old or the new one. Raises OSError."""
    import json

    from glidefs.formats.atomic import make_directory, write_file_atomic

    lines = [f"current = {json.dumps(current)}"]
    for name, place in sorted(places.items()):
        lines += ["", f"[context.{name}]"]
        lines += [
            f"{key} = {json.dumps(value)}" for key, value in place._asdict().items() if value is not None
        ]
    make_directory(os.path.dirname(path))
    write_file_atomic(path, ("\n".join(lines) + "\n").encode())


def check_context_name(name: str) -> str:
    """A name that a context may have. Raises ConfigError."""
    if name == HERE or not _NAME.fullmatch(name):
        raise ConfigError(f"{name[:64]!r} cannot be the name of a context; use letters, digits, '_' and '-'")
    return name
