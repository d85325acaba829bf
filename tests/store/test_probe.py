"""Stores that ignore what they are asked are found out."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from glidefs.config import StoreSettings
from glidefs.daemon.store_check import StoreCheck
from glidefs.errors import AccessDenied, StoreUnavailable, StoreUnsupported
from glidefs.store.memory import MemoryStore
from glidefs.store.probe import probe_store
from glidefs.store.resilient import ResilientStore


class IgnoresMatch(MemoryStore):
    def put(self, key: str, data: Any, *, if_match: str | None = None, if_none_match: bool = False) -> str:
        return super().put(key, data, if_none_match=if_none_match)


class IgnoresNoneMatch(MemoryStore):
    def put(self, key: str, data: Any, *, if_match: str | None = None, if_none_match: bool = False) -> str:
        return super().put(key, data, if_match=if_match)


class RefusesMatch(MemoryStore):
    def put(self, key: str, data: Any, *, if_match: str | None = None, if_none_match: bool = False) -> str:
        return super().put(key, data, if_match=if_match and "other", if_none_match=if_none_match)


class IgnoresMatchOfAbsent(MemoryStore):
    def put(self, key: str, data: Any, *, if_match: str | None = None, if_none_match: bool = False) -> str:
        absent = key not in self._objects
        return super().put(key, data, if_match=None if absent else if_match, if_none_match=if_none_match)


class IgnoresSuffix(MemoryStore):
    def get_suffix(self, key: str, length: int) -> tuple[bytes, int]:
        data = self.get(key).data
        return data[:length], len(data)


class ConstantETag(MemoryStore):
    def put(self, key: str, data: Any, *, if_match: str | None = None, if_none_match: bool = False) -> str:
        super().put(key, data, if_none_match=if_none_match)
        return '"x"'


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (IgnoresMatch, "If-Match is ignored"),
        (IgnoresNoneMatch, "If-None-Match is ignored"),
        (RefusesMatch, "right If-Match is refused"),
        (IgnoresMatchOfAbsent, "where there is no object"),
        (IgnoresSuffix, "suffix ranges"),
        (ConstantETag, "ETag does not change"),
    ],
)
def test_refused(kind: type[MemoryStore], says: str) -> None:
    store = kind("memory://odd")
    with pytest.raises(StoreUnsupported, match=says) as caught:
        probe_store(store, "p")
    assert "\n" not in str(caught.value)
    assert list(store.list("")) == [], "the probe cleans up"


def test_other_errors_come_through() -> None:
    store = MemoryStore()
    store.fail_next("put", AccessDenied("HTTP 403"))
    with pytest.raises(AccessDenied):
        probe_store(store)


def test_a_store_that_is_away_is_asked_once() -> None:
    store = MemoryStore()
    store.set_down(True)
    with pytest.raises(StoreUnavailable):
        probe_store(store)
    assert store.requests == {"put": 1}


@pytest.mark.parametrize("found", [b"file:///\xbb", b"", b"\0" * 4096, b"memory:// \n", None])
def test_what_remembers_a_probe_is_a_hint(tmp_path: Path, found: bytes | None) -> None:
    """Damaged it costs a probe, and is right after it; what cannot be written costs one at the next start."""
    marker = tmp_path / "store-probed"
    if found is not None:
        marker.write_bytes(found)
    memory, stopping = MemoryStore(), threading.Event()
    store = ResilientStore(memory, cancel=stopping)
    check = StoreCheck(store, StoreSettings(url="memory://"), marker, stopping)
    check.run(has_exports=False)
    probed = sum(memory.requests.values())
    assert (probed == 0) == (found == b"memory:// \n")
    check.run(has_exports=False)
    assert sum(memory.requests.values()) == probed
    marker.unlink()
    marker.mkdir()
    check.run(has_exports=False)
    assert sum(memory.requests.values()) > probed
    store.close()
