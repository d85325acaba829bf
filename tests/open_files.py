"""Files that a process has open and that have no name any more."""

from __future__ import annotations

import os
from pathlib import Path


def open_below(pid: int, directory: Path) -> Path:
    """The one file that process ``pid`` has open below ``directory``, as a path that can be opened."""
    fds = Path(f"/proc/{pid}/fd").iterdir()
    (found,) = [fd for fd in fds if os.path.realpath(fd).startswith(str(directory))]
    return found
