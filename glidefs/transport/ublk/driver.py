"""The ublk driver of this kernel: whether it is there, sound and allowed. Loads it if it can."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import threading
from pathlib import Path

from glidefs.transport.ublk.kernels import ublk_refused

UBLK_CONTROL = Path("/dev/ublk-control")
MODPROBE_TIMEOUT = 20.0


def ublk_missing(allow_kernel: str | None = None) -> str | None:
    """Why this process cannot use ublk, in one line with the remedy; None if it can try.

    ``allow_kernel``: a release that the operator vouches for.
    """
    refused = ublk_refused(platform.release(), allow_kernel)
    if refused is not None:
        return refused
    if not UBLK_CONTROL.exists():
        tried = _load_driver()
        if not UBLK_CONTROL.exists():
            return f"{UBLK_CONTROL} does not exist{tried}"
    if not os.access(UBLK_CONTROL, os.R_OK | os.W_OK):
        return f"no permission for {UBLK_CONTROL}, run the daemon as root"
    return None


_modprobe_lock = threading.Lock()
_modprobe_result: list[str] = []


def _load_driver() -> str:
    """Try modprobe once per process; what came of it, as the rest of a sentence."""
    with _modprobe_lock:
        if not _modprobe_result:
            _modprobe_result.append(_modprobe())
        return _modprobe_result[0]


def _modprobe() -> str:
    if os.geteuid() != 0:
        return " and only root can load the driver: 'modprobe ublk_drv' (Linux 6.1 or later)"
    program = shutil.which("modprobe", path="/usr/sbin:/sbin:/usr/bin:/bin")
    if program is None:
        return " and there is no modprobe to load ublk_drv with"
    try:
        done = subprocess.run(
            [program, "ublk_drv"], capture_output=True, timeout=MODPROBE_TIMEOUT, check=False, text=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        return f" and 'modprobe ublk_drv' failed ({error})"
    if done.returncode:
        return " and 'modprobe ublk_drv' found no driver for this kernel (CONFIG_BLK_DEV_UBLK, Linux 6.1)"
    return " although 'modprobe ublk_drv' worked (is /dev complete in this container?)"
