"""What does not verify is fetched once more, from the store and from nowhere else."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from glidefs.errors import CorruptObject, NewerFormat, NotFound
from glidefs.store.base import Object
from glidefs.store.checked import get_checked
from glidefs.store.memory import MemoryStore


class Lying(MemoryStore):
    """The first answers are damaged. ``forgotten`` are the keys that were to be asked for anew."""

    def __init__(self, lies: int) -> None:
        super().__init__()
        self.lies = lies
        self.forgotten: list[str] = []

    def get(self, key: str) -> Object:
        found = super().get(key)
        if not self.lies:
            return found
        self.lies -= 1
        return Object(b"?" + found.data[1:], found.etag)

    def forget(self, key: str) -> None:
        self.forgotten.append(key)


def decode(key: str, data: bytes) -> str:
    if data[:1] == b"?":
        raise CorruptObject(key, 0, "checksum does not match")
    return data.decode()


def refuse(key: str, data: bytes) -> str:
    raise NewerFormat(key, 0, "version 9")


@pytest.mark.parametrize(("lies", "requests"), [(0, 1), (1, 2)])
def test_the_second_answer_counts(lies: int, requests: int, caplog: pytest.LogCaptureFixture) -> None:
    store = Lying(lies)
    store.put("k", b"content")
    content, found = get_checked(store, "k", decode)
    assert (content, found.data) == ("content", b"content")
    assert store.requests["get"] == requests
    assert store.forgotten == ["k"] * lies
    assert len(caplog.records) == lies


@pytest.mark.parametrize(
    ("lies", "decoder", "error", "requests"),
    [(9, decode, CorruptObject, 2), (0, refuse, NewerFormat, 1)],
    ids=["damaged in the store", "of a newer format"],
)
def test_what_is_so_in_the_store_is_told(
    lies: int, decoder: Callable[[str, bytes], str], error: type[Exception], requests: int
) -> None:
    store = Lying(lies)
    store.put("k", b"content")
    with pytest.raises(error):
        get_checked(store, "k", decoder)
    assert store.requests["get"] == requests


def test_what_is_gone_when_it_is_fetched_again_is_gone() -> None:
    store = Lying(1)
    store.put("k", b"content")
    store.forget = lambda key: store.delete(key)  # type: ignore[method-assign]
    with pytest.raises(NotFound):
        get_checked(store, "k", decode)
