"""An answer that is shared: made once for all who ask at once, never older than it may be."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from glidefs.api import shared
from glidefs.api.shared import Shared


class Maker:
    """Makes b"1", b"2"..., each when it is let go."""

    def __init__(self) -> None:
        self.begun = 0
        self.go = asyncio.Event()
        self.error: Exception | None = None

    async def __call__(self) -> bytes:
        self.begun += 1
        mine = b"%d" % self.begun
        await self.go.wait()
        if self.error is not None:
            raise self.error
        return mine


def run(test: Callable[[Maker, Shared], Awaitable[None]]) -> None:
    async def main() -> None:
        maker = Maker()
        await test(maker, Shared(maker))

    asyncio.run(main())


@pytest.fixture
def _kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """For longer than a test takes."""
    monkeypatch.setattr(shared, "KEPT", 60.0)


@pytest.mark.usefixtures("_kept")
def test_who_asks_at_once_shares() -> None:
    async def test(maker: Maker, answer: Shared) -> None:
        asked = [asyncio.create_task(answer.get()) for _ in range(5)]
        await asyncio.sleep(0.01)
        asked[0].cancel()  # it hung up
        maker.go.set()
        assert await asyncio.gather(*asked[1:]) == [b"1"] * 4
        assert await answer.get() == b"1"
        assert maker.begun == 1

    run(test)


@pytest.mark.usefixtures("_kept")
def test_a_change_ends_it() -> None:
    """Also of an answer that is being made: it may be of before."""

    async def test(maker: Maker, answer: Shared) -> None:
        before = asyncio.create_task(answer.get())
        await asyncio.sleep(0.01)
        answer.changed()
        after = asyncio.create_task(answer.get())
        await asyncio.sleep(0.01)
        maker.go.set()
        assert (await before, await after) == (b"1", b"2")
        assert await answer.get() == b"2"
        answer.changed()
        assert await answer.get() == b"3"
        assert await answer.get(fresh=True) == b"4"
        assert await answer.get() == b"4"

    run(test)


def test_it_is_forgotten_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted from the beginning, so also while it is still being made."""
    monkeypatch.setattr(shared, "KEPT", 0.01)

    async def test(maker: Maker, answer: Shared) -> None:
        slow = asyncio.create_task(answer.get())
        await asyncio.sleep(0)  # it begins first, so that it is forgotten first
        await asyncio.sleep(0.05)
        other = asyncio.create_task(answer.get())
        await asyncio.sleep(0.01)
        assert maker.begun == 2
        maker.go.set()
        assert (await slow, await other) == (b"1", b"2")
        await asyncio.sleep(0.05)
        assert answer._task is None, "its memory is given back without anybody asking"

    run(test)


def test_an_error_is_everybodys_and_not_kept() -> None:
    async def test(maker: Maker, answer: Shared) -> None:
        maker.error = ValueError("no")
        maker.go.set()
        asked = [asyncio.create_task(answer.get()) for _ in range(2)]
        assert [type(found) for found in await asyncio.gather(*asked, return_exceptions=True)] == [
            ValueError
        ] * 2
        maker.error = None
        assert await answer.get() == b"2"

    run(test)
