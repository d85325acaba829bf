"""The directory store: processes, crashes, missing mounts, full disks."""

from __future__ import annotations

import errno
import fcntl
import mmap
import multiprocessing
import os
import threading
from pathlib import Path

import pytest

from glidefs.errors import ConfigError, PreconditionFailed, StoreError, StoreUnavailable
from glidefs.store import open_store
from glidefs.store.file import FileStore


def _increment(root: str, times: int) -> None:
    store = FileStore(root, create=True)
    for _ in range(times):
        while True:
            found = store.get("counter")
            try:
                store.put("counter", str(int(found.data) + 1).encode(), if_match=found.etag)
                break
            except PreconditionFailed:
                continue


def test_compare_and_swap_across_processes(tmp_path: Path) -> None:
    store = FileStore(tmp_path, create=True)
    store.put("counter", b"0")
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_increment, args=(str(tmp_path), 40)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert store.get("counter").data == b"160"


def _claim(root: str, rounds: int, results: object) -> None:
    store = FileStore(root, create=True)
    for i in range(rounds):
        try:
            store.put(f"d{i}/name", b"x", if_none_match=True)
            results.put(i)  # type: ignore[attr-defined]
        except PreconditionFailed:
            pass


def test_create_once_across_processes(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    workers = [context.Process(target=_claim, args=(str(tmp_path), 30, results)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    won = []
    while not results.empty():
        won.append(results.get())
    assert sorted(won) == list(range(30))


def test_etags_do_not_come_back(tmp_path: Path) -> None:
    """Equal content, fast overwrites, deleted and made again: an old ETag never fits (no ABA)."""
    store = FileStore(tmp_path, create=True)
    seen = set()
    for i in range(200):
        seen.add(store.put("k", b"same"))
        if i % 5 == 0:
            store.delete("k")
    assert len(seen) == 200


def test_etag_moves_on_though_the_clock_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FileStore(tmp_path, create=True)
    monkeypatch.setattr("time.time_ns", lambda: 1_700_000_000_000_000_000)
    times = []
    for _ in range(20):
        store.put("k", b"same")
        times.append((tmp_path / "k").stat().st_mtime_ns)
    assert times == sorted(set(times))


def test_put_and_delete_beside_each_other(tmp_path: Path) -> None:
    """A delete that removes the directory it emptied does not fail a put into it."""
    store = FileStore(tmp_path, create=True)
    failures: list[Exception] = []

    def churn(name: str) -> None:
        try:
            for _ in range(100):
                store.put(f"p/packs/aa/{name}", b"x")
                store.delete(f"p/packs/aa/{name}")
        except StoreError as error:
            failures.append(error)

    threads = [threading.Thread(target=churn, args=(f"n{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert not (tmp_path / "p").exists()


def test_unmounted_root_is_an_outage_not_an_empty_store(tmp_path: Path) -> None:
    root = tmp_path / "store"
    store = FileStore(root, create=True)
    store.put("k", b"x")
    root.rename(tmp_path / "elsewhere")
    for empty_mount_point in (False, True):
        if empty_mount_point:
            root.mkdir()
        for request in (
            lambda: store.get("k"),
            lambda: store.head("k"),
            lambda: store.put("k", b"y"),
            lambda: store.delete("k"),
            lambda: list(store.list("")),
            lambda: store.list_dirs("p/"),
        ):
            with pytest.raises(StoreUnavailable) as caught:
                request()
            assert caught.value.temporary
    assert list(root.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "says"),
    [(errno.ENOSPC, "no space left"), (errno.EDQUOT, "no space left"), (errno.EIO, "error")],
)
def test_disk_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, says: str) -> None:
    store = FileStore(tmp_path, create=True)
    store.put("k", b"old")

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StoreUnavailable, match=says):
        store.put("k", b"new")
    monkeypatch.undo()
    assert store.get("k").data == b"old"
    assert list((tmp_path / ".tmp").iterdir()) == []


PAGE = mmap.PAGESIZE


def aligned(data: bytes, shift: int = 0) -> memoryview:
    """These bytes at the beginning of a page, or ``shift`` behind it."""
    area = mmap.mmap(-1, len(data) + PAGE)
    area[shift : shift + len(data)] = data
    return memoryview(area)[shift : shift + len(data)]


@pytest.mark.parametrize("refused", ["never", "when it is asked for", "when it is used", "later"])
@pytest.mark.parametrize(("extra", "shift"), [(0, 0), (1, 0), (PAGE - 1, 0), (100, 16)])
def test_large_objects_pass_the_page_cache_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extra: int, shift: int, refused: str
) -> None:
    """Whatever the file system thinks of that: the object has all of its bytes."""
    store = FileStore(tmp_path, create=True)
    direct: list[int] = []
    write, control = os.write, fcntl.fcntl

    def writing(fd: int, view: memoryview) -> int:
        if not control(fd, fcntl.F_GETFL) & os.O_DIRECT:
            return write(fd, view)
        if refused == "when it is used" or (refused == "later" and direct):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        direct.append(write(fd, view[: PAGE + 512] if refused == "later" else view))
        return direct[-1]

    def asking(fd: int, what: int, *flags: int) -> int:
        if refused == "when it is asked for" and flags and flags[0] & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return control(fd, what, *flags)

    monkeypatch.setattr(os, "write", writing)
    monkeypatch.setattr(fcntl, "fcntl", asking)
    data = os.urandom((1 << 20) + extra)
    store.put("k", [aligned(data, shift), b"behind", bytes(2 << 20)])
    monkeypatch.undo()
    assert store.get("k").data == data + b"behind" + bytes(2 << 20)
    if refused in ("never", "later") and not shift and takes_direct(tmp_path):
        assert sum(direct) == (PAGE + 512 if refused == "later" else 1 << 20)


def takes_direct(directory: Path) -> bool:
    try:
        os.close(os.open(directory / "probe", os.O_WRONLY | os.O_CREAT | os.O_DIRECT))
    except OSError:
        return False
    return True


def test_an_error_of_the_disk_is_not_taken_for_a_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FileStore(tmp_path, create=True)

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "write", fail)
    with pytest.raises(StoreUnavailable):
        store.put("k", aligned(bytes(1 << 20)))
    monkeypatch.undo()
    assert list((tmp_path / ".tmp").iterdir()) == []


def test_own_directories_are_no_keys(tmp_path: Path) -> None:
    store = FileStore(tmp_path, create=True)
    for key in (".tmp/x", ".locks/00", ".locks"):
        with pytest.raises(StoreError, match="legal key"):
            store.put(key, b"")
    store.put("p/x", b"")
    assert [info.key for info in store.list("")] == ["p/x"]
    assert store.list_dirs("") == ["p/"]


def test_stale_temporaries_are_removed(tmp_path: Path) -> None:
    FileStore(tmp_path, create=True).put("p/x", b"")
    old, new = tmp_path / ".tmp" / "old", tmp_path / ".tmp" / "new"
    for path in (old, new):
        path.write_bytes(b"x")
    os.utime(old, (1, 1))
    FileStore(tmp_path, create=True)
    assert new.exists()
    assert not old.exists()


def test_key_under_an_object(tmp_path: Path) -> None:
    store = FileStore(tmp_path, create=True)
    store.put("a", b"x")
    with pytest.raises(StoreError) as caught:
        store.put("a/b", b"x")
    assert not caught.value.temporary


def test_symlinked_object_is_not_followed(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "s", create=True)
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "s" / "k").symlink_to(tmp_path / "secret")
    with pytest.raises(StoreError):
        store.get("k")


def test_open_store_urls(tmp_path: Path) -> None:
    assert open_store(f"file://{tmp_path}/x").url == f"file://{tmp_path}/x"
    assert open_store("memory://a") is open_store("memory://a")
    for bad in ("file://", "file://host/x", "s3://", "http://x", "/path", ""):
        with pytest.raises(ConfigError):
            open_store(bad)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError):
        open_store(f"file://{tmp_path}/file")
