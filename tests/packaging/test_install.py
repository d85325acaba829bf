"""scripts/install-service, and what the files it installs promise."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from glidefs.config import Config, load_config
from glidefs.daemon.daemon import FORCED_EXIT
from glidefs.transport.device.names import DIRECTORY
from glidefs.transport.nbd_device.driver import LOADED_WITH

ROOT = Path(__file__).resolve().parents[2]
PACKAGING = ROOT / "packaging"
INSTALLER = ROOT / "scripts/install-service"
SERVICE = "etc/systemd/system/glidefs.service"
INSTALLED = {
    SERVICE,
    "etc/systemd/system/glidefs-gc.service",
    "etc/systemd/system/glidefs-gc.timer",
    "etc/udev/rules.d/60-glidefs.rules",
    "etc/tmpfiles.d/glidefs.conf",
    "etc/glidefs/glidefs.toml",
}


def run(*args: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [INSTALLER, *args],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "/usr/bin:/bin", **environment},
        timeout=120,
    )


def files(below: Path) -> dict[str, str]:
    return {str(path.relative_to(below)): path.read_text() for path in below.rglob("*") if path.is_file()}


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "bin" / "glidefs"
    path.parent.mkdir()
    path.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m glidefs "$@"\n')
    path.chmod(0o755)
    return path


@pytest.fixture
def stub(tmp_path: Path) -> Path:
    """A program that writes an empty configuration, fast."""
    path = tmp_path / "stub"
    path.write_text('#!/bin/sh\n[ "$1" = init ] && echo "# settings" >"$2"\n')
    path.chmod(0o755)
    return path


def test_it_installs_says_so_and_changes_nothing_the_second_time(tmp_path: Path, stub: Path) -> None:
    below = tmp_path / "root"
    first = run("--destdir", below, "--glidefs", stub)
    assert first.returncode == 0, first.stderr
    assert set(files(below)) == INSTALLED
    assert all(f"installed  {below}/{name}" in first.stdout for name in INSTALLED)
    unit = files(below)[SERVICE]
    assert f"ExecStart={stub} run -c /etc/glidefs/glidefs.toml" in unit
    assert "/usr/bin/glidefs" not in unit
    assert f"modprobe -q nbd {' '.join(LOADED_WITH)}\n" in unit
    times = {path: path.stat().st_mtime_ns for path in below.rglob("*")}
    second = run("--glidefs", stub, DESTDIR=str(below))
    assert second.returncode == 0
    assert second.stdout.count("unchanged") == len(INSTALLED) - 1
    assert f"kept       {below}/etc/glidefs/glidefs.toml" in second.stdout
    assert "installed" not in second.stdout
    assert {path: path.stat().st_mtime_ns for path in below.rglob("*")} == times


def test_what_differs_is_replaced_but_never_the_configuration(tmp_path: Path, stub: Path) -> None:
    below = tmp_path / "root"
    assert run("--destdir", below, "--glidefs", stub).returncode == 0
    good = files(below)
    (below / SERVICE).write_text("old\n")
    (below / "etc/glidefs/glidefs.toml").write_text("# mine\n")
    done = run("--destdir", below, "--glidefs", stub)
    assert f"replaced   {below}/{SERVICE}" in done.stdout
    assert done.stdout.count("unchanged") == len(INSTALLED) - 2
    assert files(below) == {**good, "etc/glidefs/glidefs.toml": "# mine\n"}
    done = run("--destdir", below, "--remove")
    assert done.returncode == 0
    assert set(files(below)) == {"etc/glidefs/glidefs.toml"}
    assert "absent" in run("--destdir", below, "--remove").stdout


def test_the_real_program_writes_a_configuration_that_loads(tmp_path: Path, program: Path) -> None:
    below = tmp_path / "root"
    done = run("--destdir", below, "--glidefs", program, "--config", "/etc/glidefs/other.toml")
    assert done.returncode == 0, done.stderr
    assert load_config(below / "etc/glidefs/other.toml") == Config()
    assert "run -c /etc/glidefs/other.toml" in files(below)[SERVICE]


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (("--glidefs", "bin/glidefs"), "absolute"),
        (("--glidefs", "/with space/glidefs"), "use letters"),
        (("--glidefs", "/bin/sh", "--config", "/etc/a|b"), "use letters"),
        (("--config",), "needs a value"),
    ],
)
def test_what_it_refuses(tmp_path: Path, args: tuple[str, ...], why: str) -> None:
    done = run("--destdir", tmp_path / "root", *args)
    assert done.returncode == 1
    assert why in done.stderr
    assert not files(tmp_path / "root") if (tmp_path / "root").exists() else True


def test_systemd_understands_the_units(tmp_path: Path, stub: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze: apt install systemd")
    below = tmp_path / "root"
    assert run("--destdir", below, "--glidefs", stub).returncode == 0
    units = sorted((below / "etc/systemd/system").iterdir())
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *units], capture_output=True, text=True, check=False
    )
    ours = [line for line in done.stderr.splitlines() if "glidefs" in line]
    assert (done.returncode, ours) == (0, [])
    (below / SERVICE).write_text((below / SERVICE).read_text().replace("KillMode=mixed", "KillMod=mixed"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", below / SERVICE],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "KillMod" in done.stderr  # it does look


def test_udev_understands_the_rule() -> None:
    rule = PACKAGING / "60-glidefs.rules"
    if shutil.which("udevadm") is None:
        pytest.skip("no udevadm: apt install udev")
    if subprocess.run(["udevadm", "verify", "--help"], capture_output=True, check=False).returncode:
        pytest.skip("this udevadm cannot verify rules (systemd 254 can); tests/daemon/test_udev.py runs it")
    done = subprocess.run(["udevadm", "verify", rule], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def settings(unit: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in (PACKAGING / unit).read_text().splitlines():
        if match := re.match(r"(\w+)=(.*)", line):
            found.setdefault(match[1], []).append(match[2])
    return found


def test_a_stop_has_the_time_that_it_takes() -> None:
    """By default, even if the daemon's own request for more (EXTEND_TIMEOUT_USEC) got lost."""
    value = settings("glidefs.service")["TimeoutStopSec"][0]
    assert value.endswith("min")
    assert int(value.removesuffix("min")) * 60 >= Config().daemon.drain_deadline + FORCED_EXIT


def test_the_unit_and_the_code_agree_on_directories() -> None:
    found = settings("glidefs.service")
    assert found["RuntimeDirectoryPreserve"] == ["yes"]
    for key, path in (
        ("RuntimeDirectory", Path(Config().api.socket).parent),
        ("CacheDirectory", Path(Config().cache.dir)),
        ("StateDirectory", Path(Config().store.url.removeprefix("file://")).parent),
    ):
        assert path.name == found[key][0], key
    tmpfiles = (PACKAGING / "glidefs.tmpfiles").read_text()
    assert f"d {DIRECTORY} " in tmpfiles


def test_the_rule_runs_no_program_while_a_device_appears() -> None:
    text = (PACKAGING / "60-glidefs.rules").read_text()
    rules = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert not re.search(r"PROGRAM|IMPORT\{program\}|IMPORT\{builtin\}|TEST", "\n".join(rules))
    runs = [rule for rule in rules if "RUN" in rule]
    assert len(runs) == 1
    assert runs[0].startswith('ACTION=="remove"')
    assert text.count(f"{DIRECTORY}/$env{{GLIDEFS_KIND}}/%n") == 2
    assert set(re.findall(r'KERNEL=="(\w+)\*", ENV\{GLIDEFS_KIND\}="(\w+)"', text)) == {
        ("ublkb", "ublk"),
        ("nbd", "nbd"),
    }
    labels = set(re.findall(r'LABEL="(\w+)"', text))
    assert set(re.findall(r'GOTO="(\w+)"', text)) == labels == {"glidefs_end"}
