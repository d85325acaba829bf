"""A misbehaving S3: objects in memory, behind something that answers for it now and then.

    with BadS3() as s3:
        s3.fault = Fault(status=404, body="html", methods={"GET", "HEAD"}, share=0.5)

Without a fault it does what GlideFS asks of a store. A fault hits a share of the requests of some methods
before they are looked at (so nothing of them is done), with a status and one of three bodies: `bare` text
as load balancers send, an `html` page, or an `xml` error document of a code that says nothing of the object.
``token`` is the session token that requests must be signed with; ``refuse`` what others are answered. A GET
is answered ``delay`` seconds late.
"""

from __future__ import annotations

import hashlib
import random
import re
import ssl
import threading
import time
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

from servers import Serving

Shape = Literal["bare", "html", "xml"]
SHAPES: tuple[Shape, ...] = ("bare", "html", "xml")
METHODS = ("GET", "HEAD", "PUT", "LIST", "DELETE")
CODES = (
    "InternalError",
    "AccessDenied",
    "SlowDown",
    "ServiceUnavailable",
    "ExpiredToken",
    "MethodNotAllowed",
)
"""Of error documents that say nothing about an object."""
BUCKET = "bucket"


class Fault(NamedTuple):
    """What a share of the requests of some methods is answered.

    ``code`` is that of an xml body; ``raw`` is a body of one's own.
    """

    status: int
    body: Shape = "bare"
    methods: frozenset[str] = frozenset(METHODS)
    share: float = 1.0
    code: str = "InternalError"
    raw: bytes = b""

    def content(self) -> tuple[bytes, str]:
        """The body and its type."""
        if self.raw:
            return self.raw, "application/xml"
        if self.body == "xml":
            return error_document(self.code), "application/xml"
        if self.body == "html":
            page = (
                f"<html><head><title>{self.status}</title></head><body><h1>{self.status}</h1></body></html>"
            )
            return page.encode(), "text/html"
        return b"default backend - %d" % self.status, "text/plain"


class Storm(NamedTuple):
    """Faults drawn anew for each request that is hit: a status of ``statuses`` with any body.

    A share ``done`` of the PUTs and DELETEs that are hit is done all the same: only its answer is lost.
    """

    statuses: Sequence[int]
    methods: frozenset[str] = frozenset(METHODS)
    share: float = 1.0
    done: float = 0.3


class Stored(NamedTuple):
    """An object."""

    data: bytes
    etag: str
    when: float


def error_document(code: str) -> bytes:
    """As a provider writes it."""
    return f"<?xml version='1.0'?>\n<Error><Code>{code}</Code><Message>why</Message></Error>".encode()


class BadS3(Serving):
    """Serves on a free port, over TLS with a ``context``.

    ``requests`` counts by method, ``faults`` those that were hit.
    """

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        self.objects: dict[str, Stored] = {}
        self.fault: Fault | Storm | None = None
        self.token = ""
        self.refuse: tuple[int, str] = (400, "ExpiredToken")
        self.delay = 0.0
        self.requests: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.lock = threading.Lock()
        """Guards all of the above."""
        self._random = random.Random(7)
        owner = self

        class Handler(_Handler):
            """Its connections."""

            s3 = owner

        server = _Server(("127.0.0.1", 0), Handler)
        if context is not None:
            server.socket = context.wrap_socket(
                server.socket, server_side=True, do_handshake_on_connect=False
            )
        scheme = "http" if context is None else "https"
        self.endpoint = f"{scheme}://127.0.0.1:{server.server_address[1]}"
        super().__init__(server)

    def hit(self, method: str) -> Fault | None:
        """Count a request; the fault that it meets, if so."""
        with self.lock:
            self.requests[method] += 1
            fault = self.fault
            if fault is None or method not in fault.methods or self._random.random() >= fault.share:
                return None
            self.faults[method] += 1
            if isinstance(fault, Fault):
                return fault
            shape = self._random.choice(SHAPES)
            return Fault(self._random.choice(fault.statuses), shape, code=self._random.choice(CODES))

    def does(self) -> bool:
        """Whether a request that was hit is done all the same."""
        with self.lock:
            return isinstance(self.fault, Storm) and self._random.random() < self.fault.done


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is not news."""


class _Handler(BaseHTTPRequestHandler):
    s3: BadS3
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        """Counted instead."""

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response_only(status, "X")
        self.send_header("Date", formatdate(usegmt=True))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        has_body = status not in (204, 304)
        if has_body and "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if has_body and self.command != "HEAD":
            self.wfile.write(body)

    def _error(self, status: int, code: str) -> None:
        self._answer(status, error_document(code), Content_Type="application/xml")

    def _any(self) -> None:
        parts = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        bucket, _, key = unquote(parts.path).lstrip("/").partition("/")
        method = "LIST" if "list-type" in query else self.command
        if method == "GET" and self.s3.delay:
            time.sleep(self.s3.delay)
        fault = self.s3.hit(method)
        token = self.headers.get("X-Amz-Security-Token") or query.get("X-Amz-Security-Token", "")
        if fault is not None:
            if method in ("PUT", "DELETE") and self.s3.does():
                self._change(method, key, data)
            body, kind = fault.content()
            self._answer(fault.status, body, Content_Type=kind)
        elif self.s3.token and token != self.s3.token:
            status, code = self.s3.refuse
            if code:
                self._error(status, code)
            else:
                self._answer(status, b"no", Content_Type="text/plain")
        elif bucket != BUCKET:
            self._error(404, "NoSuchBucket")
        elif method == "LIST":
            self._list(query)
        elif method in ("PUT", "DELETE"):
            status, what = self._change(method, key, data)
            if status >= 400:
                self._error(status, what)
            elif status == 200:
                self._answer(200, ETag=what)
            else:
                self._answer(204)
        else:
            self._get(key)

    def _change(self, method: str, key: str, data: bytes) -> tuple[int, str]:
        """Do a PUT or DELETE: its status, and the ETag or the code of the error."""
        if method == "DELETE":
            with self.s3.lock:
                self.s3.objects.pop(key, None)
            return 204, ""
        match, none_match = self.headers.get("If-Match"), self.headers.get("If-None-Match")
        etag = f'"{hashlib.md5(data).hexdigest()}"'
        with self.s3.lock:
            found = self.s3.objects.get(key)
            if match and found is None:
                return 404, "NoSuchKey"
            if (match and found is not None and found.etag != match) or (none_match and found is not None):
                return 412, "PreconditionFailed"
            self.s3.objects[key] = Stored(data, etag, time.time())
        return 200, etag

    def _get(self, key: str) -> None:
        with self.s3.lock:
            found = self.s3.objects.get(key)
        if found is None:
            self._error(404, "NoSuchKey")
            return
        data, size = found.data, len(found.data)
        headers = {"ETag": found.etag, "Last_Modified": formatdate(found.when, usegmt=True)}
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        if self.command == "HEAD":
            self._answer(200, Content_Length=str(size), **headers)
        elif wanted is None:
            self._answer(200, data, **headers)
        else:
            first, last = wanted.groups()
            start = int(first) if first else max(0, size - int(last))
            stop = min(size, int(last) + 1) if first and last else size
            if start >= size:
                self._error(416, "InvalidRange")
                return
            headers["Content_Range"] = f"bytes {start}-{stop - 1}/{size}"
            self._answer(206, data[start:stop], **headers)

    def _list(self, query: dict[str, str]) -> None:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        after, most = query.get("continuation-token", ""), int(query.get("max-keys", "1000"))
        with self.s3.lock:
            found = sorted(item for item in self.s3.objects.items() if item[0].startswith(prefix))
        rows: dict[str, str] = {}
        for key, stored in found:
            end = key.find(delimiter, len(prefix)) if delimiter else -1
            if end >= 0:
                place = escape(key[: end + 1])
                rows[key[: end + 1]] = f"<CommonPrefixes><Prefix>{place}</Prefix></CommonPrefixes>"
            else:
                when = datetime.fromtimestamp(stored.when, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
                rows[key] = (
                    f"<Contents><Key>{escape(key)}</Key><Size>{len(stored.data)}</Size>"
                    f"<ETag>{escape(stored.etag)}</ETag><LastModified>{when}</LastModified></Contents>"
                )
        names = [name for name in rows if name > after]
        more = len(names) > most
        token = f"<NextContinuationToken>{escape(names[most - 1])}</NextContinuationToken>" if more else ""
        body = "".join(rows[name] for name in names[:most])
        self._answer(
            200,
            (
                f"<ListBucketResult><Name>{BUCKET}</Name><Prefix>{escape(prefix)}</Prefix>"
                f"<IsTruncated>{str(more).lower()}</IsTruncated>{token}{body}</ListBucketResult>"
            ).encode(),
            Content_Type="application/xml",
        )

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _any
