"""Ranged GETs of S3: the hot path.

The URL is presigned once per key and kept until shortly before it expires (a presigned URL does not cover the
Range header, so one serves every range of a pack), and :class:`glidefs.store.s3.range_http.RangeClient`
fetches it without signing. Behind an HTTP proxy, on a redirect, and where the signature is refused,
they go through boto3.
"""

from __future__ import annotations

import contextlib
import logging
import os
import ssl
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, TypeVar
from urllib.parse import urlsplit

from botocore.exceptions import ClientError
from botocore.httpsession import get_cert_path
from botocore.utils import get_environ_proxies

from glidefs.errors import StoreUnavailable
from glidefs.store.base import Source
from glidefs.store.s3.client import Clients, S3Options
from glidefs.store.s3.errors import code_in
from glidefs.store.s3.range_http import ADDRESS_LIFETIME, HttpError, RangeClient, Response

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

log = logging.getLogger(__name__)

T = TypeVar("T")

_URL_LIFETIME = 3600
_URL_REFRESH = 0.75
_URL_CACHE = 4096
_REFUSED = (400, 401, 403)


class Caller(Protocol):
    """Runs a request of boto3 with the client in use, and turns its failure into one of our errors."""

    def __call__(self, op: str, key: str, request: Callable[[S3Client], T]) -> T:
        """``op`` and ``key`` name it in errors."""
        ...


class Ranges:
    """Answers to ranged GETs of ``bucket``, as they come: the caller judges them."""

    def __init__(self, bucket: str, options: S3Options, clients: Clients, call: Caller) -> None:
        self._bucket = bucket
        self._options = options
        self._boto = clients
        self._call = call
        # Guards the two maps below; never held during a request.
        self._lock = threading.Lock()
        self._urls: OrderedDict[str, tuple[float, str]] = OrderedDict()
        self._sources: dict[str, tuple[float, Source]] = {}  # of keys that have a URL
        self._clients: dict[tuple[str, str], RangeClient | None] = {}

    def fetch(
        self, key: str, full: str, byte_range: str, limit: int, op: str, into: memoryview | None = None
    ) -> Response:
        """GET ``byte_range`` of the object whose whole key is ``full``. StoreUnavailable: no answer."""
        parts = urlsplit(self._url(key, full, op))
        client = self._client(parts.scheme, parts.netloc)
        if client is None:
            return self._fetch_slowly(key, full, byte_range, op)
        target = f"{parts.path}?{parts.query}"
        try:
            answer = client.get(target, byte_range, limit, into)
        except (HttpError, OSError) as error:
            client.drop_idle()
            raise StoreUnavailable(f"no answer: {error or type(error).__name__}", key=key, op=op) from error
        if answer.status in _REFUSED:
            # The credentials may have ended before the URLs that they signed: all of them are made anew.
            if self.forget_all():
                why = code_in(bytes(answer.body)) or "no error document"
                log.warning("signed URLs were refused (HTTP %d, %s): all are signed anew", answer.status, why)
            return self._fetch_slowly(key, full, byte_range, op)
        if 300 <= answer.status < 400:
            return self._fetch_slowly(key, full, byte_range, op)
        return answer

    def source(self, key: str) -> Source | None:
        """Where a key can be read, if its URL is signed and the address known."""
        found = self._sources.get(key)
        if found is None or time.monotonic() >= found[0]:
            return None
        return found[1]

    def prepare(self, key: str, full: str) -> None:
        """Sign the URL of a key, and look up the address of its host. Raises StoreError."""
        if self.source(key) is not None:
            return
        parts = urlsplit(self._url(key, full, "get_range"))
        client = self._client(parts.scheme, parts.netloc)
        if client is None:
            return  # a proxy
        address = client.address()
        if not address:
            return
        secure = parts.scheme == "https"
        source = Source(
            f"{parts.path}?{parts.query}".encode("latin-1"),
            client.host_header.encode("latin-1"),
            address,
            self._options.read_timeout,
            self._options.connect_timeout,
            _ascii_name(client.host) if secure else b"",
            os.fsencode(_certificates(self._boto.current)) if secure else b"",
        )
        with self._lock:
            signed = self._urls.get(key)
            if signed is not None:
                self._sources[key] = min(signed[0], time.monotonic() + ADDRESS_LIFETIME), source

    def forget(self, key: str) -> None:
        """Sign the URL of a key anew, next time."""
        with self._lock:
            self._urls.pop(key, None)
            self._sources.pop(key, None)

    def forget_all(self) -> bool:
        """Sign all URLs anew. False if there was none."""
        with self._lock:
            had = bool(self._urls)
            self._urls.clear()
            self._sources.clear()
        return had

    def close(self) -> None:
        """Give connections back."""
        with self._lock:
            clients = [client for client in self._clients.values() if client]
            self._clients.clear()
            self._urls.clear()
            self._sources.clear()
        for client in clients:
            client.close()

    def _fetch_slowly(self, key: str, full: str, byte_range: str, op: str) -> Response:
        """The same through boto3, which knows proxies, redirects and fresh credentials."""

        def request(client: S3Client) -> Response:
            try:
                answer = client.get_object(Bucket=self._bucket, Key=full, Range=f"bytes={byte_range}")
            except ClientError as error:
                if error.response.get("Error", {}).get("Code") == "InvalidRange":
                    return Response(416, {}, _INVALID_RANGE, True)
                raise
            with contextlib.closing(answer["Body"]) as body:
                data = body.read()
            status = answer["ResponseMetadata"]["HTTPStatusCode"]
            headers = {b"content-range": answer.get("ContentRange", "").encode()}
            if "ETag" in answer:
                headers[b"etag"] = answer["ETag"].encode()
            return Response(status, headers, data, True)

        return self._call(op, key, request)

    def _url(self, key: str, full: str, op: str) -> str:
        now = time.monotonic()
        with self._lock:
            cached = self._urls.get(key)
            if cached is not None and now < cached[0]:
                self._urls.move_to_end(key)
                return cached[1]
        url = self._presign(full, key, op)
        with self._lock:
            self._urls[key] = (now + _URL_LIFETIME * _URL_REFRESH, url)
            self._urls.move_to_end(key)
            while len(self._urls) > _URL_CACHE:
                gone, _ = self._urls.popitem(last=False)
                self._sources.pop(gone, None)
        return url

    def _presign(self, full: str, key: str, op: str) -> str:
        parameters = {"Bucket": self._bucket, "Key": full}
        return self._call(
            op,
            key,
            lambda client: client.generate_presigned_url(
                "get_object", Params=parameters, ExpiresIn=_URL_LIFETIME
            ),
        )

    def _client(self, scheme: str, netloc: str) -> RangeClient | None:
        """The client for a host, or None where a proxy stands before it."""
        place = (scheme, netloc)
        with self._lock:
            if place in self._clients:
                return self._clients[place]
        client = None
        if not get_environ_proxies(f"{scheme}://{netloc}"):
            parts = urlsplit(f"{scheme}://{netloc}")
            client = RangeClient(
                parts.hostname or "",
                parts.port or (443 if scheme == "https" else 80),
                tls=_tls_context(self._boto.current) if scheme == "https" else None,
                pool_size=self._options.connections,
                connect_timeout=self._options.connect_timeout,
                read_timeout=self._options.read_timeout,
            )
        with self._lock:
            return self._clients.setdefault(place, client)


_INVALID_RANGE = b"<Error><Code>InvalidRange</Code></Error>"


def _ascii_name(host: str) -> bytes:
    return host.encode() if host.isascii() else host.encode("idna")


def _certificates(client: S3Client) -> str:
    """The file of CAs by which botocore verifies certificates; empty if it does not."""
    verify = getattr(getattr(client, "_endpoint", None), "http_session", None)
    verify = getattr(verify, "_verify", True)
    return str(get_cert_path(verify)) if verify else ""


def _tls_context(client: S3Client) -> ssl.SSLContext:
    """Certificates as botocore would verify them."""
    path = _certificates(client)
    context = ssl.create_default_context(cafile=path or None)
    if not path:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context
