"""An S3 server that is far away: every request takes 100 ms longer."""

from __future__ import annotations

import re
import socket
import threading
import time

from node import servers

LATENCY = 0.1
REQUEST_LINE = re.compile(rb"(GET|PUT|HEAD|POST|DELETE) \S+ HTTP/1\.1\r\n")


class SlowForwarder(servers.Forwarder):
    """A relay that counts HTTP requests and holds each back for ``LATENCY`` seconds."""

    def __init__(self, endpoint: str) -> None:
        self.requests: list[bytes] = []
        self._own = threading.Lock()
        super().__init__(endpoint)

    def _copy(self, source: socket.socket, sink: socket.socket) -> None:
        relay = super()._copy
        if source.getsockname()[1] == self._port:
            source = _Delayed(source, self)  # type: ignore[assignment]
        relay(source, sink)

    def seen(self, data: bytes) -> None:
        found = REQUEST_LINE.match(data)
        if found:
            with self._own:
                self.requests.append(found[0].strip())
            time.sleep(LATENCY)


class _Delayed:
    """The near socket, whose requests are counted as they are read."""

    def __init__(self, inner: socket.socket, owner: SlowForwarder) -> None:
        self._inner = inner
        self._owner = owner

    def recv(self, length: int) -> bytes:
        data = self._inner.recv(length)
        self._owner.seen(data)
        return data

    def shutdown(self, how: int) -> None:
        self._inner.shutdown(how)
