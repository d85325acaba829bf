"""S3 and what speaks like it.

boto3 is the client for everything but the hot path, and the source of credentials and signatures. Its
own retries are off: :mod:`glidefs.store.resilient` retries, because only it knows which failures of
a conditional put are ambiguous.

Ranged reads are the hot path. Their URL is presigned once per key and kept until shortly before it
expires (a presigned URL does not cover the Range header, so one serves every range of a pack), and
:class:`glidefs.store.range_http.RangeClient` fetches it without signing. Behind an HTTP proxy, and
on a redirect, they go through boto3.
"""

from __future__ import annotations

import contextlib
import ssl
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import IO, TYPE_CHECKING, Any, TypeVar, cast
from urllib.parse import urlsplit

import boto3
import msgspec
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    MetadataRetrievalError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
    ProfileNotFound,
)
from botocore.httpsession import get_cert_path
from botocore.utils import get_environ_proxies

from glidefs.errors import (
    AccessDenied,
    ConfigError,
    CorruptObject,
    NotFound,
    PreconditionFailed,
    StoreError,
    StoreUnavailable,
    StoreUnsupported,
)
from glidefs.store.base import (
    LIST_PAGE,
    Body,
    Buffer,
    Keys,
    ListPage,
    Object,
    ObjectInfo,
    ObjectStore,
    check_condition,
    check_key,
    check_list_prefix,
    check_range,
)
from glidefs.store.range_http import HttpError, RangeClient, Response
from glidefs.store.s3_body import BodyReader
from glidefs.store.s3_errors import classify, code_in

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

T = TypeVar("T")

_URL_LIFETIME = 3600
_URL_REFRESH = 0.75
_URL_CACHE = 4096


class S3Options(msgspec.Struct, frozen=True):
    """How to reach the provider. Timeouts in seconds, per connect and per read."""

    endpoint_url: str | None = None
    region: str | None = None
    path_style: bool | None = None
    connections: int = 64
    connect_timeout: float = 3.0
    read_timeout: float = 10.0


def _make_client(options: S3Options) -> S3Client:
    path_style = options.path_style if options.path_style is not None else bool(options.endpoint_url)
    settings: dict[str, Any] = {
        "signature_version": "s3v4",
        "s3": {"addressing_style": "path" if path_style else "virtual"},
        "retries": {"total_max_attempts": 1, "mode": "standard"},
        "connect_timeout": options.connect_timeout,
        "read_timeout": options.read_timeout,
        "max_pool_connections": options.connections,
        "tcp_keepalive": True,
        # The signature covers the body's SHA-256 already, and other providers choke on the
        # trailing checksums that newer botocore adds on its own.
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
    }
    try:
        config = Config(**settings)
    except TypeError:  # botocore before 1.36 has neither option, nor the behaviour
        del settings["request_checksum_calculation"], settings["response_checksum_validation"]
        config = Config(**settings)
    try:
        session = boto3.session.Session()
        # Without any region botocore signs for none; us-east-1 is what others take as the default.
        region = options.region or session.region_name or "us-east-1"
        return session.client("s3", endpoint_url=options.endpoint_url, region_name=region, config=config)
    except (BotoCoreError, ValueError) as error:
        raise ConfigError(f"S3 client: {error}") from error


class S3Store(ObjectStore):
    """Objects below ``root`` in ``bucket``."""

    def __init__(self, bucket: str, root: str = "", options: S3Options | None = None) -> None:
        self._options = options or S3Options()
        self._bucket = bucket
        self._root = f"{root.strip('/')}/" if root.strip("/") else ""
        self.url = f"s3://{bucket}/{self._root}".rstrip("/")
        self._client = _make_client(self._options)
        self._seen_working = False
        # Guards the two maps below; never held during a request.
        self._lock = threading.Lock()
        self._urls: OrderedDict[str, tuple[float, str]] = OrderedDict()
        self._range_clients: dict[tuple[str, str], RangeClient | None] = {}

    # -- boto3 ---------------------------------------------------------------------------------

    def _full(self, key: str, op: str) -> str:
        return self._root + check_key(key, op)

    def _call(self, op: str, key: str, request: Callable[[], T]) -> T:
        """Run one boto3 request and turn its failure into one of our errors."""
        try:
            result = request()
        except ClientError as error:
            raise self._client_error(error, key, op) from error
        except (NoCredentialsError, PartialCredentialsError, ProfileNotFound) as error:
            why = f"no usable S3 credentials ({error}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            raise AccessDenied(why, key=key, op=op) from error
        except (CredentialRetrievalError, MetadataRetrievalError) as error:
            raise StoreUnavailable(f"credentials cannot be fetched now: {error}", key=key, op=op) from error
        except ParamValidationError as error:
            raise StoreError(f"refused by the client: {error}", key=key, op=op) from error
        except (BotoCoreError, OSError) as error:
            # What is left of botocore's errors are connections, timeouts and broken bodies.
            raise StoreUnavailable(f"no answer: {error}", key=key, op=op) from error
        self._seen_working = True
        return result

    def _client_error(self, error: ClientError, key: str, op: str) -> StoreError:
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        code = str(error.response.get("Error", {}).get("Code", ""))
        return self._classify(status, "" if code.isdigit() else code, key, op)

    def _classify(self, status: int, code: str, key: str, op: str) -> StoreError:
        error = classify(status, code, key=key, op=op, bucket=self._bucket, seen_working=self._seen_working)
        if isinstance(error, NotFound | PreconditionFailed):
            self._seen_working = True
        return error

    def get(self, key: str) -> Object:
        full = self._full(key, "get")

        def request() -> Object:
            answer = self._client.get_object(Bucket=self._bucket, Key=full)
            with contextlib.closing(answer["Body"]) as body:
                return Object(body.read(), answer["ETag"])

        return self._call("get", key, request)

    def head(self, key: str) -> ObjectInfo:
        full = self._full(key, "head")
        answer = self._call("head", key, lambda: self._client.head_object(Bucket=self._bucket, Key=full))
        return ObjectInfo(key, answer["ContentLength"], answer["ETag"], answer["LastModified"].timestamp())

    def put(self, key: str, data: Body, *, if_match: str | None = None, if_none_match: bool = False) -> str:
        check_condition(key, if_match, if_none_match)
        arguments: dict[str, Any] = {"Bucket": self._bucket, "Key": self._full(key, "put")}
        if if_match is not None:
            arguments["IfMatch"] = if_match
        if if_none_match:
            arguments["IfNoneMatch"] = "*"
        body = BodyReader(data)

        def request() -> str:
            answer = self._client.put_object(Body=cast(IO[bytes], body), ContentLength=len(body), **arguments)
            return answer["ETag"]

        try:
            return self._call("put", key, request)
        except NotFound as error:
            # S3 answers 404 where If-Match names a key that is gone: to the caller that is the same.
            raise PreconditionFailed(key=key, op="put") from error

    def delete(self, key: str) -> None:
        full = self._full(key, "delete")
        with contextlib.suppress(NotFound):
            self._call("delete", key, lambda: self._client.delete_object(Bucket=self._bucket, Key=full))
        with self._lock:
            self._urls.pop(key, None)

    def list_page(self, prefix: str, token: str = "") -> ListPage:
        check_list_prefix(prefix)
        arguments: dict[str, Any] = {"ContinuationToken": token} if token else {}
        page = self._call(
            "list",
            prefix,
            lambda: self._client.list_objects_v2(
                Bucket=self._bucket, Prefix=self._root + prefix, MaxKeys=LIST_PAGE, **arguments
            ),
        )
        infos = tuple(
            ObjectInfo(
                item["Key"][len(self._root) :], item["Size"], item["ETag"], item["LastModified"].timestamp()
            )
            for item in page.get("Contents", [])
            # A "directory" that some consoles create is not an object of ours.
            if not item["Key"].endswith("/")
        )
        return ListPage(infos, page["NextContinuationToken"] if page.get("IsTruncated") else "")

    def list_dirs(self, prefix: str) -> Keys:
        check_list_prefix(prefix, "list_dirs")
        arguments: dict[str, Any] = {
            "Bucket": self._bucket,
            "Prefix": self._root + prefix,
            "Delimiter": "/",
        }
        found: Keys = []
        while True:
            page = self._call("list_dirs", prefix, lambda: self._client.list_objects_v2(**arguments))
            found += [item["Prefix"][len(self._root) :] for item in page.get("CommonPrefixes", [])]
            if not page.get("IsTruncated"):
                return sorted(found)
            arguments["ContinuationToken"] = page["NextContinuationToken"]

    def close(self) -> None:
        with self._lock:
            clients = [client for client in self._range_clients.values() if client]
            self._range_clients.clear()
            self._urls.clear()
        for client in clients:
            client.close()
        self._client.close()

    # -- ranges --------------------------------------------------------------------------------

    def get_range(self, key: str, offset: int, length: int, into: memoryview | None = None) -> Buffer:
        check_range(key, offset, length)
        answer = self._fetch(key, f"{offset}-{offset + length - 1}", length, "get_range", into)
        if answer.status == 416:
            total = _total(answer)
            raise CorruptObject(key, max(total, 0), f"the object ends before byte {offset + length}")
        body = self._checked(answer, key, "get_range")
        if len(body) == length and answer.complete:
            return body
        total = _total(answer)
        if 0 <= total < offset + length:
            raise CorruptObject(key, total, f"the object ends before byte {offset + length}")
        raise StoreUnavailable(f"{len(body)} of {length} bytes came", key=key, op="get_range")

    def get_suffix(self, key: str, length: int) -> tuple[bytes, int]:
        check_range(key, 0, length)
        answer = self._fetch(key, f"-{length}", length, "get_suffix")
        if answer.status == 416:
            return b"", 0
        total = _total(answer)
        body = bytes(answer.body)
        if answer.status == 200 and answer.complete and len(body) <= length:
            # Some providers answer a suffix that is the whole object without "partial".
            self._seen_working = True
            return body, len(body)
        body = bytes(self._checked(answer, key, "get_suffix"))
        if total < 0:
            raise StoreUnsupported("a range answer without Content-Range", key=key, op="get_suffix")
        if len(body) != min(length, total) or not answer.complete:
            raise StoreUnavailable(f"{len(body)} of {length} bytes came", key=key, op="get_suffix")
        return body, total

    def _checked(self, answer: Response, key: str, op: str) -> Buffer:
        """The body of a 206, or the error that another status means."""
        if answer.status == 206:
            self._seen_working = True
            return answer.body
        if answer.status == 200:
            raise StoreUnsupported("the provider ignores Range", key=key, op=op)
        raise self._classify(answer.status, code_in(bytes(answer.body)), key, op)

    def _fetch(
        self, key: str, byte_range: str, limit: int, op: str, into: memoryview | None = None
    ) -> Response:
        full = self._full(key, op)
        url = self._url(key, full, op)
        parts = urlsplit(url)
        client = self._range_client(parts.scheme, parts.netloc)
        if client is None:
            return self._fetch_slowly(key, full, byte_range, op)
        target = f"{parts.path}?{parts.query}"
        try:
            answer = client.get(target, byte_range, limit, into)
        except (HttpError, OSError) as error:
            client.drop_idle()
            raise StoreUnavailable(f"no answer: {error or type(error).__name__}", key=key, op=op) from error
        if answer.status in (401, 403):
            # The URL's credentials may have ended before the URL: have it made anew, next time too.
            with self._lock:
                self._urls.pop(key, None)
            return self._fetch_slowly(key, full, byte_range, op)
        if 300 <= answer.status < 400:
            return self._fetch_slowly(key, full, byte_range, op)
        return answer

    def _fetch_slowly(self, key: str, full: str, byte_range: str, op: str) -> Response:
        """The same through boto3, which knows proxies, redirects and fresh credentials."""

        def request() -> Response:
            try:
                answer = self._client.get_object(Bucket=self._bucket, Key=full, Range=f"bytes={byte_range}")
            except ClientError as error:
                if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") == 416:
                    return Response(416, {}, b"", True)
                raise
            with contextlib.closing(answer["Body"]) as body:
                data = body.read()
            status = answer["ResponseMetadata"]["HTTPStatusCode"]
            return Response(status, {b"content-range": answer.get("ContentRange", "").encode()}, data, True)

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
                self._urls.popitem(last=False)
        return url

    def _presign(self, full: str, key: str, op: str) -> str:
        seen = self._seen_working
        url = self._call(
            op,
            key,
            lambda: self._client.generate_presigned_url(
                "get_object", Params={"Bucket": self._bucket, "Key": full}, ExpiresIn=_URL_LIFETIME
            ),
        )
        self._seen_working = seen  # nothing was asked of the store
        return url

    def _range_client(self, scheme: str, netloc: str) -> RangeClient | None:
        """The client for a host, or None where a proxy stands before it."""
        place = (scheme, netloc)
        with self._lock:
            if place in self._range_clients:
                return self._range_clients[place]
        client = None
        if not get_environ_proxies(f"{scheme}://{netloc}"):
            parts = urlsplit(f"{scheme}://{netloc}")
            client = RangeClient(
                parts.hostname or "",
                parts.port or (443 if scheme == "https" else 80),
                tls=_tls_context(self._client) if scheme == "https" else None,
                pool_size=self._options.connections,
                connect_timeout=self._options.connect_timeout,
                read_timeout=self._options.read_timeout,
            )
        with self._lock:
            return self._range_clients.setdefault(place, client)


def _tls_context(client: S3Client) -> ssl.SSLContext:
    """Certificates as botocore would verify them."""
    verify = getattr(getattr(client, "_endpoint", None), "http_session", None)
    verify = getattr(verify, "_verify", True)
    path = get_cert_path(verify) if verify else None
    context = ssl.create_default_context(cafile=path)
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _total(answer: Response) -> int:
    """The object's size in ``Content-Range: bytes 0-9/100``, or -1."""
    total = answer.headers.get(b"content-range", b"").rpartition(b"/")[2]
    return int(total) if total.isdigit() else -1
