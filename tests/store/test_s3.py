"""What is special to S3: errors by kind, the lean range client, an outage of a real server."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
import servers

from glidefs.errors import (
    AccessDenied,
    Conflict,
    CorruptObject,
    NoSuchBucket,
    NotFound,
    PreconditionFailed,
    StoreError,
    StoreRefused,
    StoreUnavailable,
    StoreUnsupported,
    Throttled,
)
from glidefs.store import open_store
from glidefs.store.resilient import ResilientStore
from glidefs.store.s3.body import BodyReader
from glidefs.store.s3.errors import classify, code_in
from glidefs.store.s3.range_http import HttpError, RangeClient
from glidefs.store.s3.store import S3Store

BUCKET = "glidefs-test"


@pytest.mark.parametrize(
    ("status", "code", "kind", "temporary"),
    [
        (404, "NoSuchKey", NotFound, False),
        (404, "", StoreUnavailable, True),
        (410, "", StoreUnavailable, True),
        (404, "Other", StoreUnavailable, True),
        (200, "NoSuchKey", StoreUnavailable, True),
        (500, "NoSuchKey", StoreUnavailable, True),
        (412, "", StoreUnavailable, True),
        (200, "PreconditionFailed", StoreUnavailable, True),
        (409, "", StoreUnavailable, True),
        (404, "NoSuchBucket", NoSuchBucket, False),
        (412, "PreconditionFailed", PreconditionFailed, False),
        (409, "ConditionalRequestConflict", Conflict, True),
        (409, "OperationAborted", Conflict, True),
        (503, "SlowDown", Throttled, True),
        (429, "", Throttled, True),
        (503, "ServiceUnavailable", StoreUnavailable, True),
        (500, "InternalError", StoreUnavailable, True),
        (502, "", StoreUnavailable, True),
        (400, "RequestTimeout", StoreUnavailable, True),
        (400, "ExpiredToken", StoreUnavailable, True),
        (403, "RequestTimeTooSkewed", StoreUnavailable, True),
        (403, "AccessDenied", AccessDenied, False),
        (403, "InvalidAccessKeyId", AccessDenied, False),
        (400, "InvalidToken", AccessDenied, False),
        (403, "SignatureDoesNotMatch", AccessDenied, False),
        (400, "TokenRefreshRequired", StoreUnavailable, True),
        (403, "", StoreUnavailable, True),
        (401, "", StoreUnavailable, True),
        (400, "", StoreUnavailable, True),
        (405, "", StoreUnavailable, True),
        (501, "", StoreUnavailable, True),
        (200, "", StoreUnavailable, True),
        (302, "", StoreUnavailable, True),
        (501, "NotImplemented", StoreUnsupported, False),
        (301, "PermanentRedirect", StoreRefused, False),
        (400, "InvalidArgument", StoreRefused, False),
    ],
)
def test_classification(status: int, code: str, kind: type[StoreError], temporary: bool) -> None:
    error = classify(status, code, key="k", op="get", bucket="b", seen_working=False)
    assert type(error) is kind
    assert error.temporary is temporary
    assert "\n" not in str(error)
    # What is neither passing nor said of the object is waited for by a daemon.
    assert error.temporary or error.waits or kind in (NotFound, PreconditionFailed)


def document(code: str) -> bytes:
    return f"<?xml version='1.0'?>\n<Error><Code>{code}</Code><Message>why</Message></Error>".encode()


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (document("NoSuchKey"), "NoSuchKey"),
        (b"<Error><Code>NoSuchKey</Code></Error>", "NoSuchKey"),
        (document("NoSuchKey")[:-8], ""),
        (b"<Code>NoSuchKey</Code>", ""),
        (b"<html><body><Code>NoSuchKey</Code></body></html>", ""),
        (b"<html><Error><Code>NoSuchKey</Code></Error></html>", ""),
        (b"404 page not found", ""),
        (b"", ""),
    ],
    ids=lambda value: repr(value)[:50],
)
def test_only_a_whole_error_document_has_a_code(body: bytes, code: str) -> None:
    assert code_in(body) == code


def test_missing_bucket_is_temporary_once_it_was_seen() -> None:
    for seen in (False, True):
        error = classify(404, "NoSuchBucket", key="k", op="get", bucket="b", seen_working=seen)
        assert error.temporary is seen


@pytest.mark.s3
def test_missing_bucket(weed_endpoint: str) -> None:
    with open_store("s3://not-there/x", endpoint_url=weed_endpoint) as store:
        for request in (lambda: store.get("k"), lambda: list(store.list(""))):
            with pytest.raises(NoSuchBucket, match="not-there"):
                request()
        with pytest.raises((NoSuchBucket, NotFound)):
            store.get_range("k", 0, 1)


def test_missing_credentials_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*servers.CREDENTIALS, "AWS_PROFILE"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    with open_store("s3://bucket/x", endpoint_url="http://127.0.0.1:9") as store:
        for request in (lambda: store.get("k"), lambda: store.get_range("k", 0, 1)):
            with pytest.raises(AccessDenied, match="AWS_ACCESS_KEY_ID"):
                request()


def test_nobody_listens(s3_credentials: None) -> None:
    with open_store("s3://bucket/x", endpoint_url=f"http://127.0.0.1:{servers.free_port()}") as store:
        for request in (
            lambda: store.get("k"),
            lambda: store.get_range("k", 0, 1),
            lambda: store.put("k", b""),
        ):
            with pytest.raises(StoreUnavailable) as caught:
                request()
            assert caught.value.temporary


def test_file_store_does_not_load_boto3() -> None:
    code = "import sys, glidefs.store.resilient, glidefs.store.file; assert 'boto3' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.s3
def test_url_is_presigned_once_per_key(moto_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_store(f"s3://{BUCKET}/urls", endpoint_url=moto_endpoint) as store:
        assert isinstance(store, S3Store)
        store.put("k", b"0123456789")
        made = []
        real = store._ranges._presign
        monkeypatch.setattr(store._ranges, "_presign", lambda *args: made.append(args) or real(*args))
        for i in range(5):
            assert store.get_range("k", i, 2) == b"0123456789"[i : i + 2]
        assert len(made) == 1
        # An URL that the provider refuses is made anew.
        urls = store._ranges._urls
        urls["k"] = (time.monotonic() + 999, urls["k"][1].replace("k?", "other?"))
        with pytest.raises(NotFound):
            store.get_range("k", 0, 2)
        # One that a reader does not trust is too.
        store.forget("k")
        assert store.get_range("k", 0, 2) == b"01"


@pytest.mark.s3
def test_an_outage_before_a_real_server(weed_endpoint: str) -> None:
    """Connections are cut and refused for a while: waiting reads and writes finish by themselves."""
    relay = servers.Forwarder(weed_endpoint)
    store = ResilientStore(open_store(f"s3://{BUCKET}/outage", endpoint_url=relay.endpoint))
    try:
        store.put("k", b"0123456789")
        assert store.get_range("k", 0, 4) == b"0123"
        relay.cut()
        with ThreadPoolExecutor(4) as pool:
            reads = [pool.submit(store.get_range, "k", 2, 3) for _ in range(3)]
            write = pool.submit(store.put, "new", b"x")
            end = time.monotonic() + 10
            while store.metrics().down_seconds < 1.0:
                assert time.monotonic() < end
                time.sleep(0.01)
            assert not any(call.done() for call in [*reads, write])
            relay.mend()
            back = time.monotonic()
            assert [read.result(30) for read in reads] == [b"234"] * 3
            assert write.result(30)
            assert time.monotonic() - back < 10.0
        assert store.get("new").data == b"x"
    finally:
        relay.cut()
        store.close()


@pytest.mark.parametrize("condition", [{}, {"if_match": '"x"'}, {"if_none_match": True}])
def test_puts_are_not_retried_by_the_client(s3_credentials: None, condition: dict[str, Any]) -> None:
    """! Only the layer above knows that a put which failed may have been done."""
    seen: list[str] = []

    class Failing(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            seen.append(self.path)
            self.send_error(500)

        def log_message(self, format: str, *args: Any) -> None:
            """Quiet."""

    with HTTPServer(("127.0.0.1", 0), Failing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with open_store("s3://bucket/x", endpoint_url=f"http://127.0.0.1:{server.server_port}") as store:
            with pytest.raises(StoreUnavailable):
                store.put("k", b"data", **condition)
            assert len(seen) == 1
        server.shutdown()


# -- the lean client against servers that misbehave ----------------------------------------------


@contextmanager
def answering(*answers: bytes, close_after: bool = True) -> Iterator[RangeClient]:
    """A client of a server that gives one raw answer per request; each connection ends after one."""
    listener = socket.create_server(("127.0.0.1", 0))
    pending = list(answers)

    def serve() -> None:
        while pending:
            try:
                connection, _ = listener.accept()
            except OSError:
                return  # closed: the test is over
            with connection:
                while pending:
                    request = b""
                    while not request.endswith(b"\r\n\r\n"):
                        piece = connection.recv(4096)
                        if not piece:
                            break
                        request += piece
                    if not request:
                        break
                    connection.sendall(pending.pop(0))
                    if close_after:
                        break

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    client = RangeClient(
        "127.0.0.1", listener.getsockname()[1], tls=None, pool_size=2, connect_timeout=5, read_timeout=5
    )
    with closing(listener), closing(client):
        yield client


OK = b"HTTP/1.1 206 Partial Content\r\nContent-Length: 4\r\nContent-Range: bytes 0-3/10\r\n\r\nabcd"


def test_plain_answer_and_a_kept_connection() -> None:
    with answering(OK, OK, close_after=False) as client:
        for _ in range(2):
            answer = client.get("/k?x", "0-3", 4)
            assert (answer.status, answer.body, answer.complete) == (206, b"abcd", True)
            assert answer.headers[b"content-range"] == b"bytes 0-3/10"
        assert len(client._idle) == 1


def test_connection_that_the_server_closed_is_no_error() -> None:
    with answering(OK, OK, OK) as client:
        for _ in range(3):
            assert client.get("/k", "0-3", 4).body == b"abcd"


def test_a_body_goes_where_it_fits() -> None:
    large = os.urandom(1 << 20)
    head = b"HTTP/1.1 206 X\r\nContent-Length: %d\r\n\r\n"
    error = b"HTTP/1.1 503 X\r\nContent-Length: 4\r\n\r\nSlow"
    room = bytearray(len(large))
    with answering(head % len(large) + large, OK, error, head % 4 + b"ab") as client:
        answer = client.get("/k", "0-1048575", len(large), memoryview(room))
        assert answer.complete
        assert room == large == answer.body
        assert answer.body.obj is room
        small = memoryview(bytearray(4))
        assert client.get("/k", "0-3", 4, memoryview(room)).body == b"abcd", "an answer of another length"
        assert client.get("/k", "0-3", 4, small).body == b"Slow"
        assert bytes(small) == bytes(4), "an error is no data"
        answer = client.get("/k", "0-3", 4, small)
        assert (bytes(answer.body), answer.complete) == (b"ab", False)


def test_a_server_that_stops_in_the_middle_is_a_timeout() -> None:
    with answering(b"HTTP/1.1 206 X\r\nContent-Length: 9\r\n\r\nabc", OK, close_after=False) as client:
        client._read_timeout = 0.2
        with pytest.raises(TimeoutError):
            client.get("/k", "0-8", 9)
        assert not client._idle
    with answering(b"HTTP/1.1 206 X\r\n", OK, close_after=False) as client:
        client._read_timeout = 0.2
        with pytest.raises(TimeoutError):
            client.get("/k", "0-8", 9)


def test_chunked() -> None:
    chunked = b"HTTP/1.1 206 X\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n2;x=y\r\ncd\r\n0\r\n\r\n"
    with answering(chunked, chunked, close_after=False) as client:
        for _ in range(2):
            assert client.get("/k", "0-3", 4)[2:] == (b"abcd", True)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"garbage\r\n\r\n",
        b"HTTP/1.1 xx\r\n\r\n",
        b"HTTP/1.1 206 X\r\nContent-Len",
        b"HTTP/1.1 206 X\r\nno colon\r\n\r\n",
        b"HTTP/1.1 206 X\r\nContent-Length: -4\r\n\r\nabcd",
        b"HTTP/1.1 206 X\r\n" + b"a: b\r\n" * 200 + b"\r\n",
        b"HTTP/1.1 206 X\r\nx: " + b"y" * 20000 + b"\r\n\r\n",
    ],
    ids=lambda raw: repr(raw[:40]),
)
def test_not_http(raw: bytes) -> None:
    with answering(raw) as client, pytest.raises((HttpError, OSError)):
        client.get("/k", "0-3", 4)


@pytest.mark.parametrize(
    "raw",
    [
        b"HTTP/1.1 206 X\r\nContent-Length: 4\r\n\r\nab",
        b"HTTP/1.1 206 X\r\nContent-Length: 99999999999\r\n\r\nabcd",
        b"HTTP/1.1 206 X\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n",
        b"HTTP/1.1 206 X\r\nTransfer-Encoding: chunked\r\n\r\nffffffff\r\nab",
        b"HTTP/1.1 206 X\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\nab",
        b"HTTP/1.1 206 X\r\n\r\nabcdefgh",
    ],
    ids=repr,
)
def test_bodies_that_are_not_whole_are_told(raw: bytes) -> None:
    with answering(raw) as client:
        answer = client.get("/k", "0-3", 4)
        assert not answer.complete
        assert len(answer.body) <= 4
        assert not client._idle, "such a connection is not used again"


def test_error_bodies_are_bounded() -> None:
    raw = b"HTTP/1.1 503 X\r\nContent-Length: 1000000\r\n\r\n<Code>SlowDown</Code>" + b"x" * 100000
    with answering(raw) as client:
        answer = client.get("/k", "0-3", 4)
        assert answer.status == 503
        assert b"SlowDown" in bytes(answer.body)
        assert len(answer.body) <= 65536


def answer(status: int, body: bytes, *, length: int = -1, range: bytes = b"", etag: bytes = b"") -> bytes:
    lines = [b"HTTP/1.1 %d X" % status, b"Content-Length: %d" % (len(body) if length < 0 else length)]
    lines += [b"Content-Range: " + range] if range else []
    lines += [b"ETag: " + etag] if etag else []
    return b"\r\n".join([*lines, b"", body])


@pytest.mark.parametrize(
    ("raw", "kind"),
    [
        (answer(206, b"ab", length=2, range=b"bytes 0-3/10"), StoreUnavailable),
        (answer(206, b"ab", length=4, range=b"bytes 0-3/10"), StoreUnavailable),
        (answer(206, b"ab", range=b"bytes 0-1/2"), CorruptObject),
        (answer(206, b"abcd", range=b"bytes 4-7/10"), StoreUnavailable),
        (answer(206, b"abcd"), StoreUnavailable),
        (answer(206, b"<html>"), StoreUnavailable),
        (answer(200, b"abcd", etag=b'"x"'), StoreUnsupported),
        (answer(200, b"abcd"), StoreUnavailable),
        (answer(200, b"<html></html>", etag=b'"x"'), StoreUnavailable),
        (answer(200, document("InternalError")), StoreUnavailable),
        (answer(200, document("NoSuchKey")), StoreUnavailable),
        (answer(204, b""), StoreUnavailable),
        (answer(503, document("SlowDown")), Throttled),
        (answer(500, b""), StoreUnavailable),
        (answer(404, document("NoSuchKey")), NotFound),
        (answer(404, document("NoSuchKey"), length=500), StoreUnavailable),
        (answer(404, b"404 page not found"), StoreUnavailable),
        (answer(404, b""), StoreUnavailable),
        (answer(404, b"<html><Code>NoSuchKey</Code></html>"), StoreUnavailable),
        (answer(410, b""), StoreUnavailable),
        (answer(405, b""), StoreUnavailable),
        (answer(416, document("InvalidRange"), range=b"bytes */3"), CorruptObject),
        (answer(416, b"", range=b"bytes */3"), StoreUnavailable),
        (b"", StoreUnavailable),
    ],
    ids=lambda value: repr(value)[:60],
)
def test_range_answers(s3_credentials: None, raw: bytes, kind: type[Exception]) -> None:
    with answering(raw) as client:
        store = S3Store("bucket", "", None)
        place = ("http", f"127.0.0.1:{client.port}")
        store._ranges._clients[place] = client
        store._ranges._urls["k"] = (time.monotonic() + 99, f"http://127.0.0.1:{client.port}/k?x=y")
        with pytest.raises(kind):
            store.get_range("k", 0, 4)


def test_body_reader() -> None:
    body = BodyReader([b"abc", b"", memoryview(b"defg"), bytearray(b"h")])
    assert len(body) == 8
    assert body.read() == b"abcdefgh"
    assert body.read(3) == b""
    for start in range(9):
        assert body.seek(start) == start == body.tell()
        pieces = list(iter(lambda: body.read(2), b""))
        assert b"".join(pieces) == b"abcdefgh"[start:]
    assert body.seek(0, os.SEEK_END) == 8
