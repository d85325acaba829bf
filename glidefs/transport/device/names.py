"""Names for udev: `/run/glidefs/ublk/N` says which export `/dev/ublkbN` is; `nbd/N` there, `/dev/nbdN`.

The file is there before the kernel shows the device, so that the rule (`packaging/60-glidefs.rules`) needs no
program and no daemon to name it `/dev/glidefs/EXPORT`. N is a symbolic link to a file `N.KEY` with two lines,
`GLIDEFS_NAME` and `GLIDEFS_KEY`; the key is of this one device. udev remembers it, and when the device goes,
whoever removed it, its rule deletes `N.KEY`: the next device of that number gets no name that was meant for
another, and one that we made meanwhile keeps its own, because the link leads to another file.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

log = logging.getLogger(__name__)

DIRECTORY = Path("/run/glidefs")
"""Where the rule looks. One for all daemons of a host: device numbers are the host's, too."""
MAX_FILE = 4096


class DeviceNames:
    """The files of devices of one ``kind``. Where they cannot be written, devices just have no names.

    Only the owner of a device, from ADD_DEV to DEL_DEV, calls anything for its number.
    """

    def __init__(self, kind: Literal["ublk", "nbd"], directory: Path = DIRECTORY) -> None:
        self._kind = kind
        self._directory = directory / kind

    def announce(self, dev_id: int, name: str) -> str:
        """Say that device ``dev_id`` is export ``name``. Returns the key; that of before if it was said."""
        said, key = self.read(dev_id)
        if said == name and key:
            return key
        key = secrets.token_hex(8)
        target = self._directory / f"{dev_id}.{key}"
        fresh = self._directory / f".{dev_id}.{key}"
        try:
            self._directory.mkdir(mode=0o755, parents=True, exist_ok=True)
            target.write_text(f"GLIDEFS_NAME={name}\nGLIDEFS_KEY={key}\n", encoding="ascii")
            fresh.symlink_to(target.name)
            os.replace(fresh, self._directory / str(dev_id))
        except OSError as error:
            log.warning(
                "%s: no name for %s device %d in %s: %s", name, self._kind, dev_id, self._directory, error
            )
        return key

    def withdraw(self, dev_id: int, key: str) -> None:
        """The device is gone. Its number may be another's by now; the link, which leads nowhere, stays."""
        with contextlib.suppress(OSError):
            (self._directory / f"{dev_id}.{key}").unlink()

    def sweep(self, present: Iterable[int]) -> None:
        """Forget devices that are not there: they went while nobody was looking."""
        there = {str(dev_id) for dev_id in present}
        with contextlib.suppress(OSError):
            for path in self._directory.iterdir():
                if path.name.lstrip(".").split(".")[0] not in there:
                    path.unlink(missing_ok=True)

    def read(self, dev_id: int) -> tuple[str, str]:
        """Name and key of device ``dev_id``, empty where nothing was said."""
        try:
            with (self._directory / str(dev_id)).open(encoding="utf-8", errors="replace") as file:
                lines = file.read(MAX_FILE).splitlines()
        except OSError:
            return "", ""
        found = dict(line.split("=", 1) for line in lines if "=" in line)
        return found.get("GLIDEFS_NAME", ""), found.get("GLIDEFS_KEY", "")
