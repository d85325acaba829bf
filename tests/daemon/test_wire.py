"""The commands' HTTP: an answer is whole, or an error that says so."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glidefs.api import wire
from glidefs.api.client import Client, CommandError
from glidefs.api.wire import BadAnswer


class Peer:
    """Answers one request with these bytes; keeps what it was asked."""

    def __init__(self, path: Path, answer: bytes, piece: int) -> None:
        self.asked = b""
        self._answer = answer
        self._piece = piece
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        connection, _ = self._listener.accept()
        with connection:
            self.asked = connection.recv(1 << 20)
            with contextlib.suppress(OSError):
                for at in range(0, len(self._answer), self._piece):
                    connection.sendall(self._answer[at : at + self._piece])

    def close(self) -> None:
        self._thread.join(10)
        self._listener.close()


@contextlib.contextmanager
def peer(directory: Path, answer: bytes, piece: int = 65536) -> Iterator[tuple[Peer, str]]:
    path = directory / "s"
    path.unlink(missing_ok=True)
    made = Peer(path, answer, piece)
    try:
        yield made, str(path)
    finally:
        made.close()


def whole(status: int, body: bytes) -> bytes:
    return b"HTTP/1.1 %d Word\r\ncontent-length: %d\r\nX: y: z\r\n\r\n" % (status, len(body)) + body


@settings(deadline=None, max_examples=50)
@given(
    status=st.integers(100, 999),
    body=st.binary(max_size=5000),
    piece=st.integers(1, 6000),
    cut=st.integers(0, 6000),
)
def test_whole_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, status: int, body: bytes, piece: int, cut: int
) -> None:
    answer = whole(status, body)
    directory = tmp_path_factory.mktemp("wire")
    with peer(directory, answer, piece) as (_, path):
        assert wire.request(path, "GET", "/x", timeout=10) == (status, body)
    with (
        peer(directory, answer[: min(cut, len(answer) - 1)]) as (_, path),
        pytest.raises(ConnectionResetError),
    ):
        wire.request(path, "GET", "/x", timeout=10)


@settings(deadline=None, max_examples=50)
@given(answer=st.binary(max_size=200))
def test_any_bytes(tmp_path_factory: pytest.TempPathFactory, answer: bytes) -> None:
    with peer(tmp_path_factory.mktemp("wire"), answer) as (_, path), contextlib.suppress(OSError, BadAnswer):
        wire.request(path, "GET", "/x", timeout=10)


def test_what_is_asked(tmp_path: Path) -> None:
    with peer(tmp_path, whole(200, b"{}")) as (asked, path):
        Client(path).call("POST", "/api/x", {"a": 1}, query={"q": "1 2", "none": None})
    head, _, body = asked.asked.partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    assert lines[0] == b"POST /api/x?q=1+2 HTTP/1.0"
    assert set(lines[1:]) == {b"Content-Type: application/json", b"Content-Length: 8"}
    assert body == b'{"a": 1}'


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"", "went away"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n{}", "went away"),
        (b"SSH-2.0-x\r\n\r\n", "is not HTTP"),
        (b"HTTP/1.1 two OK\r\n\r\n", "is not HTTP"),
        (b"x" * (1 << 17), "is not HTTP"),
        (b'HTTP/1.1 409 No\r\n\r\n{"error": "taken", "hint": "another"}', "taken"),
        (b"HTTP/1.1 500 No\r\n\r\nwords", "status 500"),
    ],
)
def test_what_a_command_says_of_it(tmp_path: Path, answer: bytes, said: str) -> None:
    with peer(tmp_path, answer) as (_, path), pytest.raises(CommandError, match=said):
        Client(path).call("GET", "/x", timeout=10)


def test_an_answer_without_end_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MAX_ANSWER", 1000)
    with peer(tmp_path, whole(200, bytes(100_000))) as (_, path), pytest.raises(BadAnswer):
        wire.request(path, "GET", "/x", timeout=10)


def test_a_daemon_that_says_nothing(tmp_path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "s"))
    listener.listen()
    with listener, pytest.raises(CommandError, match="does not answer in time"):
        Client(str(tmp_path / "s")).call("GET", "/x", timeout=0.05)
