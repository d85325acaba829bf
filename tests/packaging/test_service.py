"""The unit under a real systemd: starts, restarts, stops and handoffs, and what the sandbox leaves to do."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import systemd_rig as rig
from systemd_rig import ROOT, Systemd
from waiting import wait_for

from glidefs.transport.ublk.driver import ublk_missing

REASON = rig.missing()
pytestmark = [
    pytest.mark.skipif(bool(REASON), reason=f"no systemd for the test: {REASON}"),
    pytest.mark.root,
]
UNIT = "glidefs.service"
BLKFLSBUF = 0x1261


def write_program(path: Path, command: str) -> Path:
    path.write_text(f'#!/bin/sh\nexport PYTHONPATH={ROOT} PYTHONDONTWRITEBYTECODE=1\nexec {command} "$@"\n')
    path.chmod(0o755)
    return path


def log_to(units: Path, log: Path) -> None:
    (units / f"{UNIT}.d").mkdir()
    (units / f"{UNIT}.d" / "log.conf").write_text(
        f"[Service]\nStandardOutput=append:{log}\nStandardError=append:{log}\n"
    )


# -- the real daemon ---------------------------------------------------------------------------------


class Service:
    """glidefs.service with the daemon of this tree."""

    def __init__(self, manager: Systemd, program: Path, base: Path) -> None:
        self.manager, self.program, self.base = manager, program, base

    @property
    def log(self) -> str:
        return (self.base / "log").read_text()

    def glidefs(self, *args: str) -> str:
        done = self.manager.run(self.program, *args, "--config", str(self.base / "glidefs.toml"))
        assert done.returncode == 0, done.stderr + self.log
        return done.stdout

    def systemctl(self, *args: str) -> None:
        done = self.manager.systemctl(*args)
        assert done.returncode == 0, f"{args}: {done.stderr}\n{self.manager.console.read_text()}\n{self.log}"

    def main_pid(self) -> int:
        return self.manager.main_pid(UNIT)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    config = tmp_path / "glidefs.toml"
    (tmp_path / "store").mkdir()
    config.write_text(
        f"""
[cache]
dir = "{tmp_path}/cache"
log_size = "64MiB"
segment_size = "1MiB"
block_cache_size = "16MiB"
[store]
url = "file://{tmp_path}/store"
[daemon]
node = "node-1"
"""
    )
    program = write_program(tmp_path / "glidefs", f"{sys.executable} -m glidefs")
    units = rig.install(tmp_path, program, config)
    log_to(units, tmp_path / "log")
    with rig.systemd(tmp_path, units) as manager:
        yield Service(manager, program, tmp_path)


def test_the_daemon_as_a_service(service: Service) -> None:
    """It is ready when `start` returns, comes back when it is killed, leaves nothing when it is stopped."""
    service.systemctl("start", UNIT)
    first = service.main_pid()
    assert first
    assert service.manager.show(UNIT, "StatusText") == "serving 0 exports"
    made = json.loads(service.glidefs("create", "v1", "--size", "64MiB", "--transport", "nbd", "--json"))
    assert made["device"].endswith("/run/glidefs/nbd.sock")
    for number in (signal.SIGKILL, signal.SIGTERM):  # the latter is an end that nobody asked systemd for
        first = service.main_pid()
        service.manager.run("kill", f"-{number}", str(first))
        wait_for(lambda first=first: service.main_pid() not in (0, first), "it is started again")  # type: ignore[misc]
        wait_for(lambda: service.manager.show(UNIT, "SubState") == "running", "it is ready again")
        assert json.loads(service.glidefs("show", "v1", "--json"))["state"] == "serving"
    service.systemctl("stop", UNIT)
    assert service.manager.processes(UNIT) == []
    assert service.manager.show(UNIT, "Result") == "success"
    assert "stopped" in service.log.splitlines()[-1]
    assert service.manager.run("ls", "-d", "/run/glidefs").returncode == 0


def test_a_reload_hands_over(service: Service) -> None:
    """The real one, in the sandbox: another process serves the same exports on the same sockets."""
    service.systemctl("start", UNIT)
    service.glidefs("create", "v1", "--size", "64MiB", "--transport", "nbd")
    first = service.main_pid()
    for _ in range(2):
        service.systemctl("reload", UNIT)
        new = service.main_pid()
        assert new != first
        first = new
        assert json.loads(service.glidefs("show", "v1", "--json"))["state"] == "serving"
        wait_for(lambda new=new: service.manager.processes(UNIT) == [new], "the old one is gone")  # type: ignore[misc]
    assert service.manager.show(UNIT, "NRestarts") == "0"
    assert service.manager.show(UNIT, "StatusText") == "serving 1 exports"
    service.manager.run("kill", "-9", str(first))
    wait_for(lambda: service.main_pid() not in (0, first), "it is started again")
    wait_for(lambda: service.manager.show(UNIT, "SubState") == "running", "it is ready again")
    service.systemctl("stop", UNIT)
    assert service.manager.processes(UNIT) == []


def test_the_sandbox(service: Service) -> None:
    """What it must not have is gone, and the daemon does its work without: reads, writes, bless, gc."""
    service.systemctl("start", UNIT)
    status = service.manager.run("cat", f"/proc/{service.main_pid()}/status").stdout
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert fields["NoNewPrivs"] == "1"
    assert fields["Seccomp"] == "2"
    bounding = int(fields["CapBnd"], 16)
    assert bounding & 1 << 21  # CAP_SYS_ADMIN
    for number in (16, 19, 27, 22):  # CAP_SYS_MODULE, _PTRACE, MKNOD, SYS_BOOT
        assert not bounding & 1 << number, number
    image = service.base / "image"
    image.write_bytes(os.urandom(1 << 20))
    service.glidefs("bless", str(image), "--name", "deb")
    made = json.loads(service.glidefs("create", "f", "--from", "base:deb", "--transport", "nbd", "--json"))
    assert made["state"] == "serving"
    service.glidefs("drain", "f")
    service.systemctl("start", "glidefs-gc.service")
    assert service.manager.show("glidefs-gc.service", "Result") == "success"
    assert " ERROR " not in service.log


@pytest.mark.skipif(ublk_missing() is not None, reason=f"no ublk: {ublk_missing()}")
def test_a_ublk_device_of_the_service(service: Service) -> None:
    """The unit's devices and capabilities suffice; the device lives through a crash and a handoff."""
    service.systemctl("start", UNIT)
    made = json.loads(service.glidefs("create", "v1", "--size", "64MiB", "--transport", "ublk", "--json"))
    device, data = made["device"], os.urandom(1 << 20)
    with open(device, "r+b", buffering=0) as disk:
        disk.write(data)
        os.fsync(disk.fileno())
        first = service.main_pid()
        service.manager.run("kill", "-9", str(first))
        wait_for(lambda: service.main_pid() not in (0, first), "it is started again")
        disk.seek(2 << 20)
        disk.write(data)  # waits for it
        os.fsync(disk.fileno())
    wait_for(lambda: service.manager.show(UNIT, "SubState") == "running", "it is ready again")
    assert json.loads(service.glidefs("show", "v1", "--json"))["device"] == device
    service.systemctl("reload", UNIT)
    for offset in (0, 2 << 20):
        with open(device, "rb") as disk:
            fcntl.ioctl(disk.fileno(), BLKFLSBUF)
            disk.seek(offset)
            assert disk.read(len(data)) == data
    name = service.manager.run("sh", "-c", "cat /run/glidefs/ublk/[0-9]*.*").stdout
    assert "GLIDEFS_NAME=v1\n" in name
    service.glidefs("remove", "v1")
    assert not Path(device).exists()
    assert " ERROR " not in service.log


def test_a_daemon_that_cannot_start_is_tried_again(service: Service) -> None:
    config = service.base / "glidefs.toml"
    good = config.read_text()
    config.write_text(good + "nonsense = 1\n")
    assert service.manager.systemctl("start", "--no-block", UNIT).returncode == 0
    wait_for(lambda: int(service.manager.show(UNIT, "NRestarts") or 0) >= 2, "it is tried again")
    config.write_text(good)
    wait_for(lambda: service.manager.show(UNIT, "SubState") == "running", "it runs in the end")
    service.systemctl("stop", UNIT)


# -- handoffs, as systemd sees them ------------------------------------------------------------------


class Handoff:
    """glidefs.service with a program that only does the steps of a handoff."""

    def __init__(self, manager: Systemd, state: Path) -> None:
        self.manager, self.state = manager, state

    def main_pid(self) -> int:
        return self.manager.main_pid(UNIT)

    def server(self) -> int:
        return int((self.state / "server").read_text() or 0)

    def alive(self, pid: int) -> bool:
        return self.manager.run("kill", "-0", str(pid)).returncode == 0


@pytest.fixture
def handoff(tmp_path: Path) -> Iterator[Handoff]:
    state = tmp_path / "state"
    state.mkdir()
    fake = Path(__file__).with_name("fake_daemon.py")
    units = rig.install(tmp_path, write_program(tmp_path / "glidefs", f"{sys.executable} {fake}"), state)
    log_to(units, tmp_path / "log")
    with rig.systemd(tmp_path, units) as manager:
        assert manager.systemctl("start", UNIT).returncode == 0
        yield Handoff(manager, state)


def test_a_successor_becomes_the_main_process(handoff: Handoff) -> None:
    seen = {handoff.main_pid()}
    for _ in range(3):
        done = handoff.manager.systemctl("reload", UNIT)
        assert done.returncode == 0, done.stderr
        new = handoff.main_pid()
        assert new == handoff.server()
        assert new not in seen
        seen.add(new)
        wait_for(lambda new=new: handoff.manager.processes(UNIT) == [new], "the old one is gone")  # type: ignore[misc]
        assert handoff.manager.show(UNIT, "SubState") == "running"
    assert handoff.manager.show(UNIT, "NRestarts") == "0"
    # It is watched like the first one.
    handoff.manager.run("kill", "-9", str(handoff.main_pid()))
    wait_for(lambda: handoff.main_pid() not in (0, *seen), "it is started again")
    assert handoff.manager.systemctl("stop", UNIT).returncode == 0
    assert handoff.manager.processes(UNIT) == []


def test_a_handoff_that_fails_leaves_the_old_process(handoff: Handoff) -> None:
    first = handoff.main_pid()
    (handoff.state / "die").touch()
    assert handoff.manager.systemctl("reload", UNIT).returncode != 0
    assert handoff.main_pid() == first
    assert handoff.manager.show(UNIT, "ActiveState") == "active"
    assert handoff.manager.processes(UNIT) == [first]
    (handoff.state / "die").unlink()
    assert handoff.manager.systemctl("reload", UNIT).returncode == 0
    assert handoff.main_pid() != first


def test_a_stop_during_a_handoff_leaves_nobody(handoff: Handoff) -> None:
    (handoff.state / "hang").touch()
    handoff.manager.systemctl("reload", "--no-block", UNIT)
    wait_for(lambda: (handoff.state / "successor").exists(), "the successor warms up")
    assert len(handoff.manager.processes(UNIT)) >= 2
    assert handoff.manager.systemctl("stop", UNIT).returncode == 0
    assert handoff.manager.processes(UNIT) == []
    assert handoff.manager.show(UNIT, "ActiveState") in ("inactive", "failed")


def test_a_successor_that_is_killed_does_not_take_the_server_along(handoff: Handoff) -> None:
    first = handoff.main_pid()
    (handoff.state / "hang").touch()
    handoff.manager.systemctl("reload", "--no-block", UNIT)
    successor = handoff.state / "successor"
    pid = str(wait_for(lambda: successor.exists() and successor.read_text(), "the successor warms up"))
    handoff.manager.run("kill", f"-{signal.SIGKILL}", pid)
    wait_for(lambda: handoff.manager.processes(UNIT) == [first], "only the old process is left")
    assert handoff.main_pid() == first
    assert handoff.manager.show(UNIT, "ActiveState") == "active"
