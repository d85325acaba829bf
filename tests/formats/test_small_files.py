"""Small files are read whole or refused, whatever has their name."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glidefs.errors import CorruptObject
from glidefs.formats.atomic import _PIECE, read_file

sys.path.insert(0, str(Path(__file__).parents[1]))
from mutate import fifo

LENGTHS = st.one_of(st.integers(0, 40), st.integers(-2, 2).map(lambda d: 2 * _PIECE + d), st.just(_PIECE))


@given(length=LENGTHS, most=LENGTHS)
def test_all_of_it_or_an_error(tmp_path_factory: pytest.TempPathFactory, length: int, most: int) -> None:
    path = tmp_path_factory.getbasetemp() / "small"
    data = os.urandom(length)
    path.write_bytes(data)
    if length > most:
        with pytest.raises(CorruptObject, match="too long"):
            read_file(path, most)
    else:
        assert read_file(path, most) == data


def test_a_terabyte_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "long"
    path.touch()
    os.truncate(path, 1 << 40)
    with pytest.raises(CorruptObject, match="too long"):
        read_file(path, 3 * _PIECE)


def test_nobody_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    path.touch()
    fifo(path)
    assert read_file(path, 10) == b""
    with pytest.raises(IsADirectoryError):
        read_file(tmp_path, 10)
