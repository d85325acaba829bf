"""Full log segments are given to the disk as they come (glidefs/writing/write_out.py)."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from volume_rig import MIB, Rig
from waiting import wait_for

from glidefs.core.write_out import write_out
from glidefs.volume.log_damage import segment_path
from glidefs.writing import write_out as module
from glidefs.writing.write_out import WriteOut


def test_each_full_segment_is(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Path] = []

    def note(path: Path) -> None:
        write_out(path)
        given.append(path)

    monkeypatch.setattr(module, "write_out", note)
    volume = rig.create(rig.host())
    while volume.core.info().sealed_seq < 4:
        volume.core.pwrite(0, os.urandom(MIB))
    sealed = volume.core.info().sealed_seq
    wait_for(lambda: segment_path(volume.log_dir, sealed) in given)
    assert len(given) == sealed


@pytest.mark.parametrize("what", ["nothing", "a FIFO", "a link", "a directory"])
def test_what_is_no_segment_is_passed_over(tmp_path: Path, what: str) -> None:
    volume = SimpleNamespace(log_dir=tmp_path)
    good, odd = segment_path(tmp_path, 2), segment_path(tmp_path, 1)
    good.write_bytes(b"data")
    if what == "a FIFO":
        os.mkfifo(odd)
    elif what == "a link":
        odd.symlink_to(good)
    elif what == "a directory":
        odd.mkdir()
    made = WriteOut(5)
    made.start()
    made.note(cast(Any, volume), 1)
    made.note(cast(Any, volume), 2)
    wait_for(made._sealed.empty)
    assert made._thread.is_alive()
    made.close()
    assert not made._thread.is_alive()
    if what != "a directory":
        with pytest.raises(OSError, match=str(odd)):
            write_out(odd)


def test_a_host_that_was_never_started_closes() -> None:
    WriteOut(5).close()
