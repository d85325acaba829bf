"""Which GlideFS this is: the installed version, and the commit that it was built from."""

from __future__ import annotations

import functools
import importlib
from importlib import metadata

UNKNOWN = "unknown"


@functools.cache
def version() -> str:
    """The installed version, or that of a source tree."""
    try:
        return metadata.version("glidefs")
    except metadata.PackageNotFoundError:
        return "0+source"


@functools.cache
def commit() -> str:
    """What git said of the tree when this was built (`setup.py`); "unknown" if it was not built from git."""
    try:
        return str(importlib.import_module("glidefs._commit").COMMIT)
    except (ImportError, AttributeError):
        return UNKNOWN
