"""A disk with a volatile write cache, for QEMU: nbdkit's cache filter over a raw image.

What is written stays in nbdkit's temporary file and reaches the image with a flush only, all of it. So
SIGKILL for nbdkit is a power cut of the worst kind: nothing unflushed survives.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from pathlib import Path

from waiting import wait_for


def missing() -> str:
    """Why there can be no such disk here, if so."""
    if shutil.which("nbdkit") is None:
        return "nbdkit is not installed"
    command = ["nbdkit", "--filter=cache", "file", "--dump-plugin"]
    done = subprocess.run(command, capture_output=True, check=False)
    return "" if done.returncode == 0 else "nbdkit has no cache filter"


class VolatileDisk:
    """One image and the nbdkit that serves it, if any. ``where`` has the socket and what is not flushed."""

    def __init__(self, image: Path, where: Path) -> None:
        self.image = image
        self.socket = where / f"{image.name}.sock"
        self._where = where
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        """For QEMU."""
        return f"nbd+unix:///?socket={self.socket}"

    def start(self) -> None:
        """Power on."""
        assert self._process is None
        # Blocks of 4 KiB: with larger ones the filter would read around small writes.
        options = ["cache=writeback", "cache-min-block-size=4096"]
        command = ["nbdkit", "--foreground", "--exit-with-parent", "--newstyle", "--unix", str(self.socket)]
        command += ["--filter=cache", "file", str(self.image), *options]
        self._process = subprocess.Popen(command, env={**os.environ, "TMPDIR": str(self._where)})
        wait_for(self.socket.exists, "nbdkit listens")

    def freeze(self) -> None:
        """From now on it does nothing and answers nothing."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def cut(self) -> None:
        """Power off: what was not flushed is gone. Also where it does not run."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        with contextlib.suppress(FileNotFoundError):
            self.socket.unlink()
