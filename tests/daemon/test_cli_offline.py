"""Commands that need no daemon, and how fast and how quiet the program is."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import command_line
import pytest
from daemon_harness import ROOT, Daemon

from glidefs.api.client import socket_path
from glidefs.config import load_config
from glidefs.places import api_socket

Make = Callable[..., Daemon]
OFFLINE = ("init", "doctor", "inspect", "export-image", "bless", "bases", "devices", "gc")
SERVED = ("create", "list", "show", "resize", "transport", "drain", "detach", "attach", "remove", "logs")
VERBS = (*SERVED, *OFFLINE)


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


HEAVY = {
    *(
        "pydantic",
        "rich",
        "msgspec",
        "uvicorn",
        "starlette",
        "anyio",
        "httpx",
        "prometheus_client",
    ),
    *("boto3", "botocore", "urllib3", "zstandard", "cffi", "_cffi_backend"),
    *("http.client", "ssl", "email", "asyncio", "concurrent.futures", "glidefs.config", "glidefs.core"),
}
"""What takes milliseconds to import and is of no use to a command that asks the daemon."""
IMPORTED = f"""
import sys
from glidefs.__main__ import main
sys.argv = ["glidefs", *sys.argv[1:]]
try:
    main()
finally:
    sys.stderr.write("imported: " + " ".join(sorted({HEAVY} & set(sys.modules))))
"""


@pytest.mark.parametrize("named_by", ["socket", "configuration"])
def test_commands_that_ask_the_daemon_import_nothing_heavy(tmp_path: Path, named_by: str) -> None:
    """The modules of other commands, of the server, and what typer would check texts with."""
    commands = {
        "list": b'[{"name": "a", "size": 4096, "state": "serving", "transport": "nbd", "device": "d", '
        b'"reason": "", "trouble": ""}]',
        "show a": b'{"name": "a", "size": 4096, "volume": {"dirty_bytes": 0}}',
        "resize a 1GiB --shrink": b'{"name": "a", "size": 1073741824}',
        "drain a --timeout 5": b'{"name": "a"}',
        "snapshots a": b"[]",
        "logs list": b"[]",
    }
    (tmp_path / "g.toml").write_text('[api]\nsocket = "s"\n[store]\nurl = "s3://b/r"\n')
    named = {"socket": {"GLIDEFS_SOCKET": "s"}, "configuration": {"GLIDEFS_CONFIG": "g.toml"}}[named_by]
    for command, answer in commands.items():
        allowed = {"glidefs.config", "msgspec"} if "--timeout" in command else set()  # which parses durations
        with answering(tmp_path / "s", answer):
            done = subprocess.run(
                [sys.executable, "-c", IMPORTED, *command.split()],
                cwd=tmp_path,
                env={**os.environ, **named, "PYTHONPATH": str(ROOT)},
                capture_output=True,
                text=True,
                check=True,
                timeout=60,
            )
        imported = set(done.stderr.rpartition("imported:")[2].split())
        assert imported <= allowed, f"{command} imports {imported - allowed}"


@contextlib.contextmanager
def answering(path: Path, answer: bytes) -> Iterator[None]:
    """A daemon that gives every request this answer."""
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(answer)}\r\n\r\n".encode()

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.recv(65536)
                connection.sendall(head + answer)

    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
        listener.close()
        path.unlink()


def test_help_imports_no_checker() -> None:
    code = IMPORTED.replace("main()\n", "main()\nexcept SystemExit:\n    pass\n", 1)
    for command in (["--help"], ["list", "--help"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *command], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert "Usage:" in done.stdout
        assert done.stderr.rpartition("imported:")[2].split() == []


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["lsit"], "lsit"),  # an unknown command is told of among all
        (["snapshots", "v", "--delete", "x"], "--delete"),  # numbers are still checked
        (["snapshots", "v", "--delete", "-1"], "--delete"),
        (["logs", "lst"], "lst"),
        (["resize", "v"], "SIZE"),
    ],
)
def test_wrong_arguments_are_refused(tmp_path: Path, args: list[str], said: str) -> None:
    done = run(*args, cwd=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr


@pytest.mark.parametrize(
    "text",
    [
        '[api]\nsocket = "s"',
        '[api]\nsocket = "/run/x.sock"',
        '[api]\nsocket = "~/x.sock"',
        "[api]",
        "",
        '[store]\nurl = "file:///x"',
    ],
)
def test_the_socket_is_the_one_of_the_whole_configuration(tmp_path: Path, text: str) -> None:
    path = tmp_path / "g.toml"
    path.write_text(text)
    assert api_socket(path) == load_config(path).api.socket


@pytest.mark.parametrize(
    "text",
    [
        "api = 3",
        "api = [1]",
        "[api",
        "[api]\nsocket = 3",
        '[api]\nsocket = ""',
        '[api]\nsocket = "a\\u0000b"',
        f'[api]\nsocket = "/{"x" * 200}"',
        '[api]\nsocket = "~nobody-of-this-name/x"',
    ],
)
def test_a_socket_that_cannot_be_is_told_as_ever(tmp_path: Path, text: str) -> None:
    path = tmp_path / "g.toml"
    path.write_text(text)
    assert api_socket(path) is None
    assert api_socket(tmp_path / "absent.toml") is None


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
    assert "there is no device /dev/ublkb4999" in make_daemon().fails("devices", "remove", "4999")
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
