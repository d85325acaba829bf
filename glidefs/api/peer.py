"""Who is at the other end of a request: process and user on the Unix socket, the address on TCP."""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import cast

from fastapi import Request
from uvicorn.protocols.http.h11_impl import H11Protocol

_UCRED = struct.Struct("3i")
"""pid, uid, gid: struct ucred of unix(7)."""


class PeerProtocol(H11Protocol):
    """uvicorn's protocol, which knows who connected over a Unix socket."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client connected."""
        super().connection_made(transport)
        connection = cast("socket.socket", transport.get_extra_info("socket"))
        if connection is not None and connection.family == socket.AF_UNIX:
            data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
            pid, uid, _ = _UCRED.unpack(data)
            self.client = (f"uid {uid} pid {pid}", 0)


def asked_from(request: Request) -> str:
    """Who made a request, in words."""
    host, port = request.scope.get("client") or ("unknown", 0)
    return f"{host}:{port}" if port else str(host)
