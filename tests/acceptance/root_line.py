"""The roots that a volume ever had, from a journal of the store: they must be one line."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from store_front import Exchange

from glidefs.formats.manifest import EMPTY_PAGE, PackRef, Root, decode_root


class Commit(NamedTuple):
    """A root that became visible."""

    exchange: Exchange
    root: Root


def line_of(exchanges: Sequence[Exchange], key: str) -> list[Exchange]:
    """The PUTs of roots under ``key`` that were done, each right after the one whose root it replaced.

    Fails where two replaced the same one, or one replaced what never was there. The order of the answers
    does not matter: ETags link the roots.
    """
    puts = [e for e in exchanges if e.request.puts_root and e.request.key == key and e.done]
    first = [e for e in puts if e.request.if_none_match]
    assert len(first) == 1, first
    after: dict[str, Exchange] = {}
    for exchange in puts:
        if not exchange.request.if_none_match:
            replaced = exchange.request.if_match
            assert replaced, "a root was put without a condition"
            assert replaced not in after, f"two roots replaced {replaced}: {after[replaced]}, {exchange}"
            after[replaced] = exchange
    line = [first[0]]
    while (following := after.pop(line[-1].etag, None)) is not None:
        line.append(following)
    assert not after, f"roots that replaced none of the line: {after}"
    return line


def check_line(exchanges: Sequence[Exchange], key: str) -> tuple[int, int]:
    """Each root derives from the one before, and names packs that were there.

    Returns how many roots and how many owners there were.
    """
    line = [Commit(exchange, decode_root(key, exchange.body)) for exchange in line_of(exchanges, key)]
    put = {e.request.key.rpartition("/")[2]: e.ended for e in exchanges if e.request.puts_pack and e.done}
    seen = {line[0].root.log_id}
    for (_, old), (exchange, new) in pairwise(line):
        assert new.sequence == old.sequence + 1, (old, new)
        assert (new.volume_id, new.name, new.size) == (old.volume_id, old.name, old.size)
        assert new.owner_node == exchange.request.front
        if new.log_id == old.log_id:
            assert (new.epoch, new.owner_node) == (old.epoch, old.owner_node)
            assert new.last_segment >= old.last_segment
        else:
            assert new.log_id not in seen, "an owner came back with its old log"
            seen.add(new.log_id)
            assert new.epoch == old.epoch + 1
            assert (new.last_segment, new.inline_page) == (0, old.inline_page), "a take-over changes no data"
        for pack in packs(new):
            assert put[pack.id.hex()] < exchange.request.began, "a root names a pack that was not there yet"
    return len(line), len(seen)


def packs(root: Root) -> tuple[PackRef, ...]:
    """The packs of a volume of one page."""
    assert root.page_ids == (b"",)
    return (root.inline_page or EMPTY_PAGE).packs
