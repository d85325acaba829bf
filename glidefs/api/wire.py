"""One HTTP request over a Unix socket: the part of HTTP that a command needs, and no module for the rest.

``http.client`` brings the parser of mail headers and TLS along, whose import takes longer than the answer
to most commands. A request of HTTP/1.0 has its answer in one piece, up to the end of the connection.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Mapping

MAX_ANSWER = 256 << 20
"""Bytes."""
MAX_HEAD = 64 << 10
_AT_ONCE = 1 << 20


class BadAnswer(Exception):
    """What came is not an answer of HTTP."""


def request(
    path: str,
    method: str,
    target: str,
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
    timeout: float | None = None,
) -> tuple[int, bytes]:
    """Send one request to the socket ``path``; returns status and body.

    ``timeout``: seconds that each step may take. Raises OSError (ConnectionResetError where the answer is not
    whole), BadAnswer.
    """
    lines = [f"{method} {target} HTTP/1.0", *(f"{name}: {value}" for name, value in (headers or {}).items())]
    if body is not None:
        lines.append(f"Content-Length: {len(body)}")
    head = ("\r\n".join(lines) + "\r\n\r\n").encode("ascii")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout)
        connection.connect(path)
        with contextlib.suppress(BrokenPipeError):  # refused before it was read: the answer says why
            connection.sendall(head + (body or b""))
        return _parsed(_received(connection), has_body=method != "HEAD")


def _received(connection: socket.socket) -> bytes:
    parts: list[bytes] = []
    left = MAX_ANSWER
    while part := connection.recv(_AT_ONCE):
        parts.append(part)
        left -= len(part)
        if left < 0:
            raise BadAnswer(f"the answer has more than {MAX_ANSWER} bytes")
    return b"".join(parts)


def _parsed(answer: bytes, *, has_body: bool) -> tuple[int, bytes]:
    end = answer.find(b"\r\n\r\n", 0, MAX_HEAD)
    if not answer or (end < 0 and len(answer) < MAX_HEAD):
        raise ConnectionResetError("the connection ended before the answer did")
    first, *lines = answer[: max(end, 0)].split(b"\r\n")
    version, _, rest = first.partition(b" ")
    status = rest[:3]
    if not (version.startswith(b"HTTP/1.") and status.isdigit() and len(status) == 3):
        raise BadAnswer("the answer is not HTTP")
    body = answer[end + 4 :]
    for line in lines:
        name, _, value = line.partition(b":")
        if has_body and name.strip().lower() == b"content-length" and value.strip() != b"%d" % len(body):
            raise ConnectionResetError("the connection ended before the answer did")
    return int(status), body
