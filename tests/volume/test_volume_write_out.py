"""Full log segments are given to the disk as they come (glidefs/writing/write_out.py)."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from volume_rig import MIB, Rig
from waiting import wait_for

from glidefs.core.write_out import write_out
from glidefs.volume.log_damage import segment_path
from glidefs.writing import throttle
from glidefs.writing import write_out as module
from glidefs.writing.write_out import WriteOut


def test_each_full_segment_is_once_logs_fill(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Path] = []

    def note(path: Path) -> None:
        write_out(path)
        given.append(path)

    monkeypatch.setattr(module, "write_out", note)
    host = rig.host()
    volume = rig.create(host)

    def fill(upto: int) -> int:
        while volume.core.info().sealed_seq < upto:
            volume.core.pwrite(0, os.urandom(MIB))
        return volume.core.info().sealed_seq

    fill(3)
    time.sleep(0.3)
    assert not given, "a short burst"
    monkeypatch.setattr(throttle, "FILLING", 0.0)
    wait_for(lambda: host._throttle.filling)
    sealed = fill(7)
    wait_for(lambda: segment_path(volume.log_dir, sealed) in given)
    assert given == [segment_path(volume.log_dir, seq) for seq in range(sealed - len(given) + 1, sealed + 1)]
    assert len(given) >= 3


def test_whoever_fills_segments_finds_the_next_one_made(rig: Rig) -> None:
    host = rig.host(engine={"log_limit": 256 * MIB})
    volume = rig.create(host)
    for number in range(4):
        volume.core.pwrite(0, os.urandom(MIB))
        while volume.core.info().sealed_seq <= number:
            volume.core.pwrite(0, os.urandom(MIB))
        wait_for(lambda: any(volume.log_dir.glob("*.spare")))
    volume.core.pwrite(0, bytes(4096))


def test_a_volume_that_is_gone_keeps_nobody_waiting(rig: Rig) -> None:
    volume = rig.create(rig.host())
    made = WriteOut(5, lambda: True)
    made.start()
    volume.close()
    made.note(volume, 1)
    wait_for(made._sealed.empty)
    made.close()


@pytest.mark.parametrize("what", ["nothing", "a FIFO", "a link", "a directory"])
def test_what_is_no_segment_is_passed_over(tmp_path: Path, what: str) -> None:
    volume = SimpleNamespace(name="vol", log_dir=tmp_path, core=SimpleNamespace(prepare=lambda: None))
    good, odd = segment_path(tmp_path, 2), segment_path(tmp_path, 1)
    good.write_bytes(b"data")
    if what == "a FIFO":
        os.mkfifo(odd)
    elif what == "a link":
        odd.symlink_to(good)
    elif what == "a directory":
        odd.mkdir()
    made = WriteOut(5, lambda: True)
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
    WriteOut(5, lambda: True).close()
