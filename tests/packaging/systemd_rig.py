"""A systemd of its own for a test: process 1 of new namespaces, in a cgroup of its own, with our units only.

Nothing of the host's systemd is touched, and none needs to run. Everything in it ends with it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

from waiting import DEADLINE, wait_for

ROOT = Path(__file__).resolve().parents[2]
SYSTEMD = Path("/lib/systemd/systemd")
INNER = """\
set -e
root={root}
if [ -n "$root" ]; then
    mount --rbind $root $root # services get mounts of their own only where / is one
    mount --bind /sys $root/sys
fi
mount -t proc proc $root/proc
mount -t tmpfs tmpfs $root/run
mount -t tmpfs -o mode=755 tmpfs $root/sys/fs/cgroup
mount -t cgroup2 cgroup2 $root/sys/fs/cgroup
mkdir -p $root/run/systemd/system
cp -r {units}/. $root/run/systemd/system/
# What a host starts at boot has no business here.
for unit in $root/lib/systemd/system/*.wants/* $root/etc/systemd/system/*.wants/*; do
    name=${{unit##*/}}
    case $name in
    '*' | *.target | modprobe@* | glidefs*) ;;
    *) ln -sfn /dev/null "$root/run/systemd/system/$name" ;;
    esac
done
for name in systemd-journald.service systemd-journald.socket systemd-journald-dev-log.socket \\
    systemd-udevd.service dbus.service dbus.socket; do
    ln -sfn /dev/null "$root/run/systemd/system/$name"
done
export container=test PATH=/usr/sbin:/usr/bin:/sbin:/bin
exec ${{root:+chroot $root}} {systemd} --system --unit=rig.target --log-target=console --log-level=info \\
    --show-status=0 --log-color=0
"""


def missing() -> str:
    """Why there can be no systemd here, or nothing."""
    if os.geteuid() != 0:
        return "needs root"
    if not SYSTEMD.exists():
        return f"no {SYSTEMD}"
    for program in ("unshare", "nsenter", "systemctl"):
        if shutil.which(program) is None:
            return f"no {program}"
    probe = ["unshare", "--mount", "--pid", "--fork", "--cgroup", "sh", "-c", "mount -t cgroup2 c /mnt"]
    done = subprocess.run(probe, capture_output=True, text=True, check=False)
    return f"no namespaces or cgroup2 here: {done.stderr.strip()}" if done.returncode else ""


@contextlib.contextmanager
def _cgroup(base: Path) -> Iterator[Path]:
    """A cgroup below the root of version 2, wherever that is mounted."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    places = [fields[1] for fields in mounts if fields[2] == "cgroup2"]
    own = base / "cgroup2"
    if not places:
        own.mkdir()
        subprocess.run(["mount", "-t", "cgroup2", "cgroup2", own], check=True)
    cgroup = Path(places[0] if places else own) / f"glidefs-test-{os.getpid()}"
    cgroup.mkdir()
    try:
        yield cgroup
    finally:
        for directory, _, _ in sorted(os.walk(cgroup), reverse=True):
            wait_for(lambda path=directory: _remove(path), f"{directory} is empty")  # type: ignore[misc]
        if not places:
            subprocess.run(["umount", own], check=True)


def _remove(path: str) -> bool:
    with contextlib.suppress(OSError):
        os.rmdir(path)
    return not os.path.exists(path)


class Systemd:
    """Runs the units of a directory. ``console`` is what it says.

    With a ``root`` it is that of the system there, with the units that are installed there, too. ``pid`` is
    that of process 1.
    """

    def __init__(self, base: Path, units: Path, root: Path | None = None) -> None:
        self.console = base / "console"
        target = units / "rig.target"
        target.write_text("[Unit]\nDefaultDependencies=no\n")
        self._script = base / "inner.sh"
        self._script.write_text(INNER.format(units=units, systemd=SYSTEMD, root=root or ""))
        self._process: subprocess.Popen[bytes] | None = None
        self.pid = 0

    def start(self, cgroup: Path) -> None:
        spaces = "--mount --pid --fork --kill-child --uts --ipc --cgroup --propagation private"
        command = f"echo $$ >{cgroup}/cgroup.procs && exec unshare {spaces} bash {self._script}"
        with self.console.open("wb") as console:
            self._process = subprocess.Popen(
                ["bash", "-c", command], stdout=console, stderr=console, stdin=subprocess.DEVNULL
            )
        self.pid = wait_for(self._child, f"systemd runs\n{self.console.read_text()}")
        running = ("running", "starting", "degraded", "initializing")
        wait_for(lambda: self.systemctl("is-system-running").stdout.strip() in running, "systemd answers")

    def _child(self) -> int:
        assert self._process is not None
        assert self._process.poll() is None, self.console.read_text()
        pid = self._process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        if not children or Path(f"/proc/{children[0]}/exe").resolve().name != "systemd":
            return 0
        return int(children[0])

    def close(self) -> None:
        if self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def run(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        """A command beside the services."""
        enter = ["nsenter", "-t", str(self.pid), "-m", "-p", "-u", "-i", "-C", "-r", "--wd=/"]
        return subprocess.run(
            [*enter, *map(str, command)], capture_output=True, text=True, check=False, timeout=DEADLINE
        )

    def systemctl(self, *args: str) -> subprocess.CompletedProcess[str]:
        return self.run("systemctl", "--no-pager", *args)

    def show(self, unit: str, name: str) -> str:
        """A property of a unit."""
        return self.systemctl("show", unit, "-p", name, "--value").stdout.strip()

    def main_pid(self, unit: str) -> int:
        return int(self.show(unit, "MainPID") or 0)

    def processes(self, unit: str) -> list[int]:
        """All that is in the unit's cgroup, by their numbers in there."""
        group = self.show(unit, "ControlGroup")
        found = self.run("cat", f"/sys/fs/cgroup{group}/cgroup.procs") if group else None
        return [int(pid) for pid in found.stdout.split()] if found else []


@contextlib.contextmanager
def systemd(base: Path, units: Path, root: Path | None = None) -> Iterator[Systemd]:
    """A running one."""
    with _cgroup(base) as cgroup:
        made = Systemd(base, units, root)
        try:
            made.start(cgroup)
            yield made
        finally:
            made.close()


def install(base: Path, program: Path, config: Path) -> Path:
    """What install-service installs, below ``base``; the directory of the units."""
    destination = base / "root"
    there = destination / str(config).lstrip("/")
    there.parent.mkdir(parents=True)
    there.touch()  # so that it is not made anew
    command = [ROOT / "scripts/install-service", "--destdir", destination, "--glidefs", program]
    subprocess.run([*command, "--config", config], check=True, capture_output=True)
    return destination / "etc/systemd/system"
