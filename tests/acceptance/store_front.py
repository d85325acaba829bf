"""A daemon's way to an S3 server: an HTTP forwarder that keeps a journal of the requests, answers 503 when
told to, and holds a chosen request back, before the server sees it or before its answer is delivered.
"""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, NamedTuple
from urllib.parse import unquote, urlsplit

PATIENCE = 120.0
"""Seconds after which a held request goes on by itself, so that a failed test ends."""
HOP = frozenset({"connection", "transfer-encoding", "expect", "keep-alive"})

Where = Literal["before", "after"]


class Request(NamedTuple):
    """One that arrived; ``began`` is of the monotonic clock, ``key`` with bucket and root."""

    front: str
    method: str
    key: str
    began: float
    if_match: str
    if_none_match: bool

    @property
    def puts_root(self) -> bool:
        """Whether it is a PUT of a volume's root."""
        return self.method == "PUT" and self.key.endswith("/manifest")

    @property
    def puts_pack(self) -> bool:
        """Whether it is a PUT of a pack."""
        return self.method == "PUT" and "/packs/" in self.key


class Exchange(NamedTuple):
    """A request and what the server said to it. ``body`` is a root that was put."""

    request: Request
    status: int
    ended: float
    etag: str
    body: bytes

    @property
    def done(self) -> bool:
        """Whether the server did it."""
        return 200 <= self.status < 300


class Journal:
    """What went through some fronts, in the order of the answers."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._exchanges: list[Exchange] = []
        self._begun: list[Request] = []

    def began(self, request: Request) -> None:
        """A request is about to be forwarded."""
        with self._lock:
            self._begun.append(request)

    def ended(self, exchange: Exchange) -> None:
        """The server has answered."""
        with self._lock:
            self._exchanges.append(exchange)

    def exchanges(self) -> list[Exchange]:
        """All answered ones."""
        with self._lock:
            return list(self._exchanges)

    def requests(self) -> list[Request]:
        """All that arrived and were not refused."""
        with self._lock:
            return list(self._begun)


class Hold:
    """What is held back: see :meth:`Front.hold`."""

    def __init__(self, when: Callable[[Request], bool], where: Where, every: bool) -> None:
        self.when = when
        self.where = where
        self.every = every
        self.caught = threading.Event()
        self._go = threading.Event()
        self.lose = False

    def wait(self) -> None:
        """On the forwarder's thread."""
        self.caught.set()
        self._go.wait(PATIENCE)

    def release(self, *, lose: bool = False) -> None:
        """Let it go on; ``lose``: its connection ends instead of an answer."""
        self.lose = lose
        self._go.set()


class Front:
    """Forwards to ``endpoint``; ``name`` is in the journal.

    ``refuse`` is the error code that every request is answered with, as a 503, while it is set;
    ``refused`` counts those.
    """

    def __init__(self, endpoint: str, name: str = "", journal: Journal | None = None) -> None:
        parts = urlsplit(endpoint)
        self.target = (parts.hostname or "127.0.0.1", parts.port or 80)
        self.name = name
        self.journal = journal
        self.refuse = ""
        self.refused = 0
        self._lock = threading.Lock()
        self._hold: Hold | None = None
        front = self

        class Handler(_Handler):
            """Its connections."""

            owner = front

        self._server = _Server(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True).start()

    def close(self) -> None:
        """Accept no more."""
        self._server.shutdown()
        self._server.server_close()

    def hold(self, when: Callable[[Request], bool], where: Where = "before", *, every: bool = False) -> Hold:
        """Hold back the next request for which ``when`` is true, or ``every`` one until :meth:`drop_hold`."""
        hold = Hold(when, where, every)
        with self._lock:
            self._hold = hold
        return hold

    def drop_hold(self) -> None:
        """Hold nothing any more, and let go what is held."""
        with self._lock:
            hold, self._hold = self._hold, None
        if hold is not None:
            hold.release()

    def take_hold(self, request: Request) -> Hold | None:
        """The hold that this request falls into."""
        with self._lock:
            hold = self._hold
            if hold is None or not hold.when(request):
                return None
            if not hold.every:
                self._hold = None
            return hold

    def count_refused(self) -> None:
        """One was answered 503."""
        with self._lock:
            self.refused += 1


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A peer that went away is not news."""


class _Handler(BaseHTTPRequestHandler):
    owner: Front
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self._far = http.client.HTTPConnection(*self.owner.target, timeout=PATIENCE)

    def finish(self) -> None:
        self._far.close()
        super().finish()

    def log_message(self, format: str, *args: Any) -> None:
        """The journal is the log."""

    def handle_expect_100(self) -> bool:
        if self.owner.refuse:
            self._refuse()
            self.close_connection = True  # the body may come or not
            return False
        return super().handle_expect_100()

    def _refuse(self) -> None:
        self.owner.count_refused()
        code = self.owner.refuse or "ServiceUnavailable"
        body = f"<Error><Code>{code}</Code><Message>later</Message></Error>".encode()
        self.send_response(503)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _relay(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.owner.refuse:
            self._refuse()
            return
        request = Request(
            self.owner.name,
            self.command,
            unquote(urlsplit(self.path).path),
            time.monotonic(),
            self.headers.get("If-Match", ""),
            "If-None-Match" in self.headers,
        )
        if self.owner.journal is not None:
            self.owner.journal.began(request)
        hold = self.owner.take_hold(request)
        if hold is not None and hold.where == "before":
            hold.wait()
        answer, data = self._ask(body)
        if self.owner.journal is not None:
            kept = body if request.puts_root else b""
            etag = answer.getheader("ETag", "")
            self.owner.journal.ended(Exchange(request, answer.status, time.monotonic(), etag, kept))
        if hold is not None and hold.where == "after":
            hold.wait()
        if hold is not None and hold.lose:
            self.close_connection = True
            return
        self._deliver(answer, data)

    def _ask(self, body: bytes) -> tuple[http.client.HTTPResponse, bytes]:
        far = self._far
        far.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in HOP:
                far.putheader(name, value)
        far.endheaders(body or None)
        answer = far.getresponse()
        return answer, answer.read()

    def _deliver(self, answer: http.client.HTTPResponse, data: bytes) -> None:
        self.send_response_only(answer.status, answer.reason)
        for name, value in answer.getheaders():
            if name.lower() not in HOP and (name.lower() != "content-length" or self.command == "HEAD"):
                self.send_header(name, value)
        if self.command != "HEAD" and answer.status not in (204, 304):
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _relay
