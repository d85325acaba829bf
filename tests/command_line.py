"""The `glidefs` program without its start: a process that has it imported forks for each command, and daemon.

A command is a process of its own all the same, with its own arguments, directory, environment and output.
To start Python and import what the program needs takes half a second, in an emulated machine ten.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import faulthandler
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
INTERRUPTIBLE = ("env", "--default-signal=INT")
"""Words before a command that is to end by SIGINT: what shells start in the background ignores it."""
ROOM = 4096
"""Bytes for the words of a command in the list of processes."""
_lock = threading.Lock()
_server: subprocess.Popen[bytes] | None = None
_directory: tempfile.TemporaryDirectory[str] | None = None


def run(
    args: Sequence[str], *, cwd: Path, env: Mapping[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    """`glidefs ARGS`, as subprocess.run does it. Raises subprocess.TimeoutExpired; the command is killed."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        command = Started(args, cwd=cwd, env=env, stdout=out.fileno(), stderr=err.fileno())
        try:
            code = command.wait(timeout)
        except subprocess.TimeoutExpired:
            command.kill()
            raise
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode())
        return subprocess.CompletedProcess(["glidefs", *args], code, *texts)


class Started:
    """A command that runs, as a subprocess.Popen."""

    def __init__(
        self, args: Sequence[str], *, cwd: Path, env: Mapping[str, str], stdout: int, stderr: int
    ) -> None:
        self.args = ["glidefs", *args]
        self.returncode: int | None = None
        self._lock = threading.Lock()
        self._connection = _connection()
        request = json.dumps({"args": [*args], "cwd": str(cwd), "env": dict(env)}).encode()
        with open(os.devnull, "rb") as nothing:
            descriptors = [nothing.fileno(), stdout, stderr]
            socket.send_fds(self._connection, [len(request).to_bytes(4, "little")], descriptors)
        self._connection.sendall(request)
        self._answers = self._connection.makefile("rb", buffering=0)
        self.pid = int(self._answers.readline())

    def poll(self) -> int | None:
        """The exit code, if it has ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code; as of a signal minus its number. Raises subprocess.TimeoutExpired."""
        with self._lock:
            if self.returncode is None:
                ended = select.poll()
                ended.register(self._connection, select.POLLIN)
                if not ended.poll(None if timeout is None else timeout * 1000):
                    raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
                self.returncode = int(self._answers.readline())
                self._answers.close()
                self._connection.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """If it has not ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


def _connection() -> socket.socket:
    global _server, _directory
    with _lock:
        if _server is None:
            _directory = tempfile.TemporaryDirectory()
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(f"{_directory.name}/socket")
            listener.listen(64)
            _server = subprocess.Popen(
                [sys.executable, __file__, str(listener.fileno()), " " * ROOM],
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
    import glidefs.__main__
    import glidefs.api.client
    import glidefs.cli.main
    import glidefs.daemon.run  # noqa: F401

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


def _be_listed_as(words: Sequence[str]) -> None:
    """Give this process such a command line in /proc."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    begin, end = int(fields[45]), int(fields[46])  # arg_start, arg_end: proc(5)
    text = "".join(f"{word}\0" for word in words).encode()[: end - begin]
    ctypes.memmove(begin, text.ljust(end - begin, b"\0"), end - begin)


def _become(args: Sequence[str], cwd: str, env: Mapping[str, str]) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if env.get("PYTHONFAULTHANDLER"):
        faulthandler.enable()
    _be_listed_as([sys.executable, "-m", "glidefs", *args])
    from glidefs.__main__ import main

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
