"""Builds and drives ``ublk_null`` (ublk_null.c): shared by the tests and the benchmark in this directory.

``python tests/vm/null_server.py DIRECTORY`` builds it there: a compiler takes minutes on emulated CPUs.
"""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Emulated CPUs are about ten times slower than real ones.
DEADLINE = 120.0
BUILT = "GLIDEFS_UBLK_NULL"
"""Environment: the program, if it was built before."""


def build(directory: Path) -> Path:
    """The program, made in ``directory`` unless it was built before."""
    if os.environ.get(BUILT):
        return Path(os.environ[BUILT])
    program = directory / "ublk_null"
    sources = [
        ROOT / "tests/vm/ublk_null.c",
        ROOT / "csrc/transport/ublk/ublk_ctrl.c",
        ROOT / "csrc/transport/ublk/ublk_ring.c",
    ]
    flags = ["-O2", "-Wall", "-Wextra", "-Werror", "-std=gnu11", "-pthread", "-I", str(ROOT / "csrc")]
    subprocess.run(["cc", *flags, "-o", str(program), *map(str, sources), "-luring"], check=True)
    return program


def wait_until(condition: Callable[[], bool], what: str, deadline: float = DEADLINE) -> None:
    end = time.monotonic() + deadline
    while not condition():
        assert time.monotonic() < end, f"not in time: {what}"
        time.sleep(0.01)


class NullServer:
    """One ``ublk_null add`` or ``recover`` process, up once the constructor returns."""

    def __init__(self, program: Path, *args: str) -> None:
        self.process = subprocess.Popen([str(program), *args], stdout=subprocess.PIPE, text=True)
        self.ready = self._line("ready ")
        fields = dict(x.split("=", 1) for x in self.ready.split()[1:])
        self.id, self.flags, self.mode = int(fields["id"]), int(fields["flags"], 16), fields["mode"]
        self.device = Path(f"/dev/ublkb{self.id}")

    def _line(self, start: str) -> str:
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            if not selector.select(DEADLINE):
                self.process.kill()
                raise AssertionError(f"no {start!r} from {self.process.args} in time")
        line = self.process.stdout.readline().strip()
        assert line.startswith(start), f"{self.process.args} said {line!r} instead of {start!r}"
        return line

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(DEADLINE)

    def stop(self) -> None:
        """Stops and deletes the device, in an orderly way."""
        self.process.send_signal(signal.SIGTERM)
        self._line("deleted")
        assert self.process.wait(DEADLINE) == 0

    def expect_release(self) -> None:
        """Waits for a server whose slots were retired by somebody else."""
        self._line("released")
        assert self.process.wait(DEADLINE) == 0


def control(program: Path, *args: str) -> str:
    """Output of a one-shot verb; raises CalledProcessError with what it said."""
    command = [str(program), *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE, check=False)
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, args, done.stdout, done.stderr)
    return done.stdout


def info(program: Path, device_id: int) -> dict[str, str]:
    return dict(x.split("=", 1) for x in control(program, "info", str(device_id)).split())


def blockers() -> str | None:
    """Why the tests in this directory cannot run here, or None."""
    if os.geteuid() != 0:
        return "needs root"
    subprocess.run(["modprobe", "-q", "ublk_drv"], check=False, stderr=subprocess.DEVNULL)
    if not Path("/dev/ublk-control").exists():
        return f"no /dev/ublk-control on Linux {os.uname().release}: run it with vm-test/run"
    return None


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
