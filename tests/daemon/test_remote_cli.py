"""Commands for a daemon on another host: by option, environment or context, over TLS, with a token."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import command_line
import pytest
import servers
from api_rig import Certificates, configure
from daemon_harness import ROOT, Daemon
from waiting import DEADLINE

from glidefs.cli import lean
from glidefs.cli.target import Place, read_contexts, write_contexts

pytest.importorskip("glidefs.core._core")

Make = Callable[..., Daemon]


class Far:
    """A daemon that is reached over TLS alone, and a user who has no other."""

    def __init__(self, daemon: Daemon, home: Path, *, clients: bool = False) -> None:
        home.mkdir()
        self.daemon, self.home = daemon, home
        self.files = Certificates(home)
        self.port = servers.free_port()
        lines = f'listen = "127.0.0.1:{self.port}"\ntokens_file = "tokens.toml"\n'
        configure(daemon, "api", lines + self.files.lines(clients=clients))
        self.tokens = {scope: self._token(scope) for scope in ("read", "operate")}
        self.url = f"https://127.0.0.1:{self.port}"
        daemon.start()

    def _token(self, scope: str) -> str:
        made = self.daemon.json(
            "token", scope, "--scope", scope, "--file", str(self.daemon.base / "tokens.toml")
        )
        path = self.home / f"{scope}.token"
        path.touch(0o600)
        path.write_text(made["token"] + "\n")
        return str(path)

    def run(self, *args: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """A command of that user."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("GLIDEFS_", "XDG_"))}
        environment = kept | {"HOME": str(self.home), "PYTHONPATH": str(ROOT)} | (env or {})
        return command_line.run(args, cwd=self.home, env=environment, timeout=DEADLINE)

    def json(self, *args: str, env: Mapping[str, str] | None = None) -> Any:
        done = self.run(*args, "--json", env=env)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout)

    def fails(self, *args: str, env: Mapping[str, str] | None = None) -> str:
        done = self.run(*args, env=env)
        assert done.returncode != 0, done.stdout
        (line,) = done.stderr.strip().splitlines()
        return line


def test_options_environment_and_contexts(make_daemon: Make, tmp_path: Path) -> None:
    far = Far(make_daemon(), tmp_path / "home")
    ca, token = str(far.files.ca), far.tokens["operate"]
    options = ("--host", far.url, "--token-file", token, "--ca", ca)
    assert far.json(*options, "create", "v1", "--size", "16MiB", "--transport", "nbd")["state"] == "serving"
    environment = {"GLIDEFS_HOST": far.url, "GLIDEFS_TOKEN_FILE": token, "GLIDEFS_CA": ca}
    assert [export["name"] for export in far.json("list", env=environment)] == ["v1"]
    assert far.json("show", "v1", env=environment)["size"] == 16 << 20
    assert [export["name"] for export in far.json("top", env=environment)["exports"]] == ["v1"]
    assert far.json("ui", env=environment)["url"] == f"{far.url}/ui"
    assert "no daemon answers" in far.fails("list")

    far.json("context", "set", "prod", *options)
    far.json("context", "set", "look", *options[:3], far.tokens["read"], *options[4:])
    assert "no daemon answers" in far.fails("list")  # naming one sends nothing there
    assert far.json("--context", "look", "show", "v1")["name"] == "v1"
    assert "takes the scope operate" in far.fails("--context", "look", "drain", "v1")
    far.json("context", "use", "prod")
    assert far.json("drain", "v1")["name"] == "v1"
    assert far.json("list", env={"GLIDEFS_CONTEXT": "look"})[0]["name"] == "v1"
    # A token that the environment names is for the host that it names.
    other = {"GLIDEFS_TOKEN_FILE": far.tokens["read"]}
    assert far.json("drain", "v1", env=other)["name"] == "v1"
    assert far.json("--token-file", far.tokens["read"], "list")[0]["name"] == "v1"
    assert "takes the scope operate" in far.fails("--token-file", far.tokens["read"], "drain", "v1")
    shown = far.run("context", "list").stdout
    assert f"{far.url}\n" in shown
    assert "*" in next(line for line in shown.splitlines() if "prod" in line)
    # What names a daemon of this host is meant before what was chosen earlier.
    assert far.json("list", "-c", str(far.daemon.config))[0]["name"] == "v1"
    socket = str(far.home / "absent.sock")
    assert socket in far.fails("list", env={"GLIDEFS_SOCKET": socket})
    far.json("context", "delete", "prod")
    assert "no daemon answers" in far.fails("list")
    assert [one["name"] for one in far.json("context", "list")] == ["local", "look"]
    assert (far.home / ".config/glidefs/contexts.toml").stat().st_mode & 0o777 == 0o600


def test_what_is_wrong_is_said_in_one_line(make_daemon: Make, tmp_path: Path) -> None:
    far = Far(make_daemon(), tmp_path / "home")
    ca, token = ("--ca", str(far.files.ca)), ("--token-file", far.tokens["read"])
    open_file = far.home / "open.token"
    open_file.write_text("gfs_0123456789abcdef")
    open_file.chmod(0o644)
    wrong = far.home / "wrong.token"
    wrong.touch(0o600)
    wrong.write_text("gfs_0123456789abcdef")
    nobody = f"https://127.0.0.1:{servers.free_port()}"
    for options, said in (
        (("--host", far.url, *token), "the certificate is not to be trusted"),
        (("--host", far.url, *ca), "a bearer token is required"),
        (("--host", far.url, *ca, "--token-file", str(wrong)), "the token is not known here"),
        (("--host", far.url, *ca, "--token-file", str(open_file)), "chmod 600"),
        (("--host", far.url, *ca, "--token-file", "absent"), "No such file"),
        (("--host", far.url, *token, "--ca", "absent"), "absent"),
        (("--host", nobody, *ca, *token), "no daemon answers"),
        (("--host", f"http://127.0.0.1:{far.port}", *token), "went away"),
        (("--host", "http://10.0.0.1:8440", *token), "plain text"),
        (("--host", "store.test", *token), "https://host:8440"),
        (("--host", "https://u:p@h:1", *token), "the token is in a file"),
        (("--host", far.url, "--context", "x"), "leave one out"),
        (("--context", "x"), "there is no context 'x'"),
    ):
        line = far.fails(*options, "list")
        assert said in line, (options, line)
        assert "gfs_" not in line
    assert "leave it or --host out" in far.fails("--host", far.url, "list", "-c", str(far.daemon.config))
    assert "add --host" in far.fails(*token, "list")
    assert "works on this host alone" in far.fails("--host", far.url, "gc")
    assert "cannot be the name" in far.fails("context", "set", "local", "--host", far.url)
    assert "Traceback" not in far.daemon.log_text


def test_a_daemon_that_wants_a_certificate(make_daemon: Make, tmp_path: Path) -> None:
    far = Far(make_daemon(), tmp_path / "home", clients=True)
    options = ("--host", far.url, "--token-file", far.tokens["read"], "--ca", str(far.files.ca))
    assert "GLIDEFS_CERT" in far.fails(*options, "list")
    ours = {"GLIDEFS_CERT": str(far.files.client_cert), "GLIDEFS_KEY": str(far.files.client_key)}
    assert far.json(*options, "list", env=ours) == []
    pair = ("--cert", ours["GLIDEFS_CERT"], "--key", ours["GLIDEFS_KEY"])
    far.json("context", "set", "prod", *options, *pair)
    assert far.json("--context", "prod", "list") == []


def test_contexts_are_written_as_they_are_read(tmp_path: Path) -> None:
    path = str(tmp_path / "a" / "contexts.toml")
    places = {"a": Place("https://h:1", 'a "b" \\ é', None, "c", "d"), "b-2": Place("https://h:2")}
    write_contexts(path, "b-2", places)
    assert read_contexts(path) == {"current": "b-2", "contexts": places}


@pytest.mark.parametrize(
    ("words", "command"),
    [
        ("list", "list"),
        ("--host h list", "list"),
        ("--host=h --ca c show list", "show"),
        ("--version", ""),
        ("-h", ""),
        ("", ""),
    ],
)
def test_the_command_is_found_behind_options(words: str, command: str) -> None:
    assert lean._asked(words.split()) == command
