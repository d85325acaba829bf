"""HTTP over the daemon's Unix socket, with the standard library only: a command starts in milliseconds."""

from __future__ import annotations

import http.client
import json
import os
import socket
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from glidefs.config import DEFAULT_CONFIG, DEFAULT_SOCKET, config_path, load_config
from glidefs.errors import GlideError

MAX_ANSWER = 256 << 20


class CommandError(GlideError):
    """A command failed: one line of reason, one of what to do about it."""

    def __init__(self, reason: str, hint: str = "", status: int = 0) -> None:
        super().__init__(reason)
        self.reason = reason
        self.hint = hint
        self.status = status


def socket_path(config: str | None = None) -> str:
    """The daemon's socket: GLIDEFS_SOCKET, else the configuration's, else the default."""
    if not config and os.environ.get("GLIDEFS_SOCKET"):
        return os.environ["GLIDEFS_SOCKET"]
    path = config_path(config)
    if not config and str(path) == DEFAULT_CONFIG and not path.exists():
        return DEFAULT_SOCKET
    return load_config(path).api.socket


def export_path(name: str, verb: str = "") -> str:
    """The API path of an export and a verb on it."""
    return f"/api/exports/{quote(name, safe='')}" + (f"/{verb}" if verb else "")


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float | None) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class Client:
    """One daemon. Every call opens its own connection, so any thread may use it."""

    def __init__(self, path: str) -> None:
        self.path = path

    def call(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        query: dict[str, Any] | None = None,
        timeout: float | None = None,
    ) -> Any:
        """Send one request and return the decoded answer. Raises CommandError with the daemon's reason."""
        if query:
            path += "?" + urlencode({key: value for key, value in query.items() if value is not None})
        payload = None if body is None else json.dumps(body).encode()
        headers = {} if payload is None else {"Content-Type": "application/json"}
        connection = _UnixConnection(self.path, timeout)
        try:
            connection.request(method, path, payload, headers)
            answer = connection.getresponse()
            raw = answer.read(MAX_ANSWER)
            status = answer.status
        except (OSError, http.client.HTTPException) as error:
            raise self._unreachable(error) from error
        finally:
            connection.close()
        return _decoded(status, raw)

    def _unreachable(self, error: Exception) -> CommandError:
        if isinstance(error, PermissionError):
            return CommandError(
                f"no permission for {self.path}", "run the command as the daemon's user (root?)"
            )
        if isinstance(error, FileNotFoundError | ConnectionRefusedError):
            start = "start the daemon with 'glidefs run -c CONFIG', or name its socket with GLIDEFS_SOCKET"
            return CommandError(f"no daemon answers on {self.path}", start)
        if isinstance(error, TimeoutError):
            return CommandError(f"the daemon on {self.path} does not answer in time", "see its log")
        reason = str(error) or type(error).__name__
        if isinstance(error, ConnectionResetError | http.client.RemoteDisconnected):
            reason = "the daemon went away while it worked on the command"
        return CommandError(f"{self.path}: {reason}", "see the daemon's log; the command may be repeated")


def _decoded(status: int, raw: bytes) -> Any:
    try:
        value = json.loads(raw) if raw else None
    except ValueError:
        value = None
    if 200 <= status < 300:
        return value
    if isinstance(value, dict) and "error" in value:
        raise CommandError(str(value["error"]), str(value.get("hint") or ""), status)
    raise CommandError(f"the daemon answered with status {status}", "see its log", status)


def absolute(path: str) -> str:
    """A path as the daemon, which has another working directory, understands it."""
    return str(Path(path).expanduser().absolute())
