"""S3 and compatible stores.

boto3 is the client for everything but the hot path, and the source of credentials and signatures. Its
own retries are off: :mod:`glidefs.store.resilient` retries, because only it knows which failures of
a conditional put are ambiguous. Ranged reads are the hot path: :mod:`glidefs.store.s3.ranges`.

A success is checked as a failure is: between here and the provider are load balancers and proxies,
which answer 200 with a page of their own, too. An object, a put and a head have an ETag; a listing says
that it is one, of what was asked for; a range is the one that was asked for; a delete is 204, or looked
after.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import IO, TYPE_CHECKING, Any, TypeVar, cast

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
from botocore.parsers import ResponseParserError

from glidefs.errors import (
    AccessDenied,
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
    Source,
    check_condition,
    check_key,
    check_list_prefix,
    check_range,
)
from glidefs.store.s3.body import BodyReader
from glidefs.store.s3.client import Clients, S3Options
from glidefs.store.s3.errors import classify, code_in, is_page, may_be_credentials
from glidefs.store.s3.range_http import Response
from glidefs.store.s3.ranges import Ranges

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

T = TypeVar("T")


class _Nonsense(Exception):
    """A success that cannot be one, and why."""


class S3Store(ObjectStore):
    """Objects below ``root`` in ``bucket``."""

    def __init__(self, bucket: str, root: str = "", options: S3Options | None = None) -> None:
        options = options or S3Options()
        self._bucket = bucket
        self._root = f"{root.strip('/')}/" if root.strip("/") else ""
        self.url = f"s3://{bucket}/{self._root}".rstrip("/")
        self._clients = Clients(options)
        self._seen_working = False
        self._ranges = Ranges(bucket, options, self._clients, self._run)

    # -- boto3 ---------------------------------------------------------------------------------

    def _full(self, key: str, op: str) -> str:
        return self._root + check_key(key, op)

    def _call(self, op: str, key: str, request: Callable[[S3Client], T]) -> T:
        """Run one boto3 request that the store answers, and turn its failure into one of our errors."""
        result = self._run(op, key, request)
        self._seen_working = True
        return result

    def _run(self, op: str, key: str, request: Callable[[S3Client], T]) -> T:
        client = self._clients.current
        try:
            return request(client)
        except ClientError as error:
            raise self._client_error(client, error, key, op) from error
        except (NoCredentialsError, PartialCredentialsError, ProfileNotFound) as error:
            why = f"no usable S3 credentials ({error}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            self._renew(client, str(error))
            raise AccessDenied(why, key=key, op=op) from error
        except (CredentialRetrievalError, MetadataRetrievalError) as error:
            self._renew(client, str(error))
            raise StoreUnavailable(f"credentials cannot be fetched now: {error}", key=key, op=op) from error
        except ParamValidationError as error:
            raise StoreError(f"refused by the client: {error}", key=key, op=op) from error
        except (_Nonsense, ResponseParserError) as error:
            what = str(error).split("\n", 1)[0]
            why = f"{what}; does a proxy or load balancer answer for the store?"
            raise StoreUnavailable(why, key=key, op=op) from error
        except (BotoCoreError, OSError) as error:
            # What is left of botocore's errors are connections, timeouts and broken bodies.
            raise StoreUnavailable(f"no answer: {error}", key=key, op=op) from error

    def _client_error(self, client: S3Client, error: ClientError, key: str, op: str) -> StoreError:
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        code = str(error.response.get("Error", {}).get("Code", ""))
        code = "" if code.isdigit() else code
        classified = self._classify(status, code, key, op)
        if may_be_credentials(status, code) and self._renew(client, classified.why) and self._seen_working:
            return StoreUnavailable(classified.why, key=key, op=op)
        return classified

    def _renew(self, client: S3Client, why: str) -> bool:
        """Other credentials, if those of ``client`` may have ended. True if there are some."""
        renewed = self._clients.renew(client, why, loud=self._seen_working)
        if renewed:
            self._ranges.forget_all()
        return renewed

    def _classify(self, status: int, code: str, key: str, op: str) -> StoreError:
        error = classify(status, code, key=key, op=op, bucket=self._bucket, seen_working=self._seen_working)
        if isinstance(error, NotFound | PreconditionFailed):
            self._seen_working = True
        return error

    def get(self, key: str) -> Object:
        full = self._full(key, "get")

        def request(client: S3Client) -> Object:
            answer = client.get_object(Bucket=self._bucket, Key=full)
            etag = _etag(answer)
            with contextlib.closing(answer["Body"]) as body:
                data = body.read()
            if _status(answer) != 200 or is_page(data):
                raise _Nonsense(f"HTTP {_status(answer)} with a page instead of the object")
            return Object(data, etag)

        return self._call("get", key, request)

    def head(self, key: str) -> ObjectInfo:
        full = self._full(key, "head")

        def request(client: S3Client) -> ObjectInfo:
            try:
                answer = client.head_object(Bucket=self._bucket, Key=full)
            except ClientError as error:
                if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") == 404:
                    raise self._gone(key, full) from error
                raise
            size, modified = answer.get("ContentLength"), answer.get("LastModified")
            if _status(answer) != 200 or size is None or modified is None:
                raise _Nonsense(f"HTTP {_status(answer)} without the headers of an object")
            return ObjectInfo(key, size, _etag(answer), modified.timestamp())

        return self._call("head", key, request)

    def _gone(self, key: str, full: str) -> StoreError:
        """What a 404 to a HEAD means, which has no document: that of a GET decides."""
        answer = self._ranges.fetch(key, full, "0-0", 1, "head")
        code = code_in(bytes(answer.body)) if answer.status >= 400 else ""
        if answer.status in (200, 206) or code == "InvalidRange":
            return StoreUnavailable("HTTP 404 to a HEAD of an object that is there", key=key, op="head")
        return self._classify(answer.status, code, key, "head")

    def put(self, key: str, data: Body, *, if_match: str | None = None, if_none_match: bool = False) -> str:
        check_condition(key, if_match, if_none_match)
        arguments: dict[str, Any] = {"Bucket": self._bucket, "Key": self._full(key, "put")}
        if if_match is not None:
            arguments["IfMatch"] = if_match
        if if_none_match:
            arguments["IfNoneMatch"] = "*"
        body = BodyReader(data)

        def request(client: S3Client) -> str:
            return _etag(client.put_object(Body=cast(IO[bytes], body), ContentLength=len(body), **arguments))

        try:
            return self._call("put", key, request)
        except NotFound as error:
            # S3 answers 404 where If-Match names a key that is gone: to the caller that is the same.
            raise PreconditionFailed(key=key, op="put") from error

    def delete(self, key: str) -> None:
        full = self._full(key, "delete")
        status = 204
        with contextlib.suppress(NotFound):
            status = self._call(
                "delete", key, lambda client: _status(client.delete_object(Bucket=self._bucket, Key=full))
            )
        self._ranges.forget(key)
        if status != 204:
            with contextlib.suppress(NotFound):
                self.head(key)
                raise StoreUnavailable(f"HTTP {status}, and the object is still there", key=key, op="delete")

    def list_page(self, prefix: str, token: str = "") -> ListPage:
        check_list_prefix(prefix)
        more: dict[str, Any] = {"ContinuationToken": token} if token else {}
        page = self._call(
            "list", prefix, lambda client: self._listing(client, prefix, MaxKeys=LIST_PAGE, **more)
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

    def _listing(self, client: S3Client, prefix: str, **arguments: Any) -> dict[str, Any]:
        """A page of a listing that is one. Any other XML would read as one without objects."""
        wanted = self._root + prefix
        page = cast(dict[str, Any], client.list_objects_v2(Bucket=self._bucket, Prefix=wanted, **arguments))
        keys = [item.get("Key", "") for item in page.get("Contents", [])]
        places = [item.get("Prefix", "") for item in page.get("CommonPrefixes", [])]
        truncated = page.get("IsTruncated")
        if truncated is None or (truncated and not page.get("NextContinuationToken")):
            raise _Nonsense("HTTP 200 with what is no listing, or not a whole one")
        if page.get("Prefix", wanted) != wanted or not all(key.startswith(wanted) for key in keys + places):
            raise _Nonsense("HTTP 200 with the listing of another place")
        if not all({"Size", "ETag", "LastModified"} <= item.keys() for item in page.get("Contents", [])):
            raise _Nonsense("HTTP 200 with objects that have no size, ETag or time")
        return page

    def list_dirs(self, prefix: str) -> Keys:
        check_list_prefix(prefix, "list_dirs")
        more: dict[str, Any] = {}
        found: Keys = []
        while True:
            page = self._call(
                "list_dirs", prefix, lambda client: self._listing(client, prefix, Delimiter="/", **more)
            )
            found += [item["Prefix"][len(self._root) :] for item in page.get("CommonPrefixes", [])]
            if not page.get("IsTruncated"):
                return sorted(found)
            more["ContinuationToken"] = page["NextContinuationToken"]

    def source(self, key: str) -> Source | None:
        return self._ranges.source(key)

    def prepare(self, key: str) -> None:
        self._ranges.prepare(key, self._full(key, "get_range"))

    def forget(self, key: str) -> None:
        self._ranges.forget(key)

    def close(self) -> None:
        self._ranges.close()
        self._clients.close()

    # -- ranges --------------------------------------------------------------------------------

    def get_range(self, key: str, offset: int, length: int, into: memoryview | None = None) -> Buffer:
        check_range(key, offset, length)
        wanted = f"{offset}-{offset + length - 1}"
        answer = self._ranges.fetch(key, self._full(key, "get_range"), wanted, length, "get_range", into)
        body = self._checked(answer, key, "get_range", offset + length)
        stated = answer.headers.get(b"content-range", b"")
        if len(body) == length and answer.complete and stated.startswith(b"bytes %b/" % wanted.encode()):
            self._seen_working = True
            return body
        total = _total(stated)
        if 0 <= total < offset + length:
            raise CorruptObject(key, total, f"the object ends before byte {offset + length}")
        why = f"{len(body)} of {length} bytes came, as range {stated.decode('latin-1')!r}"
        raise StoreUnavailable(why, key=key, op="get_range")

    def get_suffix(self, key: str, length: int) -> tuple[bytes, int]:
        check_range(key, 0, length)
        full = self._full(key, "get_suffix")
        answer = self._ranges.fetch(key, full, f"-{length}", length, "get_suffix")
        body = bytes(answer.body)
        if answer.status == 416 and code_in(body) == "InvalidRange":
            return b"", 0
        etag = b"etag" in answer.headers
        if answer.status == 200 and etag and answer.complete and len(body) <= length and not is_page(body):
            # Some providers answer a suffix that is the whole object without "partial".
            self._seen_working = True
            return body, len(body)
        body = bytes(self._checked(answer, key, "get_suffix", 0))
        stated = answer.headers.get(b"content-range", b"")
        total = _total(stated)
        got = min(length, total)
        if len(body) != got or not answer.complete or not stated.startswith(b"bytes %d-" % (total - got)):
            why = f"{len(body)} of {length} bytes came, as range {stated.decode('latin-1')!r}"
            raise StoreUnavailable(why, key=key, op="get_suffix")
        self._seen_working = True
        return body, total

    def _checked(self, answer: Response, key: str, op: str, end: int) -> Buffer:
        """The body of a 206, or the error that another status means. ``end`` of the range in the object."""
        if answer.status == 206:
            return answer.body
        body = bytes(answer.body)
        if answer.status == 200 and b"etag" in answer.headers and not is_page(body):
            why = "the provider ignores Range"
            raise StoreUnsupported(why, key=key, op=op, temporary=self._seen_working)
        code = code_in(body) if answer.complete else ""
        if answer.status == 416 and code == "InvalidRange":
            total = _total(answer.headers.get(b"content-range", b""))
            raise CorruptObject(key, max(total, 0), f"the object ends before byte {end}")
        raise self._classify(answer.status, code, key, op)


def _etag(answer: Any) -> str:
    etag: str = answer.get("ETag", "")
    if not etag:
        raise _Nonsense(f"HTTP {_status(answer)} without an ETag")
    return etag


def _status(answer: Any) -> int:
    return int(answer["ResponseMetadata"]["HTTPStatusCode"])


def _total(content_range: bytes) -> int:
    """The object's size in ``bytes 0-9/100``, or -1."""
    total = content_range.rpartition(b"/")[2]
    return int(total) if total.isdigit() else -1
