"""Which program a successor is: that of its predecessor, whatever lies in the directory it was started in."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import servers
from daemon_harness import ROOT
from handoff_rig import Generations
from waiting import wait_for

from glidefs.handoff import launch

PROGRAM = "import sys\nfrom glidefs.__main__ import main\nsys.exit(main())\n"
TRAP = "import pathlib\npathlib.Path(__file__).with_name('caught').touch()\nraise SystemExit('a trap')\n"


class Elsewhere(Generations):
    """A daemon that is started in ``directory`` by ``command``, with ``path`` as PYTHONPATH."""

    directory: Path
    command: list[str]
    path = ""

    def spawn(self) -> subprocess.Popen[bytes]:
        own = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | servers.CREDENTIALS
        if self.path:
            own["PYTHONPATH"] = self.path
        with (self.base / "daemon.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*self.command, "run", "-c", str(self.config)],
                cwd=self.directory,
                env=own,
                stdout=log,
                stderr=log,
            )
        return self.process


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Elsewhere]:
    node = Elsewhere(tmp_path / "n")
    node.directory = tmp_path / "there"
    node.directory.mkdir()
    yield node
    node.kill_all()


def environment_of(pid: int) -> dict[str, str]:
    words = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(word.split("=", 1) for word in words if "=" in word)


def hands_over(node: Elsewhere) -> int:
    """The successor's process id."""
    first = node.start().pid
    node.handoff()
    pid = node.pid
    assert pid != first
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    return pid


def test_the_working_directory_is_not_run(elsewhere: Elsewhere, tmp_path: Path) -> None:
    for name in ("glidefs/__init__.py", "glidefs/__main__.py", "boto3.py", "msgspec.py", "logging.py"):
        trap = elsewhere.directory / name
        trap.parent.mkdir(exist_ok=True)
        trap.write_text(TRAP)
    program = tmp_path / "bin" / "glidefs"
    program.parent.mkdir()
    program.write_text(PROGRAM)
    elsewhere.command = [sys.executable, str(program)]
    elsewhere.path = str(ROOT)
    assert environment_of(hands_over(elsewhere))["PYTHONPATH"] == str(ROOT)
    assert not list(elsewhere.directory.rglob("caught"))


def test_a_daemon_of_a_source_tree(elsewhere: Elsewhere) -> None:
    (elsewhere.directory / "glidefs").symlink_to(ROOT / "glidefs")
    elsewhere.command = [sys.executable, "-m", "glidefs"]
    assert environment_of(hands_over(elsewhere))["PYTHONPATH"] == str(elsewhere.directory)


def test_a_new_version_at_the_same_place(elsewhere: Elsewhere, tmp_path: Path) -> None:
    """What an upgrade is: the directory of the program leads to another one meanwhile."""
    for version in ("one", "two"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "glidefs").symlink_to(ROOT / "glidefs")
    (tmp_path / "two" / "sitecustomize.py").write_text(
        "import pathlib, sys\nif 'run' in sys.argv: pathlib.Path(__file__).with_name('is-run').touch()\n"
    )
    current = tmp_path / "current"
    current.symlink_to("one")
    elsewhere.command = [sys.executable, "-m", "glidefs"]
    elsewhere.path = str(current)
    elsewhere.start()
    current.unlink()
    current.symlink_to("two")
    elsewhere.handoff()
    wait_for((tmp_path / "two" / "is-run").exists, "the successor is of the new version")


def test_of_pythonpath_only_what_this_process_is_made_of(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    used, unused = tmp_path / "used", tmp_path / "unused"
    for place in (used, unused):
        place.mkdir()
    (used / "a_module_of_this_test.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(used), str(unused), str(tmp_path)])
    __import__("a_module_of_this_test")
    told = launch.environment({"PYTHONPATH": "used:unused:", "HOME": "/root"})
    assert str(used) in told["PYTHONPATH"].split(":")
    assert not {str(unused), str(tmp_path), ""} & set(told["PYTHONPATH"].split(":"))
    assert told["HOME"] == "/root"
    assert str(used) not in launch.environment({}).get("PYTHONPATH", "")


def test_the_command_leaves_the_working_directory_out() -> None:
    command = launch.command("/etc/glidefs/glidefs.toml")
    assert command[0] == sys.executable
    assert command[1] == "-P"
    assert command[-5:] == ["-m", "glidefs", "run", "--config", "/etc/glidefs/glidefs.toml"]
