"""Gives files to the disk before anybody waits for it."""

from __future__ import annotations

import os
from pathlib import Path

from glidefs.core._core import lib


def write_out(path: Path) -> None:
    """Begin to write what is dirty of a file; waits for a busy disk. Syncs nothing, reports no lost writes.

    Raises OSError.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    try:
        err = lib.glide_write_out(fd)
    finally:
        os.close(fd)
    if err:
        raise OSError(-err, os.strerror(-err), os.fspath(path))
