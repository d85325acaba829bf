"""The `glidefs` program without its start: a process that has it imported forks for each command.

A command is a process of its own all the same, with its own arguments, directory, environment and output.
To start Python and import what the program needs takes half a second, in an emulated machine ten.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_lock = threading.Lock()
_server: subprocess.Popen[bytes] | None = None
_directory: tempfile.TemporaryDirectory[str] | None = None


def run(
    args: Sequence[str], *, cwd: Path, env: Mapping[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    """`glidefs ARGS`, as subprocess.run does it. Raises subprocess.TimeoutExpired; the command is killed."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, _connection() as connection:
        request = json.dumps({"args": [*args], "cwd": str(cwd), "env": dict(env)}).encode()
        with open(os.devnull, "rb") as nothing:
            descriptors = [nothing.fileno(), out.fileno(), err.fileno()]
            socket.send_fds(connection, [len(request).to_bytes(4, "little")], descriptors)
        connection.sendall(request)
        connection.settimeout(timeout)
        answers = connection.makefile("r")
        pid = int(answers.readline())
        try:
            code = int(answers.readline())
        except TimeoutError:
            os.kill(pid, signal.SIGKILL)
            raise subprocess.TimeoutExpired(["glidefs", *args], timeout) from None
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode())
        return subprocess.CompletedProcess(["glidefs", *args], code, *texts)


def _connection() -> socket.socket:
    global _server, _directory
    with _lock:
        if _server is None:
            _directory = tempfile.TemporaryDirectory()
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(f"{_directory.name}/socket")
            listener.listen(64)
            _server = subprocess.Popen(
                [sys.executable, __file__, str(listener.fileno())],
                pass_fds=[listener.fileno()],
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )
            listener.close()
            atexit.register(_end)
        assert _directory is not None
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(f"{_directory.name}/socket")
        return connection


def _end() -> None:
    assert _server is not None
    assert _directory is not None
    _server.kill()
    _server.wait()
    _directory.cleanup()


# ---- the server -----------------------------------------------------------------------------------


def serve(listener: socket.socket) -> None:
    """A process for each connection, until this one is killed."""
    import glidefs.api.client
    import glidefs.cli.main  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those processes
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _command(connection)
        connection.close()


def _command(connection: socket.socket) -> None:
    """Run one command in a process of its own; answers with its pid, then with its exit code."""
    length, descriptors, _, _ = socket.recv_fds(connection, 4, 3)
    request = json.loads(connection.makefile("rb").read(int.from_bytes(length, "little")))
    pid = os.fork()
    if pid == 0:
        connection.close()
        for number, descriptor in enumerate(descriptors):
            os.dup2(descriptor, number)
            os.close(descriptor)
        _become(request["args"], request["cwd"], request["env"])
    connection.sendall(f"{pid}\n".encode())
    _, status = os.waitpid(pid, 0)
    with contextlib.suppress(OSError):  # who asked may be gone
        connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def _become(args: Sequence[str], cwd: str, env: Mapping[str, str]) -> None:
    from glidefs.cli.main import main

    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = ["glidefs", *args]
    code: object = 0
    try:
        main()
    except SystemExit as error:
        code = error.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
    os._exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # not the tests
    serve(socket.socket(fileno=int(sys.argv[1])))
