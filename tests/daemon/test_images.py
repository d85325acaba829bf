"""Offline export and inspect, on a store that is filled by formats alone."""

from __future__ import annotations

import random
import secrets
from pathlib import Path

import pytest
from blake3 import blake3
from stored_roots import put_root

from glidefs import names
from glidefs.errors import ConfigError, CorruptObject, UnknownExport
from glidefs.formats import export_record
from glidefs.formats.manifest import PAGE_BYTES, PackRef, Page, Root, encode_page, page_id
from glidefs.formats.pack import (
    BLOCK,
    CHUNK,
    FULL_MASK,
    HEADER_SIZE,
    SECTOR,
    PackEntry,
    encode_header,
    encode_index,
    encode_payload,
    encode_trailer,
    index_length,
    pack_id,
    payload_hash,
)
from glidefs.names import parse_source
from glidefs.offline import export
from glidefs.offline.export import export_image
from glidefs.offline.inspect import inspect, open_source
from glidefs.store.memory import MemoryStore

VOLUME = bytes(range(16))


class Writer:
    """Builds a volume in a store, layer by layer, and the bytes that it must read as."""

    def __init__(self, store: MemoryStore, size: int) -> None:
        self.store = store
        self.model: dict[int, bytearray] = {}
        self.size = size
        self.packs: list[PackRef] = []
        self.chunks: dict[int, list[int]] = {}

    def layer(self, blocks: dict[int, tuple[int, int]], rng: random.Random) -> None:
        """One pack: for each block its sector mask and zero mask."""
        body = bytearray(encode_header())
        entries = []
        for block, (mask, zero) in blocks.items():
            model = self.model.setdefault(block, bytearray(BLOCK))
            plain = bytearray()
            for sector in range(32):
                where = slice(sector * SECTOR, (sector + 1) * SECTOR)
                if mask >> sector & 1:
                    data = (
                        rng.randbytes(SECTOR) if rng.random() < 0.5 else bytes([rng.randrange(256)]) * SECTOR
                    )
                    model[where] = data
                    plain += data
                elif zero >> sector & 1:
                    model[where] = bytes(SECTOR)
            stored = encode_payload(bytes(plain)) if plain else b""
            offset = len(body) if plain else 0
            entries.append(PackEntry(block, mask, zero, offset, len(stored), payload_hash(bytes(plain))))
            body += stored
        index = encode_index(entries)
        nonce = secrets.token_bytes(16)
        data = bytes(body) + index + encode_trailer(index, len(entries), VOLUME, nonce)
        new = pack_id(payload_hash(index), VOLUME, nonce)
        self.store.put(names.pack_key("default", new.hex()), data)
        self.packs.append(PackRef(id=new, size=len(data), index_length=index_length(index)))
        for chunk in {block // 1024 for block in blocks}:
            self.chunks.setdefault(chunk, []).append(len(self.packs) - 1)

    def root(self, inline: bool = True) -> Root:
        page = Page(tuple(self.packs), {c: tuple(p) for c, p in self.chunks.items()})
        ids: tuple[bytes, ...] = (b"",) * -(-self.size // PAGE_BYTES)
        if not inline:
            data = encode_page(page, VOLUME, secrets.token_bytes(16))
            new = page_id(data)
            self.store.put(names.page_key("default", new.hex()), data)
            ids = (new, *ids[1:])
        return Root(
            volume_id=VOLUME, name="vol", size=self.size, page_ids=ids, inline_page=page if inline else None
        )

    def commit(self, inline: bool = True) -> None:
        put_root(self.store, names.manifest_key("default", "vol"), self.root(inline))

    def check(self, image: Path) -> None:
        assert image.stat().st_size == self.size
        with image.open("rb") as file:
            for block, data in self.model.items():
                file.seek(block * BLOCK)
                want = bytes(data[: max(0, self.size - block * BLOCK)])
                assert file.read(BLOCK)[: len(want)] == want, f"block {block}"


def masks(rng: random.Random) -> tuple[int, int]:
    if rng.random() < 0.3:
        return FULL_MASK, 0
    mask = rng.getrandbits(32) & rng.getrandbits(32)
    zero = rng.getrandbits(32) & ~mask & FULL_MASK
    return (mask, zero) if mask | zero else (1, 0)


@pytest.mark.parametrize("seed", range(8))
def test_layers_read_as_the_newest_of_each_sector(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    store = MemoryStore()
    size = 2 * CHUNK + 5 * SECTOR
    writer = Writer(store, size)
    blocks = [*range(20), 63, 64, 65, 1023, 1024, 1030, 2047, 2048]
    for _ in range(5):
        writer.layer({block: masks(rng) for block in rng.sample(blocks, 15)}, rng)
    writer.commit(inline=bool(seed % 2))
    done: list[tuple[int, int]] = []
    result = export_image(
        store, "default", "vol", tmp_path / "image", progress=lambda a, b: done.append((a, b))
    )
    writer.check(tmp_path / "image")
    assert result.size == size
    assert done[-1][0] == done[-1][1] > 0
    # Unwritten blocks are holes.
    assert (tmp_path / "image").stat().st_blocks * 512 <= result.data_bytes + (1 << 20)


def test_empty_volume_of_a_terabyte_takes_no_space(tmp_path: Path) -> None:
    store = MemoryStore()
    Writer(store, 1 << 40).commit(inline=False)
    export_image(store, "default", "vol", tmp_path / "image")
    assert (tmp_path / "image").stat().st_size == 1 << 40
    assert (tmp_path / "image").stat().st_blocks == 0


def test_a_bad_payload_is_named_and_leaves_no_image(tmp_path: Path) -> None:
    store = MemoryStore()
    writer = Writer(store, CHUNK)
    writer.layer({3: (FULL_MASK, 0)}, random.Random(1))
    writer.commit()
    key = names.pack_key("default", writer.packs[0].id.hex())
    data = bytearray(store.get(key).data)
    data[HEADER_SIZE + 100] ^= 1
    store.put(key, bytes(data))
    with pytest.raises(CorruptObject) as caught:
        export_image(store, "default", "vol", tmp_path / "image")
    assert caught.value.key == key
    assert list(tmp_path.iterdir()) == []


def test_targets(tmp_path: Path) -> None:
    store = MemoryStore()
    Writer(store, CHUNK).commit()
    image = tmp_path / "image"
    image.write_bytes(b"precious")
    with pytest.raises(ConfigError, match="--force"):
        export_image(store, "default", "vol", image)
    assert image.read_bytes() == b"precious"
    with pytest.raises(UnknownExport):
        export_image(store, "default", "absent", image, force=True)
    assert image.read_bytes() == b"precious"
    with pytest.raises(ConfigError, match="not a regular file"):
        export_image(store, "default", "vol", Path("/dev/null"), force=True)
    export_image(store, "default", "vol", image, force=True)
    assert image.stat().st_size == CHUNK


def test_sources() -> None:
    assert parse_source("vol").key("p") == "p/volumes/vol/manifest"
    assert parse_source("volume:vol").key("p") == "p/volumes/vol/manifest"
    assert parse_source("vol@7").key("p").endswith("/00000000000000000007")
    assert parse_source("base:b").key("p") == "p/bases/b/manifest"
    assert parse_source("tag:t").key("p") == "p/tags/t"
    for bad in ("vol@", "vol@x", "vol@-1", "disk:x", "vol@" + "9" * 30):
        with pytest.raises(ConfigError):
            parse_source(bad).key("p")
    for bad in ("../x", "", "a/b", "base:../x"):
        with pytest.raises(Exception, match="invalid"):
            parse_source(bad).key("p")


def test_inspect_knows_our_objects(tmp_path: Path) -> None:
    store = MemoryStore()
    writer = Writer(store, CHUNK)
    writer.layer({3: (FULL_MASK, 0), 4: (1, 2)}, random.Random(1))
    writer.commit(inline=False)
    root = inspect(open_source(store, names.manifest_key("default", "vol")))
    assert (root["kind"], root["size"], root["volume_id"]) == ("manifest root", CHUNK, VOLUME.hex())
    page = inspect(open_source(store, names.page_key("default", root["page_ids"][0])))
    assert (page["kind"], page["pack_count"]) == ("manifest page", 1)
    pack = inspect(open_source(store, names.pack_key("default", page["packs"][0]["id"])))
    assert (pack["kind"], pack["entries"], pack["whole_blocks"]) == ("pack", 2, 1)
    assert [entry["block"] for entry in pack["blocks"]] == [3, 4]
    path = tmp_path / "vol.json"
    record = export_record.ExportRecord(
        name="vol",
        volume_id=VOLUME,
        log_id=VOLUME,
        prefix="default",
        manifest_hash=blake3(b"").digest(),
        size=CHUNK,
    )
    export_record.save(path, record)
    assert inspect(open_source(None, str(path)))["kind"] == "export record"


def test_inspect_refuses_what_is_not_ours(tmp_path: Path) -> None:
    for number, data in enumerate((b"", b"x", b"GLPK", b"GLMR" + bytes(100), b"{", b"\x7fELF" + bytes(50))):
        path = tmp_path / str(number)
        path.write_bytes(data)
        with pytest.raises((CorruptObject, ConfigError)):
            inspect(open_source(None, str(path)))
    with pytest.raises(ConfigError, match="--store"):
        open_source(None, str(tmp_path / "absent"))


def test_memory_is_bounded_by_windows() -> None:
    assert export.WINDOW_BLOCKS * BLOCK * export.WORKERS <= 64 << 20
