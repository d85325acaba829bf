"""The daemon's API for commands, which wait for what is imported here: it is little, and nothing heavy."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from glidefs.api.wire import BadAnswer, request
from glidefs.errors import GlideError
from glidefs.places import DEFAULT_CONFIG, DEFAULT_SOCKET, api_socket, config_path


class CommandError(GlideError):
    """A command failed: one line of reason, one of what to do about it."""

    def __init__(self, reason: str, hint: str = "", status: int = 0) -> None:
        super().__init__(reason)
        self.reason = reason
        self.hint = hint
        self.status = status


def socket_path(config: str | None = None) -> str:
    """The daemon's socket: GLIDEFS_SOCKET, else the configuration's, else the default. Raises ConfigError."""
    if not config and os.environ.get("GLIDEFS_SOCKET"):
        return os.environ["GLIDEFS_SOCKET"]
    path = config_path(config)
    if not config and str(path) == DEFAULT_CONFIG and not path.exists():
        return DEFAULT_SOCKET
    found = api_socket(path)
    if found is None:
        from glidefs.config import load_config

        found = load_config(path).api.socket
    return found


def export_path(name: str, verb: str = "") -> str:
    """The API path of an export and a verb on it."""
    return f"/api/exports/{quote(name, safe='')}" + (f"/{verb}" if verb else "")


class Client:
    """The daemon at the socket ``path``. Every call opens its own connection, so any thread may use it."""

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
        try:
            status, raw = self._send(method, path, payload, headers, timeout)
        except (OSError, BadAnswer) as error:
            raise self._unreachable(error) from error
        return _decoded(status, raw)

    def _send(
        self,
        method: str,
        target: str,
        body: bytes | None,
        headers: Mapping[str, str],
        timeout: float | None,
    ) -> tuple[int, bytes]:
        return request(self.path, method, target, body, headers, timeout)

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
        if isinstance(error, ConnectionResetError):
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
