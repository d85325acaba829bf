"""The lean HTTP client of the hot path: ranged GETs of presigned URLs over kept connections.

Guest reads that miss the cache cost one such GET each, so its CPU time counts. The general clients
spend most of theirs on header objects, retries, redirects and signing that this request does not
need (figures: ``ARCHITECTURE.md``). This one knows GET, Content-Length and chunked bodies,
keep-alive and TLS; whatever else it meets it reports, and the caller asks boto3 instead.

Connections are kept in a stack; push and pop of a deque are atomic, so no lock is held and a slow
request delays nobody. Each connection is used by one thread at a time. A kept connection that the
server closed meanwhile is no error: the request is sent once more, on a new one.
"""

from __future__ import annotations

import socket
import ssl
from collections import deque
from io import BufferedReader
from typing import NamedTuple, cast

_MAX_LINE = 16384
_MAX_HEADERS = 100
_MAX_ERROR_BODY = 65536
_IDLE_ERRORS = (ConnectionResetError, BrokenPipeError, ConnectionAbortedError)


class HttpError(Exception):
    """The connection failed, or what came was not an HTTP response."""


class _Stale(Exception):
    """The server had closed a kept connection before it saw the request."""


class Response(NamedTuple):
    """Status, the headers that matter, and the body (of errors: its first bytes).

    ``complete`` is false where the connection ended before the body did.
    """

    status: int
    headers: dict[bytes, bytes]
    body: bytes
    complete: bool


class _Connection:
    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.reader = cast(BufferedReader, sock.makefile("rb", buffering=4096))
        self.used = False

    def close(self) -> None:
        self.reader.close()
        self.sock.close()


class RangeClient:
    """GETs from one host. Keeps at most ``pool_size`` idle connections; timeouts in seconds."""

    def __init__(
        self,
        host: str,
        port: int,
        *,
        tls: ssl.SSLContext | None,
        pool_size: int,
        connect_timeout: float,
        read_timeout: float,
    ) -> None:
        self.host = host
        self.port = port
        self._tls = tls
        self._idle: deque[_Connection] = deque(maxlen=None)
        self._pool_size = pool_size
        self._connect_timeout = connect_timeout
        self._read_timeout = read_timeout
        name = f"[{host}]" if ":" in host else host
        default = 443 if tls else 80
        self._host_header = name if port == default else f"{name}:{port}"

    def get(self, target: str, byte_range: str, limit: int) -> Response:
        """GET ``target`` (path and query) with ``Range: bytes={byte_range}``.

        A body longer than ``limit`` bytes is not read. Raises HttpError or OSError.
        """
        request = (
            f"GET {target} HTTP/1.1\r\nHost: {self._host_header}\r\nRange: bytes={byte_range}\r\n"
            "Accept-Encoding: identity\r\nUser-Agent: glidefs\r\n\r\n"
        ).encode("latin-1")
        try:
            connection = self._idle.pop()
        except IndexError:
            connection = self._connect()
        try:
            return self._exchange(connection, request, limit)
        except _Stale:
            # The server restarted or tidied up: its other kept connections are as dead as this one.
            self.drop_idle()
            return self._exchange(self._connect(), request, limit)

    def _connect(self) -> _Connection:
        sock = socket.create_connection((self.host, self.port), timeout=self._connect_timeout)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._tls is not None:
                sock = self._tls.wrap_socket(sock, server_hostname=self.host)
            sock.settimeout(self._read_timeout)
            return _Connection(sock)
        except BaseException:
            sock.close()
            raise

    def _exchange(self, connection: _Connection, request: bytes, limit: int) -> Response:
        keep = False
        try:
            status_line = self._send(connection, request)
            version, status = _parse_status(status_line)
            headers = _read_headers(connection.reader)
            body, complete, drained = _read_body(connection.reader, status, headers, limit)
            closing = headers.get(b"connection", b"").lower() == b"close" or version == b"HTTP/1.0"
            keep = drained and not closing
            return Response(status, headers, body, complete)
        finally:
            if keep and len(self._idle) < self._pool_size:
                connection.used = True
                self._idle.append(connection)
            else:
                connection.close()

    def _send(self, connection: _Connection, request: bytes) -> bytes:
        """Send the request and return the status line."""
        try:
            connection.sock.sendall(request)
            line = connection.reader.readline(_MAX_LINE)
        except _IDLE_ERRORS as error:
            if connection.used:
                raise _Stale from error
            raise
        if not line:
            if connection.used:
                raise _Stale
            raise HttpError("the server closed the connection without an answer")
        return line

    def drop_idle(self) -> None:
        """Close the kept connections (after a failure they are suspect)."""
        while True:
            try:
                self._idle.pop().close()
            except IndexError:
                return

    def close(self) -> None:
        """Close what is idle; connections in use are closed by who uses them."""
        self._pool_size = 0
        self.drop_idle()


def _parse_status(line: bytes) -> tuple[bytes, int]:
    parts = line.split(None, 2)
    if len(parts) < 2 or not parts[0].startswith(b"HTTP/1.") or not parts[1].isdigit():
        raise HttpError(f"not an HTTP answer: {line[:40]!r}")
    return parts[0], int(parts[1])


def _read_headers(reader: BufferedReader) -> dict[bytes, bytes]:
    headers: dict[bytes, bytes] = {}
    for _ in range(_MAX_HEADERS):
        line = reader.readline(_MAX_LINE)
        if line in (b"\r\n", b"\n"):
            return headers
        name, colon, value = line.partition(b":")
        if not colon or not line.endswith(b"\n"):
            raise HttpError("bad or truncated header")
        headers[name.strip().lower()] = value.strip()
    raise HttpError("too many headers")


def _read_body(
    reader: BufferedReader, status: int, headers: dict[bytes, bytes], limit: int
) -> tuple[bytes, bool, bool]:
    """(body, is it complete, may the connection be used again)."""
    if status in (204, 304):
        return b"", True, True
    cap = limit if status == 206 else _MAX_ERROR_BODY
    if b"chunked" in headers.get(b"transfer-encoding", b"").lower():
        return _read_chunked(reader, cap)
    stated = headers.get(b"content-length")
    if stated is None:
        body = reader.read(cap + 1)
        return body[:cap], len(body) <= cap, False
    if not stated.isdigit():
        raise HttpError("bad Content-Length")
    length = int(stated)
    if length > cap:
        return reader.read(cap) if status != 206 else b"", False, False
    body = reader.read(length)
    complete = len(body) == length
    return body, complete, complete


def _read_chunked(reader: BufferedReader, cap: int) -> tuple[bytes, bool, bool]:
    parts: list[bytes] = []
    total = 0
    while True:
        size_text = reader.readline(_MAX_LINE).split(b";", 1)[0].strip()
        try:
            size = int(size_text, 16)
        except ValueError:
            return b"".join(parts), False, False
        if size == 0:
            drained = reader.readline(_MAX_LINE) == b"\r\n"
            return b"".join(parts), True, drained
        if size < 0 or total + size > cap:
            return b"".join(parts), False, False
        part = reader.read(size)
        parts.append(part)
        total += len(part)
        if len(part) != size or reader.readline(_MAX_LINE) != b"\r\n":
            return b"".join(parts), False, False
