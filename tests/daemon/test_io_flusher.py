"""Every thread of the daemon gets memory without waiting for a disk, which may be its own."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable

import pytest
from daemon_harness import Daemon

from glidefs.config import CacheSettings, Config
from glidefs.daemon import io_flusher
from glidefs.doctor import doctor

needs_capability = pytest.mark.skipif(
    io_flusher.refused() is not None, reason=f"no CAP_SYS_RESOURCE: {io_flusher.refused()}"
)


@needs_capability
def test_all_threads_of_a_daemon_under_load_are_marked(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon().start()
    assert daemon.process is not None
    daemon.json("create", "v1", "--size", "16MiB", "--transport", "nbd")
    before = io_flusher.count_threads(daemon.process.pid)[1]
    daemon.io("v1", "write -P 7 0 8M")
    daemon.run("drain", "v1")  # upload, put, commit: pools that start their threads when there is work
    marked, total = io_flusher.count_threads(daemon.process.pid)
    assert total > before > 10
    assert marked == total
    assert "flusher" not in daemon.log_text


@pytest.mark.skipif(io_flusher.refused() is None, reason="this process may: what is refused cannot be seen")
def test_a_daemon_that_may_not_says_so_once(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon().start()
    assert daemon.process is not None
    assert io_flusher.count_threads(daemon.process.pid)[0] == 0
    assert daemon.log_text.count("I/O flusher") == 1
    assert "CAP_SYS_RESOURCE" in daemon.log_text


@needs_capability
def test_threads_and_processes_inherit_it() -> None:
    """What all of this rests on; in a process of its own, since nothing else is to inherit it."""
    program = (
        "import subprocess, sys, threading\n"
        "from glidefs import io_flusher\n"
        "assert io_flusher.become_io_flusher() is None\n"
        "stop = threading.Event()\n"
        "thread = threading.Thread(target=stop.wait); thread.start()\n"
        "assert io_flusher.count_threads() == (2, 2), io_flusher.count_threads()\n"
        "child = 'from glidefs import io_flusher; assert io_flusher.count_threads() == (1, 1)'\n"
        "subprocess.run([sys.executable, '-c', child], check=True)\n"
        "stop.set()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_threads_are_counted() -> None:
    stop = threading.Event()
    threads = [threading.Thread(target=stop.wait) for _ in range(3)]
    for thread in threads:
        thread.start()
    marked, total = io_flusher.count_threads()
    assert total >= 4
    assert marked == 0
    stop.set()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize(
    ("counted", "why", "state", "said"),
    [
        ((12, 12), None, "ok", "all 12 threads"),
        ((3, 12), None, "warn", "9 of 12 threads"),
        (None, None, "ok", "permitted"),
        (None, "Operation not permitted", "warn", "Operation not permitted"),
    ],
)
def test_doctor_has_a_line(
    monkeypatch: pytest.MonkeyPatch,
    counted: tuple[int, int] | None,
    why: str | None,
    state: str,
    said: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    cache = tmp_path_factory.mktemp("cache")

    def count(pid: int | str) -> tuple[int, int]:
        if counted is None:
            raise FileNotFoundError(pid)
        return counted

    monkeypatch.setattr(io_flusher, "count_threads", count)
    monkeypatch.setattr(io_flusher, "refused", lambda: why)
    (cache / "daemon.lock").write_text("1234\n")
    result = doctor._flusher(Config(cache=CacheSettings(dir=str(cache))))
    assert result[0] == state
    assert said in result[1]
    assert (state == "ok") == (len(result) == 2)
