"""`glidefs ui`: how to reach the dashboard, and a loopback address that a browser can open.

A browser cannot open a Unix socket. The listener here is on 127.0.0.1 and forwards only what the page
needs: GET of its files and of the live view. It wants a token made for this run, because other users of the
host reach 127.0.0.1, too, and a name that means this host, because other sites' pages can be made to.
"""

from __future__ import annotations

import hmac
import re
import secrets
import socket
import socketserver
from http.server import BaseHTTPRequestHandler
from typing import Any

from glidefs.api.client import socket_path
from glidefs.cli import output
from glidefs.cli.common import reported, show_result
from glidefs.cli.target import remote
from glidefs.errors import ConfigError
from glidefs.places import config_path

LOOPBACK = "127.0.0.1"
NAMES = (LOOPBACK, "localhost")
PUBLIC = re.compile(r"/ui(/[a-z.]+)?")
GUARDED = re.compile(r"/v1/live(/[A-Za-z0-9._~%-]+)?")
PATIENCE = 60.0
"""Seconds for one answer of the daemon."""


def ui_command(port: int | None, config: str | None, as_json: bool) -> None:
    """Say how to reach the dashboard, or with a port serve it until interrupted."""
    with reported(as_json):
        if (elsewhere := remote(config)) is not None:
            url = f"{elsewhere.path.rstrip('/')}/ui"
            show_result({"url": url}, as_json, f"open {url}; it asks for a token with the scope read")
            return
        if port is None:
            _say_how(config, as_json)
            return
        token = secrets.token_urlsafe(24)
        with Forwarder(port, socket_path(config), token) as server:
            url = f"http://{LOOPBACK}:{server.port}/ui#token={token}"
            if as_json:
                output.emit({"url": url})
            else:
                print(f"open {url}\nThe token is of this run; it ends with ctrl-C.", flush=True)
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                return


def _say_how(config: str | None, as_json: bool) -> None:
    ways = {
        "here": "glidefs ui --port 8080",
        "from another host": f"ssh -t -L 8080:{LOOPBACK}:8080 HOST glidefs ui --port 8080",
    }
    if over := _over_tcp(config):
        ways["over TCP"] = over
    if as_json:
        output.emit(ways)
        return
    for where, way in ways.items():
        print(f"{where + ':':<19} {way}")


def _over_tcp(config: str | None) -> str | None:
    """The address and what opens it, where the API listens on TCP and the configuration can be read."""
    from glidefs.config import load_config

    try:
        api = load_config(config_path(config)).api
    except (ConfigError, OSError):
        return None
    if api.listen is None:
        return None
    tokens = []
    if api.tokens_file is not None:
        tokens.append("a token of [api] tokens_file ('glidefs token' makes one)")
    if api.token_file is not None:
        tokens.append("the token of [api] token_file")
    also = "" if api.client_ca is None else " and a certificate of [api] client_ca in the browser"
    scheme = "http" if api.tls_cert is None else "https"
    return f"{scheme}://{api.listen}/ui, with {' or '.join(tokens)}{also}"


class Forwarder(socketserver.ThreadingTCPServer):
    """Listens on the loopback address and asks the daemon on ``path``. Raises ConfigError if it cannot."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, port: int, path: str, token: str) -> None:
        self.path = path
        self.token = token
        try:
            super().__init__((LOOPBACK, port), _Request)
        except OSError as error:
            raise ConfigError(f"port {port} of {LOOPBACK}: {error.strerror}; choose another one") from error

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.server_address[1])


class _Request(BaseHTTPRequestHandler):
    server: Forwarder
    timeout = PATIENCE

    def do_GET(self) -> None:
        """Forward one request, or refuse it."""
        self.close_connection = True
        name = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
        path = self.path.partition("?")[0]
        if name not in NAMES:
            self._refuse(421, "open this page as http://127.0.0.1 or http://localhost")
        elif PUBLIC.fullmatch(path):
            self._forward(path)
        elif not GUARDED.fullmatch(path):
            self._refuse(404, "only the dashboard and what it shows is here; use the control socket")
        elif not self._is_known():
            self._refuse(401, "a token is required: open the address that 'glidefs ui' printed")
        else:
            self._forward(path)

    def _is_known(self) -> bool:
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(token.encode(), self.server.token.encode())

    def _forward(self, path: str) -> None:
        """The daemon's answer goes on as it is."""
        sent = False
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as daemon:
                daemon.settimeout(PATIENCE)
                daemon.connect(self.server.path)
                daemon.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode("ascii"))
                while part := daemon.recv(1 << 18):
                    self.wfile.write(part)
                    sent = True
        except OSError:
            if not sent:
                self._refuse(502, "the daemon does not answer")

    def _refuse(self, status: int, why: str) -> None:
        body = f'{{"error": "{why}"}}'.encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Not a word: the terminal has the address."""
