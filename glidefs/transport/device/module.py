"""Loads a driver of the kernel, once for each process."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading

MODPROBE_TIMEOUT = 20.0

_lock = threading.Lock()
_results: dict[str, str] = {}


def load_module(name: str, *options: str) -> str:
    """Try modprobe, unless that was done; what came of it, as the rest of a sentence."""
    with _lock:
        if name not in _results:
            _results[name] = _modprobe(name, options)
        return _results[name]


def _modprobe(name: str, options: tuple[str, ...]) -> str:
    command = f"modprobe {name}"
    if os.geteuid() != 0:
        return f" and only root can load the driver: '{command}'"
    program = shutil.which("modprobe", path="/usr/sbin:/sbin:/usr/bin:/bin")
    if program is None:
        return f" and there is no modprobe to load {name} with"
    try:
        done = subprocess.run(
            [program, name, *options], capture_output=True, timeout=MODPROBE_TIMEOUT, check=False, text=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        return f" and '{command}' failed ({error})"
    if done.returncode:
        return f" and '{command}' found no driver for this kernel"
    return f" although '{command}' worked (is /dev complete in this container?)"
