"""How a successor is started: the program of its predecessor, as it is on the disk now, and nothing else.

A daemon runs as root, and may have been started anywhere. `python -m` imports from the working directory
first, so one with a `glidefs/` or a `boto3.py` in it would be run as root by the next handoff. Hence `-P`,
which leaves it out, "/" to work in, and of PYTHONPATH only what this process was made of: a daemon that was
started in a source tree (`python -m glidefs run`) hands over to a process of that tree.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

FD_VARIABLE = "GLIDEFS_HANDOFF_FD"
"""In the environment of a successor: its end of the socket."""
PARENT_VARIABLE = "GLIDEFS_HANDOFF_PARENT"
"""Its predecessor's process id."""
INSTALLED = ("site-packages", "dist-packages")
"""Names of places where the interpreter looks by itself."""


def start(config_file: str, fd: int) -> subprocess.Popen[bytes]:
    """Start the successor; it inherits ``fd``. Raises OSError."""
    return subprocess.Popen(
        command(config_file),
        env=environment(os.environ) | {FD_VARIABLE: str(fd), PARENT_VARIABLE: str(os.getpid())},
        pass_fds=[fd],
        stdin=subprocess.DEVNULL,
        cwd="/",
    )


def command(config_file: str) -> list[str]:
    """What is run: the same interpreter, without the working directory among what it imports from."""
    user_site = ["-s"] if sys.flags.no_user_site else []
    return [sys.executable, "-P", *user_site, "-m", "glidefs", "run", "--config", config_file]


def environment(given: Mapping[str, str]) -> dict[str, str]:
    """That of this process, with the places in PYTHONPATH that this program came from, all absolute."""
    own = {key: value for key, value in given.items() if key != "PYTHONPATH"}
    if sys.flags.ignore_environment:  # as it was for this process
        own = {key: value for key, value in own.items() if not key.startswith("PYTHON")}
    if places := told_places(given):
        own["PYTHONPATH"] = os.pathsep.join(places)
    return own


def told_places(given: Mapping[str, str]) -> list[str]:
    """Directories that the start of this process named and that it has imported from.

    They are PYTHONPATH, and for the package itself the first place: of `python -m glidefs` in a source tree.
    """
    told: list[str] = []
    root = os.path.realpath(Path(__file__).absolute().parents[2])
    first = "" if sys.flags.safe_path else sys.path[0]
    if os.path.isabs(first) and os.path.realpath(first) == root and Path(first).name not in INSTALLED:
        told.append(first)
    if given.get("PYTHONPATH") and not sys.flags.ignore_environment:
        named = {os.path.realpath(entry) for entry in given["PYTHONPATH"].split(os.pathsep)}
        told += [entry for entry in sys.path if os.path.realpath(entry) in named and _is_used(entry)]
    return list(dict.fromkeys(told))


def _is_used(entry: str) -> bool:
    return os.path.isabs(entry) and os.path.realpath(entry) in _places_of_modules()


def _places_of_modules() -> set[str]:
    """Directories from which the modules of this process were imported."""
    places = set()
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if "." not in name and isinstance(file, str):
            place = Path(file).absolute().parent
            places.add(os.path.realpath(place.parent if hasattr(module, "__path__") else place))
    return places
