"""Shadow verify over the whole way to the store and back: no false alarm, and each planted fault is named."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from open_files import open_below
from volume_rig import BLOCK, MIB, PREFIX, Rig, record_of
from waiting import wait_for

from glidefs.compaction import merge as merge_module
from glidefs.core import payloads
from glidefs.core.check import Closed
from glidefs.core.figures import VolumeStats
from glidefs.core.testing import forget_sector
from glidefs.host.host import Host
from glidefs.manifest import lease
from glidefs.reading import plan as blocks_module
from glidefs.store.memory import MemoryStore
from glidefs.volume.volume import Volume

SECTOR = 4096
SMALL = 48 * BLOCK


@pytest.fixture
def host(rig: Rig, tmp_path: Path) -> Host:
    return rig.host(shadow_dir=tmp_path / "shadow")


def text_of(seed: int, length: int = BLOCK) -> bytes:
    return random.Random(seed).randbytes(length)


def second_source(host: Host) -> Path:
    """The file of the one volume that is compared."""
    assert host.settings.shadow_dir is not None
    return open_below(os.getpid(), host.settings.shadow_dir)


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x40]))


def forget_everything_local(host: Host, volume: Volume) -> None:
    volume.retire_committed()
    host.engine.cache.evict_all()


def one_line(rig: Rig) -> str:
    wait_for(lambda: rig.differences.lines, "a difference is logged")
    (line,) = rig.differences.lines
    return line


def pack_ids(volume: Volume) -> list[str]:
    page = volume.root.inline_page
    assert page is not None
    return [pack.id.hex() for pack in page.packs]


def reopen(rig: Rig, host: Host, volume: Volume) -> Volume:
    volume.close()
    return rig.reopen(host, volume.root)


# -- what is right is not called wrong ------------------------------------------------------------


def test_off_by_default(rig: Rig, tmp_path: Path) -> None:
    host = rig.host(shadow_dir=None)
    volume = rig.create(host)
    volume.core.pwrite(0, text_of(1))
    assert volume.core.pread(0, BLOCK) == text_of(1)
    assert volume.core.stats().shadow_compared == 0
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("glide-shadow")]


def test_a_volume_that_is_opened_with_a_log_and_a_store(rig: Rig, host: Host) -> None:
    volume = rig.create(host, SMALL)
    volume.core.pwrite(0, text_of(1, 4 * BLOCK))
    volume.drain(20)
    volume.core.pwrite(BLOCK + SECTOR, text_of(2, SECTOR))
    volume.core.zero(2 * BLOCK, BLOCK)
    want = volume.core.pread(0, SMALL)
    volume = reopen(rig, host, volume)
    assert volume.core.pread(0, SMALL) == want
    volume.core.pwrite(3 * BLOCK + 512, b"u" * 512)
    assert volume.core.pread(0, SMALL) == want[: 3 * BLOCK + 512] + b"u" * 512 + want[3 * BLOCK + 1024 :]
    stats = volume.core.stats()
    assert stats.shadow_compared == 2 * SMALL // SECTOR + 1
    assert (stats.shadow_differences, stats.shadow_changed, stats.shadow_absent) == (0, 0, 0)


def test_a_view_is_compared_too(rig: Rig, host: Host) -> None:
    volume = rig.create(host, SMALL)
    volume.core.pwrite(0, text_of(1, 4 * BLOCK))
    volume.drain(20)
    other = rig.host("b", shadow_dir=rig.tmp / "shadow-b")
    root, _ = lease.read_root(other.store, PREFIX, volume.name)
    view = other.open(record_of(root, read_only=True), root, None)
    assert view.core.pread(0, 4 * BLOCK) == text_of(1, 4 * BLOCK)
    stats = view.core.stats()
    assert (stats.shadow_compared, stats.shadow_differences) == (4 * 32, 0)


def test_what_the_store_cannot_give_is_let_go(rig: Rig, host: Host, memory: MemoryStore) -> None:
    """An outage, and packs that gc deleted since the open."""
    volume = rig.create(host, SMALL)
    for i in range(6):
        volume.core.pwrite(i * SECTOR, text_of(i, SECTOR))
        volume.drain(20)
    volume.core.pwrite(BLOCK, text_of(9))
    volume.drain(20)
    forget_everything_local(host, volume)
    want = volume.core.pread(0, 2 * BLOCK)  # both are in the block cache now
    volume = reopen(rig, host, volume)
    memory.set_down(True)
    before = time.monotonic()
    assert volume.core.pread(BLOCK, BLOCK) == want[BLOCK:]
    assert volume.core.pread(0, SECTOR) == want[:SECTOR]
    assert time.monotonic() - before < 20
    memory.set_down(False)
    assert host.store.answers()
    assert volume.core.stats().shadow_absent == 33
    assert host._shadow is not None
    host._shadow._away_until = 0.0
    old = set(rig.packs())
    assert host.compactor.compact(volume, settle=True)
    for key in old:
        memory.delete(key)
    assert volume.core.pread(0, 6 * SECTOR) == want[: 6 * SECTOR]
    stats = volume.core.stats()
    assert (stats.shadow_differences, stats.shadow_absent) == (0, 33 + 6)


class Load:
    """Clients that read and write one volume at random until they are stopped, also while it is replaced."""

    def __init__(self, volume: Volume, size: int) -> None:
        self.volume = volume
        self.size = size
        self.seen = dict.fromkeys(VolumeStats.__struct_fields__[-4:], 0)
        self._stop = threading.Event()
        self._errors: list[BaseException] = []
        self._threads = [threading.Thread(target=self._guard, args=(seed,)) for seed in range(4)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        assert self._errors == []

    def replace(self, change: Callable[[Volume], Volume]) -> None:
        """Close the volume in the middle of its load, and go on with another opening of it."""
        old = self.volume
        self.volume = change(old)

    def count(self, volume: Volume) -> None:
        stats = volume.core.stats()
        for name in self.seen:
            self.seen[name] += getattr(stats, name)

    def _guard(self, seed: int) -> None:
        try:
            rng = random.Random(seed)
            while not self._stop.is_set():
                with suppress(Closed):
                    self._one(rng)
        except BaseException as error:
            self._errors.append(error)

    def _one(self, rng: random.Random) -> None:
        core, what = self.volume.core, rng.random()
        unit = 512 if rng.random() < 0.3 else SECTOR
        at = rng.choice([0, 20 * BLOCK]) + rng.randrange(0, 8 * BLOCK, unit)
        length = rng.randrange(unit, BLOCK, unit)
        if what < 0.6:
            core.pread(at, length)
        elif what < 0.88:
            core.pwrite(at, rng.randbytes(length), fua=rng.random() < 0.1)
        elif what < 0.96:
            core.zero(at, length)
        else:
            core.flush()


def test_no_false_alarm_under_everything_at_once(rig: Rig, tmp_path: Path) -> None:
    """Uploads, retire, compaction, evictions, resizes, restarts and moves to another host, under load."""
    small: dict[str, Any] = {
        "engine": {"segment_bytes": 16 * SECTOR, "log_limit": 4 * MIB, "cache_bytes": 12 * BLOCK},
        "pack_bytes": 256 << 10,
        "sync_interval": 0.02,
        "poll_interval": 0.1,
        "compaction": True,
        "compact_width": 4,
        "settle_idle": 0.05,
        "settle_width": 1,
    }
    hosts = [rig.host(name, shadow_dir=tmp_path / f"shadow-{name}", **small) for name in "ab"]
    host = hosts[0]
    volume = rig.create(host, SMALL)
    rng = random.Random(7)

    def restart(old: Volume) -> Volume:
        load.count(old)
        return reopen(rig, host, old)

    def move(old: Volume) -> Volume:
        """Detach and attach: the log goes to the store first."""
        load.count(old)
        old.close()
        again = rig.reopen(host, old.root)
        again.drain(60)
        load.count(again)
        again.close()
        assert again.etag is not None
        lease.detach(host.store, PREFIX, again.root, again.etag)
        return rig.attach(hosts[1 - hosts.index(host)], again.name)

    with Load(volume, SMALL) as load:
        for _ in range(12):
            for _ in range(10):
                time.sleep(0.05)
                size = rng.choice([SMALL, 30 * BLOCK, 40 * BLOCK + SECTOR])
                load.volume.resize(size)
                host.retire_committed()
                host.engine.cache.evict_all()
            if rng.random() < 0.5:
                load.replace(restart)
            else:
                load.replace(move)
                host = hosts[1 - hosts.index(host)]
    load.volume.core.pread(0, 30 * BLOCK)
    load.count(load.volume)
    assert rig.differences.lines == []
    assert load.seen["shadow_differences"] == 0
    assert load.seen["shadow_compared"] > 20000
    assert load.seen["shadow_absent"] == 0
    assert load.seen["shadow_changed"] < load.seen["shadow_compared"] / 4


# -- what is wrong is found, and where it comes from ------------------------------------------------


def test_a_difference_from_the_log_is_named(rig: Rig, host: Host) -> None:
    volume = rig.create(host, SMALL)
    volume.core.pwrite(0, text_of(1, 2 * SECTOR))
    volume.core.pwrite(5 * BLOCK + SECTOR, text_of(2, 3 * SECTOR))
    flip(second_source(host), 162 * SECTOR + 77)
    volume.core.pread(5 * BLOCK, 8 * SECTOR)
    line = one_line(rig)
    assert f"volume {volume.name}: " in line
    assert "block 5, sector 2 of it (sector 162 of the volume)" in line
    assert f"first at byte 77 of the sector (offset {162 * SECTOR + 77})" in line
    got = text_of(2, 3 * SECTOR)[SECTOR + 77 : SECTOR + 93]
    assert f"expected {bytes([got[0] ^ 0x40]).hex()}{got[1:].hex()}" in line
    assert "log segment 1 (0000000000000001.seg), position 3, record 2 of sectors 161+3: " in line
    assert "it is intact, so the log map names an old record, or this was written wrong" in line


def test_a_difference_from_the_block_cache_is_named(rig: Rig, host: Host) -> None:
    volume = rig.create(host, SMALL)
    volume.core.pwrite(5 * BLOCK, text_of(3))
    volume.drain(20)
    forget_everything_local(host, volume)
    assert volume.core.pread(5 * BLOCK, BLOCK) == text_of(3)
    assert rig.differences.lines == []
    path = host.engine.config.cache_dir / "blocks.data"
    slot = path.read_bytes().index(text_of(3)) // BLOCK
    flip(second_source(host), 5 * BLOCK + 3 * SECTOR + 5)
    volume.core.pread(5 * BLOCK, BLOCK)
    line = one_line(rig)
    assert "block 5, sector 3 of it" in line
    assert "first at byte 5 of the sector" in line
    assert f"block cache slot {slot} " in line
    assert "its content is that of its hash" in line
    assert "the store holds the bytes that were read" in line
    assert f"newest first: {pack_ids(volume)[0]} (has the sector)" in line


def corrupting(overlay: Callable[..., None]) -> Callable[..., None]:
    """An overlay that gets the first byte of the last sector that it lays wrong."""

    def wrong(block: bytearray, mask: int, zero_mask: int, sectors: Any) -> None:
        overlay(block, mask, zero_mask, sectors)
        if mask:
            block[(mask.bit_length() - 1) * SECTOR] ^= 1

    return wrong


def write_parts(volume: Volume) -> None:
    for i in range(6):
        volume.core.pwrite(7 * BLOCK + i * SECTOR, text_of(i, SECTOR))
        volume.drain(20)


def test_a_wrong_merge_of_compaction_is_named(
    rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store as it was when the volume was opened is the witness."""
    host = rig.host(shadow_dir=tmp_path / "shadow", settle_width=1)
    volume = rig.create(host, SMALL)
    write_parts(volume)
    volume = reopen(rig, host, volume)
    before = pack_ids(volume)
    monkeypatch.setattr(merge_module, "overlay", corrupting(payloads.overlay))
    assert host.compactor.compact(volume, settle=True)
    monkeypatch.undo()
    (merged,) = pack_ids(volume)
    assert merged not in before
    forget_everything_local(host, volume)
    volume.core.pread(7 * BLOCK + 2 * SECTOR, SECTOR)
    line = one_line(rig)
    assert "block 7, sector 2 of it" in line
    assert "first at byte 0 of the sector" in line
    assert "its content is that of its hash, and it is the one of the manifest in use" in line
    assert "the store holds the bytes that were read" in line
    assert f"newest first: {merged} (has the sector)" in line
    assert all(name not in line for name in before)


def test_a_wrong_merge_of_a_read_is_named(rig: Rig, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    volume = rig.create(host, SMALL)
    write_parts(volume)
    forget_everything_local(host, volume)
    monkeypatch.setattr(blocks_module.core, "overlay", corrupting(payloads.overlay))
    volume.core.pread(7 * BLOCK + 4 * SECTOR, SECTOR)
    monkeypatch.undo()
    line = one_line(rig)
    assert "block 7, sector 4 of it" in line
    assert "its content is that of its hash, and it is the one of the manifest in use" in line
    assert "the store holds the expected bytes" in line
    newest_first = pack_ids(volume)[::-1]
    assert f"newest first: {newest_first[0]} (others only), {newest_first[1]} (has the sector)" in line


def test_a_position_that_the_log_map_lost_is_named(rig: Rig, host: Host) -> None:
    volume = rig.create(host, SMALL)
    volume.core.pwrite(0, text_of(1))
    volume.drain(20)
    volume.retire_committed()
    volume.core.pwrite(3 * SECTOR, text_of(2, SECTOR))
    forget_sector(volume.core, 3)
    volume.core.pread(0, BLOCK)
    line = one_line(rig)
    assert "block 0, sector 3 of it" in line
    assert "the store holds the bytes that were read" in line
    assert "segments 2 to 2 of the log have the sector, but the log map did not" in line


def test_an_old_record_that_the_log_map_names_is_told_from_damage(rig: Rig, host: Host) -> None:
    """What was appended is not what the guest sent."""
    volume = rig.create(host, SMALL)
    volume.core.pwrite(0, text_of(1))
    flip(second_source(host), 3)
    volume.core.pwrite(512, b"u" * 512)  # merges what is wrong, which is then hashed as it is
    wait_for(lambda: rig.differences.lines, "its own read was compared")
    volume.core.pread(0, SECTOR)
    wait_for(lambda: len(rig.differences.lines) == 2, "told")
    assert "position 32, record 32 of sectors 0+1: it is intact" in rig.differences.lines[1]


def test_a_second_source_that_cannot_be_made_is_said(
    rig: Rig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    host = rig.host(shadow_dir=tmp_path / "shadow")
    (tmp_path / "shadow").rmdir()
    volume = rig.create(host, SMALL)
    volume.core.pwrite(0, text_of(1))
    assert volume.core.pread(0, BLOCK) == text_of(1)
    assert volume.core.stats().shadow_compared == 0
    assert f"volume {volume.name}: its reads are not compared" in caplog.text
