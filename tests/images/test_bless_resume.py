"""A bless that was interrupted: what the next one uses again, and what it must not."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from images_rig import (
    PREFIX,
    DyingStore,
    Killed,
    entries_of,
    noise,
    pages_of,
    pipe_of,
    read_back,
    root_of,
    text,
    write_image,
)

from glidefs import names
from glidefs.bless import pack_writer
from glidefs.bless.bless import BlessResult, bless
from glidefs.errors import ConfigError, CorruptObject
from glidefs.formats.blessing import decode_blessing
from glidefs.formats.pack import BLOCK, HEADER_SIZE

PACK = 4 * BLOCK
KEY = names.blessing_key(PREFIX, "b")


def image_of(path: Path, packs: int) -> bytes:
    """An image that makes this many packs of PACK bytes."""
    data = noise(9, packs * PACK)
    path.write_bytes(data)
    return data


def again(memory: DyingStore, source: Path | int, **options: object) -> tuple[BlessResult, int]:
    """Bless, and the packs that this put."""
    before = memory.pack_puts
    result = bless(memory, PREFIX, "b", source, pack_bytes=PACK, workers=2, **options)  # type: ignore[arg-type]
    return result, memory.pack_puts - before


def checkpointed(memory: DyingStore) -> list[bytes]:
    """The packs that the checkpoint names."""
    if not list(memory.list(KEY)):
        return []
    return [pack.ref.id for pack in decode_blessing(KEY, memory.get(KEY).data).packs]


def interrupted(memory: DyingStore, source: Path | int, packs: int) -> list[bytes]:
    """A bless that is killed when it has put some packs, and written a checkpoint. The packs of that."""
    before = len(checkpointed(memory))

    def wait_for_checkpoint(key: str) -> None:
        """One of the two threads that put waits for the other one, which a busy machine may have stopped."""
        if "/packs/" not in key or memory.pack_puts != packs - 2:
            return
        until = time.monotonic() + 20
        while len(checkpointed(memory)) <= before:
            assert time.monotonic() < until, "no checkpoint"
            time.sleep(0.001)

    memory.packs_to_live, memory.before_put = packs, wait_for_checkpoint
    with pytest.raises(Killed):
        bless(memory, PREFIX, "b", source, pack_bytes=PACK, workers=2)
    memory.packs_to_live, memory.before_put = None, lambda key: None
    assert not list(memory.list(names.base_manifest_key(PREFIX, "b")))
    return checkpointed(memory)


def unpublished(memory: DyingStore, source: Path) -> list[bytes]:
    """A bless that ends just before its manifest. Its packs, which the checkpoint has all of."""
    memory.no_manifest = True
    with pytest.raises(Killed):
        bless(memory, PREFIX, "b", source, pack_bytes=PACK, workers=2)
    memory.no_manifest = False
    return [pack.ref.id for pack in decode_blessing(KEY, memory.get(KEY).data).packs]


def stop_at(byte: int) -> object:
    def progress(done: int, total: int) -> None:
        if done >= byte:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("piped", [False, True])
def test_packs_of_a_killed_bless_are_not_put_again(tmp_path: Path, memory: DyingStore, piped: bool) -> None:
    data = image_of(tmp_path / "image", 30)
    known = interrupted(memory, tmp_path / "image", 20)
    # Every fourth pack writes a checkpoint, unless the last one is still being written.
    assert 4 <= len(known) <= 20
    if piped:
        with pipe_of(data) as fd:
            result, puts = again(memory, fd)
    else:
        result, puts = again(memory, tmp_path / "image")
    assert result.reused_packs == len(known)
    assert puts == 30 - len(known)
    assert result.packs == 30
    assert [ref.id for ref in pages_of(memory, root_of(memory, "b"))[0].packs][: len(known)] == known
    assert read_back(memory, "b", tmp_path) == data
    assert not list(memory.list(KEY))


def test_ctrl_c_keeps_everything_that_was_put(tmp_path: Path, memory: DyingStore) -> None:
    image_of(tmp_path / "image", 60)
    with pytest.raises(KeyboardInterrupt):
        again(memory, tmp_path / "image", progress=stop_at(50 * PACK))
    put = memory.pack_puts
    assert put >= 10
    assert len(decode_blessing(KEY, memory.get(KEY).data).packs) == put
    result, puts = again(memory, tmp_path / "image")
    assert (result.reused_packs, puts) == (put, 60 - put)


def test_an_interrupted_resume_loses_nothing(tmp_path: Path, memory: DyingStore) -> None:
    image_of(tmp_path / "image", 60)
    assert len(unpublished(memory, tmp_path / "image")) == 60
    with pytest.raises(KeyboardInterrupt):
        again(memory, tmp_path / "image", progress=stop_at(56 * PACK))
    result, puts = again(memory, tmp_path / "image")
    assert (result.reused_packs, puts) == (60, 0)


def test_every_interruption_makes_progress(tmp_path: Path, memory: DyingStore) -> None:
    data = image_of(tmp_path / "image", 60)
    known = 0
    for packs in (15, 30, 45):
        found = len(interrupted(memory, tmp_path / "image", packs))
        assert found > known
        known = found
    again(memory, tmp_path / "image")
    assert memory.pack_puts < 45 + 60
    assert read_back(memory, "b", tmp_path) == data


def test_without_resume_all_is_put(tmp_path: Path, memory: DyingStore) -> None:
    image_of(tmp_path / "image", 20)
    assert unpublished(memory, tmp_path / "image")
    result, puts = again(memory, tmp_path / "image", resume=False)
    assert (result.reused_packs, puts) == (0, 20)


CHANGES = {
    "the first block": {0: b"!"},
    "a block within a pack": {5 * PACK + 2 * BLOCK: b"!"},
    "the first block of a pack": {5 * PACK: b"!"},
    "a block becomes zeros": {5 * PACK + 2 * BLOCK: bytes(BLOCK)},
    "a pack becomes zeros": {5 * PACK: bytes(PACK)},
    "a block behind the packs": {19 * PACK: b"!"},
}


@pytest.mark.parametrize("piped", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_published_is_what_was_read(
    tmp_path: Path, memory: DyingStore, change: str, piped: bool
) -> None:
    path = tmp_path / "image"
    image_of(path, 20)
    assert len(unpublished(memory, path)) == 20
    with path.open("r+b") as file:
        for offset, data in CHANGES[change].items():
            file.seek(offset)
            file.write(data)
    data = path.read_bytes()
    with pipe_of(data) as fd:
        result, puts = again(memory, fd if piped else path)
    first = min(CHANGES[change]) // PACK
    assert result.reused_packs == first
    assert puts == result.packs - first <= 20 - first + 1
    assert read_back(memory, "b", tmp_path) == data
    blocks = [entry.block for pack in entries_of(memory, "b") for entry in pack]
    assert blocks == sorted(set(blocks))  # each block is in one pack


def test_an_image_that_became_shorter(tmp_path: Path, memory: DyingStore) -> None:
    path = tmp_path / "image"
    data = image_of(path, 20)[: 5 * PACK + BLOCK]
    assert unpublished(memory, path)
    path.write_bytes(data)
    result, puts = again(memory, path)
    assert (result.reused_packs, puts, result.packs) == (5, 1, 6)
    assert read_back(memory, "b", tmp_path) == data


def test_an_image_with_holes(tmp_path: Path, memory: DyingStore) -> None:
    parts = {i * 7 * BLOCK: noise(i, 2 * BLOCK) for i in range(60)}
    path = write_image(tmp_path / "image", 1000 * BLOCK, parts)
    known = unpublished(memory, path)
    result, _ = again(memory, path)
    assert result.reused_packs == len(known) > 0
    assert read_back(memory, "b", tmp_path) == path.read_bytes()


def test_another_pack_size(tmp_path: Path, memory: DyingStore) -> None:
    path = tmp_path / "image"
    data = bytearray(image_of(path, 20))
    known = unpublished(memory, path)
    data[5 * PACK + 3 * BLOCK] ^= 1
    path.write_bytes(data)
    assert len(known) == 20
    result = bless(memory, PREFIX, "b", path, pack_bytes=2 * BLOCK)
    assert result.reused_packs == 5
    assert read_back(memory, "b", tmp_path) == data


def test_old_packs_are_not_used(tmp_path: Path, memory: DyingStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The collector may be about to delete what no manifest has named for so long."""
    data = image_of(tmp_path / "image", 20)
    long_ago = time.time() - 13 * 3600
    with monkeypatch.context() as patch:
        patch.setattr(pack_writer.time, "time", lambda: long_ago)
        assert unpublished(memory, tmp_path / "image")
    result, puts = again(memory, tmp_path / "image")
    assert (result.reused_packs, puts) == (0, 20)
    assert read_back(memory, "b", tmp_path) == data


def test_a_pack_that_grew_old_meanwhile_is_put_again(
    tmp_path: Path, memory: DyingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = image_of(tmp_path / "image", 8)
    real = time.time

    def slow(key: str) -> None:
        if memory.pack_puts == 4:  # half a day passes
            monkeypatch.setattr(time, "time", lambda: real() + 13 * 3600)

    memory.before_put = slow
    again(memory, tmp_path / "image")
    put = [key.rsplit("/", 1)[1] for key in memory.keys if "/packs/" in key]
    named = [ref.id.hex() for ref in pages_of(memory, root_of(memory, "b"))[0].packs]
    assert len(put) > 8
    assert not set(named) & set(put[:3])
    assert read_back(memory, "b", tmp_path) == data


def test_a_pack_that_is_gone_or_damaged(tmp_path: Path, memory: DyingStore) -> None:
    data = image_of(tmp_path / "image", 20)
    known = unpublished(memory, tmp_path / "image")
    memory.delete(names.pack_key(PREFIX, known[3].hex()))
    assert again(memory, tmp_path / "image")[0].reused_packs == 3
    assert read_back(memory, "b", tmp_path) == data


def test_damage_is_not_carried_on(tmp_path: Path, memory: DyingStore) -> None:
    data = bytearray(image_of(tmp_path / "image", 20))
    known = unpublished(memory, tmp_path / "image")
    key = names.pack_key(PREFIX, known[3].hex())
    body = bytearray(memory.get(key).data)
    body[HEADER_SIZE + 100] ^= 1
    memory.put(key, bytes(body))
    data[3 * PACK + 2 * BLOCK] ^= 1
    (tmp_path / "image").write_bytes(data)
    with pytest.raises(CorruptObject):
        again(memory, tmp_path / "image")
    # The checkpoint does not name it any more.
    assert again(memory, tmp_path / "image")[0].reused_packs == 3
    assert read_back(memory, "b", tmp_path) == data


def test_a_checkpoint_that_cannot_be_read_is_none(tmp_path: Path, memory: DyingStore) -> None:
    data = image_of(tmp_path / "image", 8)
    memory.put(KEY, b"GLBL nonsense")
    assert again(memory, tmp_path / "image")[0].reused_packs == 0
    assert read_back(memory, "b", tmp_path) == data


def test_a_refused_image_leaves_its_packs_to_the_next(tmp_path: Path, memory: DyingStore) -> None:
    path = tmp_path / "image"
    image_of(path, 20)
    with pytest.raises(ConfigError, match="changed"):
        again(memory, path, progress=lambda done, total: path.touch())
    assert again(memory, path)[0].reused_packs >= 15


@settings(max_examples=40, deadline=None)
@given(
    before=st.lists(st.integers(0, 3), min_size=20, max_size=60),
    edits=st.lists(st.tuples(st.integers(0, 59), st.integers(0, 3)), max_size=3),
    length=st.integers(10, 60),
    stop=st.integers(1, 20),
)
def test_any_image_over_any_checkpoint(
    before: list[int], edits: list[tuple[int, int]], length: int, stop: int
) -> None:
    """Blocks are 0 or one of three contents, so that images share many of them."""
    import tempfile

    def build(kinds: list[int]) -> bytes:
        return b"".join(
            bytes(BLOCK) if kind == 0 else (text(kind) if kind == 1 else noise(kind)) for kind in kinds
        )

    after = before[:length]
    for where, kind in edits:
        if where < len(after):
            after[where] = kind
    memory = DyingStore()
    with tempfile.TemporaryDirectory() as directory:
        with pipe_of(build(before)) as fd:
            try:
                bless(memory, PREFIX, "b", fd, pack_bytes=PACK, progress=stop_at(stop * 2 * BLOCK))  # type: ignore[arg-type]
            except KeyboardInterrupt:
                with pipe_of(build(after)) as second:
                    again(memory, second)
                before = after
        assert read_back(memory, "b", Path(directory)) == build(before)
