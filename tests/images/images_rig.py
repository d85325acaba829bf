"""Images, stores that die, and what is in a base."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from glidefs import names
from glidefs.bases.stored import load_base
from glidefs.formats.manifest import EMPTY_PAGE, Page, Root, decode_page
from glidefs.formats.pack import BLOCK, PackEntry, decode_index
from glidefs.offline.export import export_image
from glidefs.store.base import Body, ObjectStore
from glidefs.store.memory import MemoryStore

PREFIX = "default"


def noise(seed: int, size: int = BLOCK) -> bytes:
    """Bytes that do not compress, the same for the same seed."""
    return random.Random(seed).randbytes(size)


def text(seed: int, size: int = BLOCK) -> bytes:
    """Bytes that compress well."""
    return (f"line {seed} of some file\n" * (size // 16 + 1)).encode()[:size]


def write_image(path: Path, size: int, parts: Mapping[int, bytes]) -> Path:
    """A sparse file with data at these offsets."""
    with path.open("wb") as file:
        file.truncate(size)
        for offset, data in parts.items():
            file.seek(offset)
            file.write(data)
    return path


@contextmanager
def pipe_of(data: bytes, piece: int = 100_003) -> Iterator[int]:
    """The reading end of a pipe into which a thread writes."""
    reading, writing = os.pipe()

    def feed() -> None:
        try:
            for at in range(0, len(data), piece):
                os.write(writing, data[at : at + piece])
        except BrokenPipeError:
            pass
        finally:
            os.close(writing)

    thread = threading.Thread(target=feed)
    thread.start()
    try:
        yield reading
    finally:
        os.close(reading)
        thread.join()


class Killed(Exception):
    """The end of the process, as far as the code under test can tell."""


class DyingStore(MemoryStore):
    """Notes what is put; can refuse every put after a number of packs, or the manifest."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: list[str] = []
        self.packs_to_live: int | None = None
        self.no_manifest = False
        self.before_put: Callable[[str], None] = lambda key: None

    @property
    def pack_puts(self) -> int:
        return sum("/packs/" in key for key in self.keys)

    def put(self, key: str, data: Body, *, if_match: str | None = None, if_none_match: bool = False) -> str:
        if self.packs_to_live is not None and self.pack_puts >= self.packs_to_live:
            raise Killed
        if self.no_manifest and key.endswith("/manifest"):
            raise Killed
        self.keys.append(key)
        self.before_put(key)
        return super().put(key, data, if_match=if_match, if_none_match=if_none_match)


def root_of(store: ObjectStore, base: str) -> Root:
    return load_base(store, PREFIX, base).root


def pages_of(store: ObjectStore, root: Root) -> list[Page]:
    if root.inline_page is not None:
        return [root.inline_page]
    keys = [names.page_key(PREFIX, page.hex()) if page else "" for page in root.page_ids]
    pages = zip(keys, root.page_ids, strict=True)
    return [decode_page(key, store.get(key).data, id_) if key else EMPTY_PAGE for key, id_ in pages]


def entries_of(store: ObjectStore, base: str) -> list[list[PackEntry]]:
    """The index entries of a base's packs, pack by pack in the order of the manifest."""
    found = []
    for page in pages_of(store, root_of(store, base)):
        for ref in page.packs:
            key = names.pack_key(PREFIX, ref.id.hex())
            tail, size = store.get_suffix(key, ref.index_length)
            assert size == ref.size
            found.append(list(decode_index(key, tail, size, ref.id).entries()))
    return found


def read_back(store: ObjectStore, base: str, directory: Path) -> bytes:
    """What a base reads as."""
    target = directory / f"{base}.exported"
    export_image(store, PREFIX, f"base:{base}", target, force=True)
    data = target.read_bytes()
    target.unlink()
    return data
