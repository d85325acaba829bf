"""What a mutation is; see mutations.py."""

from __future__ import annotations

from typing import NamedTuple


class Mutation(NamedTuple):
    """``old`` occurs once in ``file``; with ``new`` in its place ``tests`` (pytest arguments) fail."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
