"""The ublk driver of this kernel: whether it is there, sound and allowed. Loads it if it can."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from glidefs.transport.device.module import load_module
from glidefs.transport.ublk.kernels import ublk_refused

UBLK_CONTROL = Path("/dev/ublk-control")


def ublk_missing(allow_kernel: str | None = None) -> str | None:
    """Why this process cannot use ublk, in one line with the remedy; None if it can try.

    ``allow_kernel``: a release that the operator vouches for.
    """
    refused = ublk_refused(platform.release(), allow_kernel)
    if refused is not None:
        return refused
    if not UBLK_CONTROL.exists():
        tried = load_module("ublk_drv")
        if not UBLK_CONTROL.exists():
            return f"{UBLK_CONTROL} does not exist{tried} (CONFIG_BLK_DEV_UBLK, Linux 6.1 or later)"
    if not os.access(UBLK_CONTROL, os.R_OK | os.W_OK):
        return f"no permission for {UBLK_CONTROL}, run the daemon as root"
    return None
