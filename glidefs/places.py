"""Where the configuration and the control socket are: all that a command must know to ask the daemon.

A module of its own, because most commands do nothing else with the configuration, and to define and
check all of its keys takes longer than they do.
"""

from __future__ import annotations

import os
from pathlib import Path

DEFAULT_CONFIG = "/etc/glidefs/glidefs.toml"
DEFAULT_SOCKET = "/run/glidefs/api.sock"
MAX_SOCKET_PATH = 107
"""Bytes; see unix(7)."""


def config_path(explicit: str | None = None) -> Path:
    """The file to read: `--config`, else GLIDEFS_CONFIG, else the system-wide one."""
    return Path(explicit or os.environ.get("GLIDEFS_CONFIG") or DEFAULT_CONFIG)


def resolved(path: str, base: Path | None) -> str:
    """A path of a configuration file; a relative one counts from ``base``. Raises ValueError."""
    if "\0" in path:
        raise ValueError("a path cannot contain a NUL byte")
    expanded = Path(path).expanduser()
    return str(base / expanded) if base and path else str(expanded) if path else path


def api_socket(config: Path) -> str | None:
    """The control socket that a configuration file names, or the default; of the rest nothing is checked.

    None: it does not say one that could be right, and :func:`glidefs.config.load_config` says why.
    """
    import tomllib

    try:
        section = tomllib.loads(config.read_text(encoding="utf-8")).get("api", {})
        if isinstance(section, dict) and "socket" not in section:
            return DEFAULT_SOCKET
        found = resolved(section["socket"], config.resolve().parent)
    except (OSError, ValueError, TypeError, RuntimeError):
        return None
    return found if 0 < len(os.fsencode(found)) <= MAX_SOCKET_PATH else None
