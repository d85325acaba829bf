"""The lean HTTP client of the hot path: ranged GETs of presigned URLs over kept connections.

Guest reads that miss the cache cost one such GET each, so its CPU time counts. The general clients
spend most of theirs on header objects, retries, redirects and signing that this request does not
need (figures: ``ARCHITECTURE.md``). This one knows GET, Content-Length and chunked bodies,
keep-alive and TLS; whatever else it meets it reports, and the caller asks boto3 instead.

A system call costs more than it seems here: each gives the interpreter lock up, and takes it back in
competition with the other readers. So an exchange is three of them: send, the head, the whole body
(MSG_WAITALL); the kernel keeps the time (SO_RCVTIMEO), where Python's own would add a poll to each.

Connections are kept in a stack; push and pop of a deque are atomic, so no lock is held and a slow
request delays nobody. Each connection is used by one thread at a time. A kept connection that the
server closed meanwhile is no error: the request is sent once more, on a new one.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import time
from collections import deque
from typing import Any, NamedTuple

ADDRESS_LIFETIME = 60.0
"""Seconds that the address of a host is believed."""
_MAX_LINE = 16384
_MAX_HEAD = 16384
_MAX_HEADERS = 100
_MAX_ERROR_BODY = 65536
_FIRST_READ = 4096
_IDLE_ERRORS = (ConnectionResetError, BrokenPipeError, ConnectionAbortedError)


def pack_address(family: int, where: tuple[Any, ...]) -> bytes:
    """``struct sockaddr_in`` or ``sockaddr_in6``; empty for other families."""
    head = struct.pack("=H", family) + struct.pack("!H", where[1])
    if family == socket.AF_INET:
        return head + socket.inet_pton(family, where[0]) + bytes(8)
    if family == socket.AF_INET6:
        address = where[0].partition("%")[0]
        return (
            head
            + struct.pack("!I", where[2])
            + socket.inet_pton(family, address)
            + struct.pack("=I", where[3])
        )
    return b""


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
    body: bytes | memoryview
    complete: bool


class _Connection:
    """A socket and what was received of it but not used yet (``_pending``)."""

    __slots__ = ("_flags", "_pending", "_sock", "used")

    def __init__(self, sock: socket.socket, timeout: float) -> None:
        self._sock = sock
        self._pending = b""
        self.used = False
        if isinstance(sock, ssl.SSLSocket):
            sock.settimeout(timeout)
            self._flags = 0  # TLS has records, and no flags
        else:
            sock.settimeout(None)
            limit = struct.pack("ll", int(timeout), int(timeout % 1 * 1e6))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
            self._flags = socket.MSG_WAITALL

    def close(self) -> None:
        self._sock.close()

    def peer(self) -> bytes:
        """The packed address of the other side; empty if it is gone."""
        with contextlib.suppress(OSError):
            return pack_address(self._sock.family, self._sock.getpeername())
        return b""

    def send(self, request: bytes) -> None:
        self._sock.sendall(request)

    def until(self, mark: bytes, limit: int) -> bytes:
        """What comes up to and with ``mark``; if it does not come within ``limit`` bytes, what came."""
        data = self._pending
        at = data.find(mark)
        while at < 0 and len(data) < limit:
            more = self._sock.recv(_FIRST_READ)
            if not more:
                break
            data = data + more if data else more
            at = data.find(mark)
        end = at + len(mark) if at >= 0 else len(data)
        self._pending = data[end:]
        return data[:end]

    def exactly(self, length: int, into: memoryview | None = None) -> bytes | memoryview:
        """``length`` bytes, fewer only if the stream ends; in ``into`` if they fill it."""
        got = min(len(self._pending), length)
        if got == length and into is None:
            data, self._pending = self._pending[:length], self._pending[length:]
            return data
        out = into if into is not None and len(into) == length else memoryview(bytearray(length))
        out[:got] = self._pending[:got]
        self._pending = self._pending[got:]
        while got < length:
            count = self._sock.recv_into(out[got:], 0, self._flags)
            if not count:
                break
            got += count
        return out[:got]

    def rest(self, limit: int) -> bytes:
        """All up to the end of the stream, at most ``limit`` bytes."""
        parts = [self._pending]
        total = len(self._pending)
        while total < limit and (more := self._sock.recv(limit - total)):
            parts.append(more)
            total += len(more)
        return b"".join(parts)[:limit]


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
        self.host_header = name if port == default else f"{name}:{port}"
        self._address = (0.0, b"")

    def get(self, target: str, byte_range: str, limit: int, into: memoryview | None = None) -> Response:
        """GET ``target`` (path and query) with ``Range: bytes={byte_range}``.

        A body longer than ``limit`` bytes is not read; one that fits ``into`` is put there. Raises
        HttpError or OSError.
        """
        request = (
            f"GET {target} HTTP/1.1\r\nHost: {self.host_header}\r\nRange: bytes={byte_range}\r\n"
            "Accept-Encoding: identity\r\nUser-Agent: glidefs\r\n\r\n"
        ).encode("latin-1")
        try:
            connection = self._idle.pop()
        except IndexError:
            connection = self._connect()
        try:
            return self._exchange(connection, request, limit, into)
        except _Stale:
            # The server restarted or tidied up: its other kept connections are as dead as this one.
            self.drop_idle()
            return self._exchange(self._connect(), request, limit, into)

    def _connect(self) -> _Connection:
        sock = socket.create_connection((self.host, self.port), timeout=self._connect_timeout)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._tls is not None:
                sock = self._tls.wrap_socket(sock, server_hostname=self.host)
            return _Connection(sock, self._read_timeout)
        except BaseException:
            sock.close()
            raise

    def _exchange(
        self, connection: _Connection, request: bytes, limit: int, into: memoryview | None
    ) -> Response:
        keep = False
        try:
            version, status, headers = _parse_head(self._send(connection, request))
            body, complete, drained = _read_body(connection, status, headers, limit, into)
            closing = headers.get(b"connection") == b"close" or version == b"http/1.0"
            keep = drained and not closing
            return Response(status, headers, body, complete)
        except BlockingIOError:
            raise TimeoutError("timed out") from None  # how SO_RCVTIMEO and SO_SNDTIMEO say so
        finally:
            if keep and len(self._idle) < self._pool_size:
                connection.used = True
                self._idle.append(connection)
            else:
                connection.close()

    def _send(self, connection: _Connection, request: bytes) -> bytes:
        """Send the request and return the head of the answer."""
        try:
            connection.send(request)
            head = connection.until(b"\r\n\r\n", _MAX_HEAD)
        except _IDLE_ERRORS as error:
            if connection.used:
                raise _Stale from error
            raise
        if not head:
            if connection.used:
                raise _Stale
            raise HttpError("the server closed the connection without an answer")
        return head

    def address(self) -> bytes:
        """A packed ``struct sockaddr`` of the host, looked up at most once in ADDRESS_LIFETIME; empty: none.

        Where it has several, that of a kept connection, which is one that answers.
        """
        until, found = self._address
        if found and time.monotonic() < until:
            return found
        found = b""
        with contextlib.suppress(IndexError):
            connection = self._idle.pop()
            found = connection.peer()
            self._idle.append(connection)
        if not found:
            with contextlib.suppress(OSError):
                for family, _, _, _, where in socket.getaddrinfo(
                    self.host, self.port, type=socket.SOCK_STREAM
                ):
                    found = found or pack_address(family, where)
        self._address = (time.monotonic() + ADDRESS_LIFETIME, found)
        return found

    def drop_idle(self) -> None:
        """Close the kept connections (after a failure they are suspect)."""
        while True:
            try:
                self._idle.pop().close()
            except IndexError:
                return

    def close(self) -> None:
        """Close what is idle; a connection in use is closed by its user."""
        self._pool_size = 0
        self.drop_idle()


def _parse_head(head: bytes) -> tuple[bytes, int, dict[bytes, bytes]]:
    """HTTP version, status, and headers by their names; all in lower case."""
    if not head.endswith(b"\r\n\r\n"):
        raise HttpError(f"bad or truncated head: {head[:40]!r}")
    first, *lines = head[:-4].lower().split(b"\r\n")
    parts = first.split(None, 2)
    if len(parts) < 2 or not parts[0].startswith(b"http/1.") or not parts[1].isdigit():
        raise HttpError(f"not an HTTP answer: {first[:40]!r}")
    if len(lines) > _MAX_HEADERS:
        raise HttpError("too many headers")
    headers: dict[bytes, bytes] = {}
    for line in lines:
        name, colon, value = line.partition(b":")
        if not colon:
            raise HttpError("bad header")
        headers[name] = value.strip()
    return parts[0], int(parts[1]), headers


def _read_body(
    connection: _Connection, status: int, headers: dict[bytes, bytes], limit: int, into: memoryview | None
) -> tuple[bytes | memoryview, bool, bool]:
    """(body, is it complete, may the connection be used again)."""
    if status in (204, 304):
        return b"", True, True
    cap = limit if status == 206 else _MAX_ERROR_BODY
    if b"chunked" in headers.get(b"transfer-encoding", b""):
        return _read_chunked(connection, cap)
    stated = headers.get(b"content-length")
    if stated is None:
        body = connection.rest(cap + 1)
        return body[:cap], len(body) <= cap, False
    if not stated.isdigit():
        raise HttpError("bad Content-Length")
    length = int(stated)
    if length > cap:
        return connection.exactly(cap) if status != 206 else b"", False, False
    found = connection.exactly(length, into if status == 206 else None)
    complete = len(found) == length
    return found, complete, complete


def _read_chunked(connection: _Connection, cap: int) -> tuple[bytes, bool, bool]:
    parts: list[bytes | memoryview] = []
    total = 0
    while True:
        size_text = connection.until(b"\n", _MAX_LINE).split(b";", 1)[0].strip()
        try:
            size = int(size_text, 16)
        except ValueError:
            return b"".join(parts), False, False
        if size == 0:
            drained = connection.until(b"\n", _MAX_LINE) == b"\r\n"
            return b"".join(parts), True, drained
        if size < 0 or total + size > cap:
            return b"".join(parts), False, False
        part = connection.exactly(size)
        parts.append(part)
        total += len(part)
        if len(part) != size or connection.exactly(2) != b"\r\n":
            return b"".join(parts), False, False
