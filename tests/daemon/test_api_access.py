"""Who may do what over TCP: tokens with scopes, their file, TLS, and the record of who did what."""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import servers
from api_rig import Answer, Certificates, Door, configure, local, place_of
from daemon_harness import Daemon
from hypothesis import given, settings
from hypothesis import strategies as st
from waiting import wait_for

from glidefs.api.access import WORDS, Scope
from glidefs.api.errors import URN
from glidefs.api.routes import ROUTES, Route
from glidefs.api.server import ApiServer
from glidefs.api.tokens import Expired, Tokens, append_entry, entry_text, new_token, read_tokens
from glidefs.config import ApiSettings, parse_config
from glidefs.errors import ConfigError

pytest.importorskip("glidefs.core._core")

Make = Callable[..., Daemon]


def listening(make_daemon: Make, lines: str = "") -> tuple[Daemon, int, Path]:
    """A daemon, not started, that will listen on a port; and its file of tokens."""
    daemon, port = make_daemon(), servers.free_port()
    tokens = daemon.base / "tokens.toml"
    configure(daemon, "api", f'listen = "127.0.0.1:{port}"\ntokens_file = "tokens.toml"\n{lines}')
    return daemon, port, tokens


def made(daemon: Daemon, name: str, *scopes: str, more: tuple[str, ...] = ()) -> str:
    """A new token, which the file has."""
    options = [word for scope in scopes for word in ("--scope", scope)]
    file = str(daemon.base / "tokens.toml")
    token: str = daemon.json("token", name, *options, *more, "--file", file)["token"]
    return token


def ask(door: Door, route: Route, body: dict[str, Any] | None = None) -> Answer:
    """What the example asks, of things that are not there."""
    sent = route.example | (body or {}) if route.has_body else None
    query = None if route.has_body else body
    values = {key: "9" if key == "sequence" else "none" for key in route.at}
    return door.ask(route.method, place_of(route, **values), sent, query=query)


def test_each_operation_takes_its_scope(make_daemon: Make) -> None:
    """Every route with a token of every scope, and with each option that takes more."""
    daemon, port, _ = listening(make_daemon)
    doors = {scope: Door(port, token=made(daemon, word, word)) for word, scope in WORDS.items()} | {
        Scope.NONE: Door(port)
    }
    daemon.start()
    for route in ROUTES:
        for scope, door in doors.items():
            answer = ask(door, route, {"dry_run": True} if route.verb == "handoff" else None)
            _check(route, route.scope, scope, answer)
            if scope >= route.scope:
                for option in route.admin:
                    _check(route, Scope.ADMIN, scope, ask(door, route, {option: True}))
    assert "Traceback" not in daemon.log_text


def _check(route: Route, takes: Scope, has: Scope, answer: Answer) -> None:
    where = (route.verb, takes, has, answer.status, answer.body)
    if has >= takes:
        assert answer.status not in (401, 403), where
    elif route.method == "HEAD":
        assert answer.status == (401 if has is Scope.NONE else 403), where
    elif has is Scope.NONE:
        assert (answer.status, answer.problem["type"]) == (401, f"{URN}unauthorized"), where
        assert answer.headers["WWW-Authenticate"] == "Bearer"
    else:
        assert (answer.status, answer.problem["type"]) == (403, f"{URN}forbidden"), where
        assert answer.problem["scope"] == takes.word
        assert takes.word in answer.problem["error"]


def test_a_refused_verb_does_nothing(make_daemon: Make) -> None:
    daemon, port, _ = listening(make_daemon)
    reader, operator = (Door(port, token=made(daemon, word, word)) for word in ("read", "operate"))
    daemon.start()
    assert reader.ask("PUT", "/v1/exports/v1", {"size": "1GiB"}).status == 403
    assert daemon.json("list") == []
    assert operator.ask("PUT", "/v1/exports/v1", {"size": "1GiB"}).status == 201
    for query in ({"purge": "true"}, {"now": "1"}, {"force": "True"}):
        assert operator.ask("DELETE", "/v1/exports/v1", query=query).status == 403
    assert operator.ask("POST", "/v1/exports/v1/resize", {"size": "1MiB", "shrink": True}).status == 403
    assert daemon.json("show", "v1")["size"] == 1 << 30
    assert operator.ask("DELETE", "/v1/exports/v1").status == 200
    assert daemon.json("list") == []


def test_the_file_is_read_again(make_daemon: Make) -> None:
    daemon, port, path = listening(make_daemon)
    door = Door(port, token=made(daemon, "one", "read"))
    daemon.start()
    assert door.ask("GET", "/v1/exports").status == 200
    later = Door(port, token=made(daemon, "two", "read"))
    wait_for(lambda: later.ask("GET", "/v1/exports").status == 200, "the new token works")
    assert door.ask("GET", "/v1/exports").status == 200
    kept = path.read_text()
    path.write_text(kept.split("\n\n")[1])
    wait_for(lambda: door.ask("GET", "/v1/exports").status == 401, "the old token does not")
    assert later.ask("GET", "/v1/exports").status == 200
    for spoil in (
        lambda: path.write_text(kept + "[[token]]\n"),
        lambda: path.unlink(),
    ):
        spoil()
        wait_for(lambda: later.ask("GET", "/v1/exports").status == 401, "a spoilt file lets nobody in")
        assert local(daemon).ask("GET", "/v1/exports").status == 200
        path.write_text(kept)
        path.chmod(0o600)
        wait_for(lambda: later.ask("GET", "/v1/exports").status == 200, "it is whole again")
    path.chmod(0o640)
    wait_for(lambda: later.ask("GET", "/v1/exports").status == 401, "one that others can read, too")
    assert "chmod 600" in daemon.log_text
    daemon.stop()
    assert "others can read it" in daemon.fails("run")


def test_a_handoff_takes_the_tokens_along(make_daemon: Make) -> None:
    daemon, port, _ = listening(make_daemon)
    door = Door(port, token=made(daemon, "boss", "admin"))
    daemon.start()
    before = door.ask("GET", "/health").json["pid"]
    made(daemon, "late", "read")
    assert door.ask("POST", "/v1/handoff", {}).json["outcome"] == "succeeded"
    assert wait_for(lambda: door.ask("GET", "/health").json["pid"], "the new process answers") != before
    pid = door.ask("GET", "/health").json["pid"]
    os.kill(pid, signal.SIGTERM)
    wait_for(lambda: not Path(f"/proc/{pid}").exists(), "the new process has ended")


def test_no_token_is_kept_as_text(make_daemon: Make) -> None:
    daemon, port, path = listening(make_daemon, 'audit_log = "audit.jsonl"')
    token = made(daemon, "ci", "operate")
    daemon.start()
    door = Door(port, token=token)
    door.ask("PUT", "/v1/exports/v1", {"size": "1GiB"})
    Door(port, token=token + "x").ask("PUT", "/v1/exports/v1", {"size": "1GiB"})
    for file in (path, daemon.base / "audit.jsonl", daemon.base / "daemon.log"):
        assert token not in file.read_text(), file
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert "401, the token is not known here" in daemon.log_text


def test_who_did_what(make_daemon: Make) -> None:
    daemon, port, _ = listening(make_daemon, 'audit_log = "audit.jsonl"')
    door = Door(port, token=made(daemon, "ci", "operate"))
    daemon.start()
    audit = daemon.base / "audit.jsonl"
    door.ask("PUT", "/v1/exports/v1", {"size": "1GiB"})
    door.ask("GET", "/v1/exports")
    door.ask("DELETE", "/v1/exports/v1", query={"purge": "true"})
    door.ask("POST", "/v1/exports/none/drain", {})
    door.ask("POST", "/v1/exports/none/tag", {"tag": "x" * 9000})
    audit.rename(daemon.base / "audit.1")  # as what keeps logs small does
    local(daemon).ask("DELETE", "/v1/exports/v1")
    lines = [json.loads(line) for name in ("audit.1", "audit.jsonl") for line in (daemon.base / name).open()]
    said = [(line["verb"], line["outcome"], line["status"], line["options"]) for line in lines]
    assert said == [
        ("create", "done", 201, {"size": "1GiB"}),
        ("remove", "refused", 403, {"purge": True}),
        ("drain", "failed", 404, {}),
        ("tag", "failed", 400, {"tag": "x" * 200}),
        ("remove", "done", 200, {}),
    ]
    assert {line["token"] for line in lines[:4]} == {"ci"}
    assert all(line["by"].startswith("token ci at 127.0.0.1:") for line in lines[:4])
    assert lines[4]["by"] == f"uid {os.getuid()} pid {os.getpid()}"
    assert stat.S_IMODE(audit.stat().st_mode) == 0o600
    text = [line for line in daemon.log_text.splitlines() if "glidefs.audit" in line]
    assert sum("remove purge=True, DELETE /v1/exports/v1: 403 in" in line for line in text) == 1
    assert sum("GET /v1/exports" in line for line in text) == 0


def test_an_audit_log_that_cannot_be_written_stops_nothing(make_daemon: Make) -> None:
    daemon = make_daemon()
    configure(daemon, "api", 'audit_log = "absent/audit.jsonl"')
    daemon.start()
    for name in ("v1", "v2"):
        assert local(daemon).ask("PUT", f"/v1/exports/{name}", {"size": "1GiB"}).status == 201
    assert daemon.log_text.count("[api] audit_log") == 1


# ---- TLS ----


def test_tls(make_daemon: Make, tmp_path: Path) -> None:
    files = Certificates(tmp_path)
    daemon, port, _ = listening(make_daemon, files.lines(clients=False))
    token = made(daemon, "ci", "read")
    daemon.start()
    assert Door(port, files.anybody, token).ask("GET", "/v1/exports").json == []
    assert Door(port, files.anybody).ask("GET", "/v1/exports").problem["status"] == 401
    with pytest.raises(ConnectionError):
        Door(port, None, token).ask("GET", "/v1/exports")
    with pytest.raises(ssl.SSLCertVerificationError):
        Door(port, ssl.create_default_context(), token).ask("GET", "/v1/exports")


def test_tls_with_certificates_of_clients(make_daemon: Make, tmp_path: Path) -> None:
    files = Certificates(tmp_path)
    daemon, port, _ = listening(make_daemon, files.lines(clients=True))
    token = made(daemon, "ci", "read")
    daemon.start()
    assert Door(port, files.client, token).ask("GET", "/v1/exports").json == []
    assert Door(port, files.client).ask("GET", "/v1/exports").status == 401
    for context in (files.anybody, files.stranger):
        with pytest.raises((ssl.SSLError, ConnectionError)):
            Door(port, context, token).ask("GET", "/v1/exports")
    assert daemon.json("list") == []


def test_files_of_tls_that_are_wrong(make_daemon: Make, tmp_path: Path) -> None:
    files = Certificates(tmp_path)
    daemon, _, _ = listening(make_daemon, files.lines(clients=True))
    made(daemon, "ci", "read")
    good = {path: path.read_text() for path in (files.ca, files.cert, files.key)}
    for path, text in good.items():
        for spoilt in (None, "nonsense"):
            path.unlink() if spoilt is None else path.write_text(spoilt)
            line = daemon.fails("run")
            assert str(path) in line
            assert "[api]" in line
        path.write_text(text)
    files.key.write_text(Certificates(tmp_path / "..").key.read_text())
    assert "tls_key" in daemon.fails("run")


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ('listen = "0.0.0.0:1"\ntokens_file = "t"', "allow_plaintext = true"),
        ('listen = "[::]:1"\ntoken_file = "t"', "allow_plaintext = true"),
        ('listen = "host.test:1"\ntokens_file = "t"', "allow_plaintext = true"),
        ('listen = "127.0.0.1:1"', "only with tokens"),
        ('listen = "0.0.0.0"\ntokens_file = "t"', "is not an address"),
        ('tls_cert = "c"', "tls_key"),
        ('tls_key = "c"', "tls_cert"),
        ('client_ca = "c"', "tls_cert"),
        ('listen = "127.0.0.1:1"\ntokens_file = "t"', ""),
        ('listen = "[::1]:1"\ntokens_file = "t"', ""),
        ('listen = "localhost:1"\ntoken_file = "t"', ""),
        ('listen = "0.0.0.0:1"\ntokens_file = "t"\nallow_plaintext = true', ""),
        ('listen = "0.0.0.0:1"\ntokens_file = "t"\ntls_cert = "c"\ntls_key = "k"', ""),
    ],
)
def test_settings_that_go_together(lines: str, said: str) -> None:
    if not said:
        parse_config(f"[api]\n{lines}\n")
        return
    with pytest.raises(ConfigError) as raised:
        parse_config(f"[api]\n{lines}\n")
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_port_of_a_socket_unit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a Unix socket everybody is an admin: nobody else may come in there."""
    listener = socket.create_server(("127.0.0.1", 0))
    monkeypatch.setattr("glidefs.api.server.activated_listeners", lambda *_: [listener])
    server = ApiServer(ApiSettings(), Mock())
    with pytest.raises(ConfigError, match=r"use \[api\] listen for TCP"):
        server.prepare()
    assert listener.fileno() == -1


# ---- the file of tokens ----


def test_the_command_makes_what_the_daemon_reads(tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    token = new_token()
    append_entry(str(path), "a", entry_text("a", token, ["read", "metrics"], 2_000_000_000.0))
    append_entry(str(path), "b", entry_text("b", new_token(), ["admin"]))
    found = read_tokens(str(path))
    assert [(one.name, one.scope, one.expires) for one in found] == [
        ("a", Scope.READ, 2_000_000_000.0),
        ("b", Scope.ADMIN, None),
    ]
    with pytest.raises(ConfigError, match="has a token a already"):
        append_entry(str(path), "a", entry_text("a", new_token(), ["read"]))
    tokens = Tokens(None, str(path))
    known = tokens.find(token.encode())
    assert known is not None
    assert known.name == "a"
    assert tokens.find(token.encode()[:-1]) is None
    assert tokens.find(b"") is None


def test_a_token_expires(tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    token = new_token()
    append_entry(str(path), "a", entry_text("a", token, ["read"], time.time() - 1))
    with pytest.raises(Expired, match="the token a has expired"):
        Tokens(None, str(path)).find(token.encode())


def test_when_a_token_expires_is_said_in_days_or_as_a_time(make_daemon: Make) -> None:
    daemon = make_daemon()
    now = time.time()
    for text, seconds in (("90d", now + 90 * 86400), ("2100-01-31T00:00:00Z", 4105036800.0)):
        entry = daemon.json("token", "a", "--scope", "read", "--expires", text)["entry"]
        path = daemon.base / "entry.toml"
        path.touch(0o600)
        path.write_text(entry)
        (token,) = read_tokens(str(path))
        assert token.expires is not None
        assert abs(token.expires - seconds) < 120
    assert "write days as '90d'" in daemon.fails("token", "a", "--scope", "read", "--expires", "soon")
    assert "there is no scope 'reed'" in daemon.fails("token", "a", "--scope", "reed")
    assert "cannot be the name of a token" in daemon.fails("token", "a b", "--scope", "read")


HASH = "0" * 64


@pytest.mark.parametrize(
    "text",
    [
        "[[token]]\n",
        "nonsense",
        f'[[token]]\nname = "a"\nsha256 = "{HASH[1:]}"\nscopes = ["read"]\n',
        f'[[token]]\nname = "a"\nsha256 = "{HASH}"\nscopes = []\n',
        f'[[token]]\nname = "a"\nsha256 = "{HASH}"\nscopes = ["reed"]\n',
        f'[[token]]\nname = "a\\nb"\nsha256 = "{HASH}"\nscopes = ["read"]\n',
        f'[[token]]\nname = "a"\nsha256 = "{HASH}"\nscopes = ["read"]\nexpire = 1\n',
        f'[[token]]\nname = "a"\nsha256 = "{HASH}"\nscopes = ["read"]\nexpires = "soon"\n',
        f'[[token]]\nname = "a"\nsha256 = "{HASH}"\nscopes = ["read"]\nexpires = 2027-01-31T00:00:00\n',
        f'[[token]]\nname = "a"\nsha256 = "{HASH}"\nscopes = ["read"]\n' * 2,
    ],
)
def test_a_file_that_is_wrong_is_refused_whole(tmp_path: Path, text: str) -> None:
    path = tmp_path / "tokens.toml"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(ConfigError) as raised:
        read_tokens(str(path))
    assert str(raised.value).startswith(f"[api] tokens_file {path}: ")


@settings(deadline=None)
@given(st.binary(max_size=80))
def test_no_other_bytes_are_a_token(tmp_path_factory: pytest.TempPathFactory, given_bytes: bytes) -> None:
    path = tmp_path_factory.mktemp("tokens") / "tokens.toml"
    path.write_text(entry_text("a", new_token(), ["admin"]))
    path.chmod(0o600)
    assert Tokens(None, str(path)).find(given_bytes) is None
