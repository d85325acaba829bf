"""Commands that need no daemon, and how fast and how quiet the program is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import command_line
import pytest
from daemon_harness import ROOT, Daemon

from glidefs.api.client import socket_path
from glidefs.config import load_config

Make = Callable[..., Daemon]
OFFLINE = ("init", "doctor", "inspect", "export-image", "bless", "bases", "devices", "gc")
VERBS = ("create", "list", "show", "resize", "drain", "detach", "attach", "remove", "logs", *OFFLINE)


def run(*args: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("GLIDEFS_")}
    environment = {**clean, "PYTHONPATH": str(ROOT), **environment}
    return command_line.run(args, cwd=cwd, env=environment, timeout=60)


def test_init(tmp_path: Path) -> None:
    done = run("init", "g.toml", "--store", "s3://b/r", "--run-dir", "run", "--json", cwd=tmp_path)
    assert json.loads(done.stdout) == {"path": str(tmp_path / "g.toml")}
    config = load_config(tmp_path / "g.toml")
    assert config.store.url == "s3://b/r"
    assert config.api.socket == str(tmp_path / "run" / "api.sock")
    again = run("init", "g.toml", cwd=tmp_path)
    assert again.returncode == 1
    assert "--force" in again.stderr
    assert run("init", "g.toml", "--force", cwd=tmp_path).returncode == 0


def test_client_commands_import_neither_server_nor_tables(tmp_path: Path) -> None:
    code = (
        "import sys, glidefs.cli.main, glidefs.api.client\n"
        "heavy = {'fastapi', 'uvicorn', 'boto3', 'rich', 'prometheus_client', 'httpx', 'zstandard'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_lists_every_verb(tmp_path: Path) -> None:
    text = run("--help", cwd=tmp_path).stdout
    for verb in ("run", *VERBS):
        assert f"  {verb} " in text
        assert run(verb, "--help", cwd=tmp_path).returncode == 0


def test_every_command_but_run_has_json(tmp_path: Path) -> None:
    for verb in VERBS:
        assert "--json" in run(verb, "--help", cwd=tmp_path).stdout, verb
    for verb in ("list", "export", "delete"):
        assert "--json" in run("logs", verb, "--help", cwd=tmp_path).stdout, verb
    for verb in ("list", "remove"):
        assert "--json" in run("bases", verb, "--help", cwd=tmp_path).stdout, verb
        assert "--json" in run("devices", verb, "--help", cwd=tmp_path).stdout, verb


def test_which_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLIDEFS_CONFIG", raising=False)
    monkeypatch.setenv("GLIDEFS_SOCKET", "/x/y.sock")
    assert socket_path() == "/x/y.sock"
    path = tmp_path / "g.toml"
    path.write_text('[api]\nsocket = "z.sock"\n')
    assert socket_path(str(path)) == str(tmp_path / "z.sock")
    monkeypatch.delenv("GLIDEFS_SOCKET")
    monkeypatch.setenv("GLIDEFS_CONFIG", str(path))
    assert socket_path() == str(tmp_path / "z.sock")


def test_a_device_that_is_not_there(make_daemon: Make) -> None:
    assert "there is no ublk device 4999" in make_daemon().fails("devices", "remove", "4999")
    assert "ID" in make_daemon("b").run("devices").stdout


def test_inspect_and_export_of_nothing(make_daemon: Make) -> None:
    daemon = make_daemon()
    assert "no default/volumes/absent/manifest" in daemon.fails("export-image", "absent", "image")
    assert not (daemon.base / "image").exists()
    assert "volumes/absent" in daemon.fails("inspect", "default/volumes/absent/manifest")
    assert "invalid" in daemon.fails("export-image", "../x", "image")
    plain = daemon.base / "plain"
    plain.write_text("hello")
    assert "not a manifest" in daemon.fails("inspect", str(plain))
    done = daemon.run("inspect", str(plain), "--json", check=False)
    assert set(json.loads(done.stdout)) == {"error", "hint"}
