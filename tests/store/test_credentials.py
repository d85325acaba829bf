"""Credentials that are rotated or withdrawn in use: wherever they come from, reads go on in seconds."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import servers
from bad_s3 import BUCKET, BadS3

from glidefs.store import open_store
from glidefs.store.resilient import ResilientStore

SECONDS = 20.0
"""Within which reads go on; one try for other credentials is made every few seconds."""
Rotate = Callable[[str], None]
"""Makes a session token the one that the source gives."""


def document(token: str) -> dict[str, object]:
    ends = datetime.now(UTC) + timedelta(hours=6)
    return {
        "Version": 1,
        "AccessKeyId": "a",
        "SecretAccessKey": "b",
        "SessionToken": token,
        "Token": token,
        "Expiration": ends.strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


@pytest.fixture
def no_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*servers.CREDENTIALS, "AWS_PROFILE", "AWS_SESSION_TOKEN"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))


@pytest.fixture
def shared_file(tmp_path: Path, no_credentials: None) -> Rotate:
    """The file that people and agents rewrite."""

    def rotate(token: str) -> None:
        lines = ["[default]", "aws_access_key_id = a", "aws_secret_access_key = b"]
        lines += [f"aws_session_token = {token}", ""]
        (tmp_path / "credentials").write_text("\n".join(lines))

    return rotate


@pytest.fixture
def process(tmp_path: Path, no_credentials: None) -> Rotate:
    """``credential_process``."""
    (tmp_path / "config").write_text(f"[default]\ncredential_process = cat {tmp_path}/answer\n")
    return lambda token: (tmp_path / "answer").write_text(json.dumps(document(token))) and None


@pytest.fixture
def metadata(no_credentials: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rotate]:
    """The metadata service of a container or instance."""
    now: dict[str, object] = {}

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            """Of no interest."""

        def do_GET(self) -> None:
            body = json.dumps(now).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}/role"
    monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", url)
    yield lambda token: now.update(document(token))
    server.shutdown()
    server.server_close()


REFUSALS = [(400, "ExpiredToken"), (403, "InvalidAccessKeyId"), (400, ""), (403, ""), (401, "InvalidToken")]


@pytest.mark.parametrize("source", ["shared_file", "process", "metadata"])
@pytest.mark.parametrize("refusal", REFUSALS, ids=str)
def test_reads_go_on_with_the_new_token(
    source: str, refusal: tuple[int, str], request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    rotate: Rotate = request.getfixturevalue(source)
    rotate("one")
    with BadS3() as s3, open_store(f"s3://{BUCKET}/root", endpoint_url=s3.endpoint) as bare:
        s3.token, s3.refuse = "one", refusal
        store = ResilientStore(bare)
        store.patient = True
        store.put("k", b"0123456789")
        assert store.get_range("k", 2, 2) == b"23"  # its URL is signed with the first token from now on
        s3.token = "two"  # withdrawn long before it would have ended
        began = time.monotonic()
        waits = threading.Thread(target=store.get_range, args=("k", 4, 2))
        waits.start()
        refused = s3.requests["GET"]
        while s3.requests["GET"] < refused + 2:
            assert time.monotonic() < began + SECONDS
            time.sleep(0.005)
        assert waits.is_alive(), "nothing was read with a token that is withdrawn"
        rotate("two")
        rotated = time.monotonic()
        waits.join(SECONDS)
        assert not waits.is_alive()
        assert store.get_range("k", 4, 2) == b"45"
        assert store.head("k").size == 10
        store.put("k", b"new")
        assert time.monotonic() - rotated < SECONDS + 1
        said = [record.getMessage() for record in caplog.records]
        assert [text for text in said if text.startswith("the S3 credentials were refused")]
        assert not any("one" in text.split() or "two" in text.split() for text in said), "a token in the log"
