"""The API as a client that is not ours meets it: any method, any header, over the Unix socket or TCP."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, urlencode

import trustme
from daemon_harness import Daemon
from waiting import DEADLINE

from glidefs.api.errors import MEDIA_TYPE, URN, Problem
from glidefs.api.routes import Route


class Answer(NamedTuple):
    """What came back."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def problem(self) -> dict[str, Any]:
        """The body, which must be a problem document of this status."""
        assert self.headers["Content-Type"] == MEDIA_TYPE, (self.status, self.body)
        found: dict[str, Any] = self.json
        assert found.keys() <= set(Problem.__struct_fields__)
        assert found.keys() >= {"type", "title", "status", "detail", "instance", "error"}
        assert found["status"] == self.status
        assert found["type"].startswith(URN)
        assert found["detail"] == "; ".join(filter(None, (found["error"], found.get("hint"))))
        return found


class _Local(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("glidefs", timeout=DEADLINE)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(DEADLINE)
        self.sock.connect(self._path)


class Door:
    """A way to a daemon. ``to``: the path of its socket, or a port of this host; ``tls``: how over TLS."""

    def __init__(self, to: str | int, tls: ssl.SSLContext | None = None, token: str = "") -> None:
        self.to = to
        self.tls = tls
        self.token = token

    def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        query: dict[str, Any] | None = None,
        raw: bytes | None = None,
        headers: dict[str, str] | None = None,
    ) -> Answer:
        """One request: ``body`` as JSON, or ``raw`` as it is."""
        connection: http.client.HTTPConnection
        if isinstance(self.to, str):
            connection = _Local(self.to)
        elif self.tls is not None:
            connection = http.client.HTTPSConnection("127.0.0.1", self.to, timeout=DEADLINE, context=self.tls)
        else:
            connection = http.client.HTTPConnection("127.0.0.1", self.to, timeout=DEADLINE)
        fields = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        data = raw if raw is not None else None if body is None else json.dumps(body).encode()
        try:
            path += "?" + urlencode(query) if query else ""
            connection.request(method, path, data, fields | (headers or {}))
            answer = connection.getresponse()
            return Answer(answer.status, answer.headers, answer.read())
        finally:
            connection.close()


def local(daemon: Daemon) -> Door:
    """Through the Unix socket."""
    return Door(str(daemon.base / "api.sock"))


def place_of(route: Route, **values: str) -> str:
    """The path of a route's example, with some values replaced."""
    path = route.place
    for name, value in (route.at | values).items():
        path = path.replace("{" + name + "}", quote(value, safe=""))
    return path


def configure(daemon: Daemon, section: str, lines: str) -> None:
    """Put lines into a section of the configuration."""
    text = daemon.config.read_text()
    daemon.config.write_text(text.replace(f"[{section}]\n", f"[{section}]\n{lines}\n", 1))


class Certificates:
    """A CA with a certificate for this host and one for a client, as files."""

    def __init__(self, directory: Path, host: str = "127.0.0.1") -> None:
        authority = trustme.CA()
        server, client = authority.issue_cert(host), authority.issue_cert("ci@test")
        self.ca, self.cert, self.key = (directory / name for name in ("ca.pem", "cert.pem", "key.pem"))
        authority.cert_pem.write_to_path(str(self.ca))
        server.cert_chain_pems[0].write_to_path(str(self.cert))
        server.private_key_pem.write_to_path(str(self.key))
        self.client_cert, self.client_key = directory / "client.pem", directory / "client.key"
        client.cert_chain_pems[0].write_to_path(str(self.client_cert))
        client.private_key_pem.write_to_path(str(self.client_key))
        self.anybody = ssl.create_default_context(cafile=str(self.ca))
        self.client = ssl.create_default_context(cafile=str(self.ca))
        client.configure_cert(self.client)
        self.stranger = ssl.create_default_context(cafile=str(self.ca))
        trustme.CA().issue_cert("ci@test").configure_cert(self.stranger)

    def lines(self, *, clients: bool) -> str:
        found = f'tls_cert = "{self.cert}"\ntls_key = "{self.key}"\n'
        return found + (f'client_ca = "{self.ca}"\n' if clients else "")
