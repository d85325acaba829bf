"""uvicorn's protocol as we want it: it knows who is at the other end, and says what is wrong as we do."""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import cast

import h11
import msgspec
from uvicorn.protocols.http.h11_impl import H11Protocol

from glidefs.api.errors import MEDIA_TYPE, BadRequest, problem_of

_UCRED = struct.Struct("3i")
"""pid, uid, gid: struct ucred of unix(7)."""


class PeerProtocol(H11Protocol):
    """A connection. On a Unix socket ``client`` is the user and the process at the other end."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client connected."""
        super().connection_made(transport)
        connection = cast("socket.socket", transport.get_extra_info("socket"))
        if connection is not None and connection.family == socket.AF_UNIX:
            data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
            pid, uid, _ = _UCRED.unpack(data)
            self.client = (f"uid {uid} pid {pid}", 0)

    def send_400_response(self, msg: str) -> None:
        """What came is not HTTP: said as any other problem, with nothing of the request in it."""
        body = msgspec.json.encode(problem_of(BadRequest("the request is not valid HTTP"), "/"))
        headers = [
            (b"content-type", MEDIA_TYPE.encode()),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        for event in (
            h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
