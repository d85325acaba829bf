"""A daemon on another host, over HTTPS with a token. Imported only by commands that are sent to one."""

from __future__ import annotations

import http.client
import os
import ssl
from collections.abc import Mapping
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

from glidefs.api.client import Client, CommandError
from glidefs.api.wire import MAX_ANSWER, BadAnswer
from glidefs.errors import ConfigError

CONNECT_TIMEOUT = 15.0
"""Seconds until a host that does not answer at all counts as away."""


class RemoteClient(Client):
    """One daemon at ``url``. Raises ConfigError for a URL or a file that cannot be used.

    ``token_file``: what has the token. ``ca``: certificates to trust instead of the system's. ``cert`` and
    ``key``: ours, for a daemon that wants one.
    """

    def __init__(
        self,
        url: str,
        token_file: str | None = None,
        ca: str | None = None,
        cert: str | None = None,
        key: str | None = None,
    ) -> None:
        super().__init__(url)
        self._host, self._port, secure = _place(url)
        self._token = None if token_file is None else _read_token(token_file)
        self._tls = _context(ca, cert, key) if secure else None
        self._unnamed = secure and cert is None

    def _send(
        self,
        method: str,
        target: str,
        body: bytes | None,
        headers: Mapping[str, str],
        timeout: float | None,
    ) -> tuple[int, bytes]:
        connection = self._connection()
        fields = dict(headers) | ({"Authorization": f"Bearer {self._token}"} if self._token else {})
        try:
            connection.connect()
            connection.sock.settimeout(timeout)
            connection.request(method, target, body, fields)
            answer = connection.getresponse()
            data = answer.read(MAX_ANSWER + 1)
        except http.client.RemoteDisconnected:
            raise
        except http.client.IncompleteRead as error:
            raise ConnectionResetError("the connection ended before the answer did") from error
        except http.client.HTTPException as error:
            raise BadAnswer("the answer is not HTTP") from error
        finally:
            connection.close()
        if len(data) > MAX_ANSWER:
            raise BadAnswer(f"the answer has more than {MAX_ANSWER} bytes")
        return answer.status, data

    def _connection(self) -> http.client.HTTPConnection:
        if self._tls is None:
            return http.client.HTTPConnection(self._host, self._port, timeout=CONNECT_TIMEOUT)
        return http.client.HTTPSConnection(self._host, self._port, timeout=CONNECT_TIMEOUT, context=self._tls)

    def _unreachable(self, error: Exception) -> CommandError:
        if isinstance(error, ssl.SSLCertVerificationError):
            hint = "name its CA with --ca, or the host as its certificate has it"
            return CommandError(
                f"{self.path}: the certificate is not to be trusted: {error.verify_message}", hint
            )
        if isinstance(error, ssl.SSLError):
            hint = "is it https there, and does it want a certificate (GLIDEFS_CERT, GLIDEFS_KEY)?"
            return CommandError(f"{self.path}: TLS failed: {error.reason or error}", hint)
        if isinstance(error, ConnectionResetError | BrokenPipeError) and self._unnamed:
            hint = "see its log; or does it want a certificate (GLIDEFS_CERT, GLIDEFS_KEY)?"
            return CommandError(f"{self.path}: the daemon ended the connection", hint)
        if isinstance(error, ConnectionRefusedError):
            return CommandError(
                f"no daemon answers on {self.path}", "does [api] listen name this address there?"
            )
        if isinstance(error, OSError) and not isinstance(error, ConnectionError | TimeoutError):
            return CommandError(f"{self.path}: {error.strerror or error}", "is the name of the host right?")
        return super()._unreachable(error)


def _place(url: str) -> tuple[str, int, bool]:
    """Host, port and whether it is TLS, of "https://host:port". Raises ConfigError."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or not port or parts.scheme not in ("http", "https") or parts.path not in ("", "/"):
        raise ConfigError(f"{url[:100]!r} is not the address of a daemon; write it as https://host:8440")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ConfigError(
            f"the address of a daemon is https://{host}:{port} and no more; the token is in a file"
        )
    if parts.scheme == "http" and not _is_here(host):
        raise ConfigError(
            f"{url}: a token would cross the network as plain text; use https, or a tunnel to it"
        )
    return host, port, parts.scheme == "https"


def _is_here(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _read_token(path: str) -> str:
    """Raises ConfigError; never shows the token."""
    try:
        mode = os.stat(path).st_mode
        token = Path(path).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"token file {path}: {getattr(error, 'strerror', None) or 'not ASCII text'}"
        ) from None
    if mode & 0o077:
        raise ConfigError(f"token file {path}: others can read it; chmod 600 {path}")
    if not token or not token.isprintable() or " " in token:
        raise ConfigError(f"token file {path}: it should have the token and nothing else")
    return token


def _context(ca: str | None, cert: str | None, key: str | None) -> ssl.SSLContext:
    """Raises ConfigError."""
    context = ssl.create_default_context()
    try:
        if ca is not None:
            context = ssl.create_default_context(cafile=ca)
        if cert is not None:
            context.load_cert_chain(cert, key)
    except (OSError, ValueError) as error:
        which = ", ".join(path for path in (ca, cert, key) if path)
        raise ConfigError(
            f"{which}: not what TLS needs: {getattr(error, 'strerror', None) or error}"
        ) from None
    return context
