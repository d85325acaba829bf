"""Threads that leave the CPU to the data path."""

from __future__ import annotations

import logging
import os
import threading

from glidefs.core._core import lib

log = logging.getLogger(__name__)


def lower_priority(nice: int) -> None:
    """Make the calling thread yield to others: niceness and the length of turns are per thread on Linux.

    A turn of the usual 3 ms of an upload is what requests wait for where there is no CPU to spare.
    """
    err = lib.glide_lower_priority(nice)
    if err:
        name, why = threading.current_thread().name, os.strerror(-err)
        log.debug("cannot lower the priority of %s: %s", name, why)
