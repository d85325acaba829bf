"""A program with the verbs that the unit calls, whose handoff is nothing but its steps as systemd sees them.

    fake_daemon.py run -c STATE         prints its pid into STATE/server, is ready
    fake_daemon.py handoff -c STATE     ends when another process serves, or with 1

A file STATE/die makes a successor die before it serves; STATE/hang makes it warm up for ever.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path


def notify(*lines: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.connect(os.environ["NOTIFY_SOCKET"])
        channel.sendall("\n".join(lines).encode())


def barrier() -> None:
    """Wait until systemd has read what was sent: sd_notify_barrier(3)."""
    reading, writing = os.pipe()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.connect(os.environ["NOTIFY_SOCKET"])
        socket.send_fds(channel, [b"BARRIER=1"], [writing])
    os.close(writing)
    os.read(reading, 1)


def serve(state: Path, *ready: str) -> None:
    """``ready``: what systemd is told as soon as a handoff may begin."""
    wanted: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    signal.signal(signal.SIGHUP, lambda *_: wanted.append(1))
    (state / "server").write_text(str(os.getpid()))
    if ready:
        notify(*ready)
    while True:
        if wanted:
            wanted.clear()
            reading, writing = os.pipe()
            command = [sys.executable, __file__, "successor", "-c", str(state), str(writing)]
            child = subprocess.Popen(command, pass_fds=[writing])
            os.close(writing)
            (state / "successor").write_text(str(child.pid))
            if os.read(reading, 1):
                os._exit(0)
            child.wait()
            (state / "failed").touch()
        time.sleep(0.02)


def main() -> None:
    verb, state = sys.argv[1], Path(sys.argv[3])
    if verb == "run":
        serve(state, "READY=1")
    elif verb == "successor":
        while (state / "hang").exists():
            time.sleep(0.02)
        if (state / "die").exists():
            sys.exit(1)
        notify(f"MAINPID={os.getpid()}")
        barrier()
        os.write(int(sys.argv[4]), b"!")
        os.close(int(sys.argv[4]))
        serve(state)
    else:
        (state / "failed").unlink(missing_ok=True)
        before = (state / "server").read_text()
        os.kill(int(before), signal.SIGHUP)
        while (state / "server").read_text() in ("", before):
            if (state / "failed").exists():
                sys.exit("the successor died; the old process goes on")
            time.sleep(0.02)


if __name__ == "__main__":
    main()
