"""Where the exports of a host are kept, and who owns them."""

from __future__ import annotations

from pathlib import Path

from msgspec import Struct

from glidefs.manifest import lease


class RouterSettings(Struct, frozen=True):
    """Who this host is and where things are; the first of `prefixes` is the default.

    ``logs_missing`` says why the log directory is not this host's; empty if it is.
    """

    owner: lease.Owner
    exports_dir: Path
    state_dir: Path
    logs_dir: Path
    prefixes: tuple[str, ...]
    logs_missing: str = ""
