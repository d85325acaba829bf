"""Bless: a raw image becomes a base, which never changes.

One pass over the image: zeros are skipped, the rest is hashed and compressed on all cores and goes into
packs; then come the pages of the manifest, the hot set if there is one, and last the manifest, write-once.
Whatever happens before that, the store has no base, and the parts of one are used again by the next bless of
the name, or collected. Memory is bounded by a fixed number of buffers.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from glidefs import names
from glidefs.bases.stored import StoredBase, load_base, name_taken, publish_base
from glidefs.bless import resume as checkpoints
from glidefs.bless.pack_writer import PackWriter
from glidefs.bless.pipeline import Batch, Progress, batches
from glidefs.bless.resume import DonePack, Matcher
from glidefs.bless.source import Image, open_image
from glidefs.errors import ExportExists, StoreError, UnknownExport
from glidefs.formats.hot_set import encode_hot_set, make_hot_set
from glidefs.formats.manifest import (
    PAGE_CHUNKS,
    ContentHash,
    PackRef,
    Page,
    Root,
    encode_page,
    encode_root,
    manifest_hash,
    page_count,
    page_id,
)
from glidefs.formats.pack import BLOCK, ID_SIZE, PACK_TARGET, decode_index, rename
from glidefs.store.base import ObjectStore

MAX_AGE = 12 * 3600
"""Seconds after which a pack that no manifest names is put again: half of gc's grace."""
LEVEL = 1


class BlessResult(NamedTuple):
    """The result. ``created`` is false where the base was there already with this content.

    Of the image: its ``size``, and the ``data_bytes`` of it that are not blocks of zeros. Of the base:
    ``packs`` and their ``stored_bytes``, of which ``reused_packs`` come from an earlier, interrupted bless.
    Of a base that was there already they are counted only if its root lists them, as up to 128 GiB. Hashes
    are hex. ``note`` says what is worth knowing, if anything.
    """

    name: str
    prefix: str
    created: bool
    size: int
    data_bytes: int
    packs: int
    reused_packs: int
    stored_bytes: int
    manifest_hash: str
    content_hash: str
    note: str = ""


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """How to bless; see :func:`bless`."""

    pack_bytes: int
    level: int
    workers: int
    hot_set: Sequence[int] | None
    progress: Progress | None
    max_age: float


class _Content(NamedTuple):
    """An image that was read to its end."""

    size: int
    blocks: int
    digest: bytes


def bless(
    store: ObjectStore,
    prefix: str,
    base: str,
    source: Path | int,
    *,
    pack_bytes: int = PACK_TARGET,
    level: int = LEVEL,
    workers: int | None = None,
    hot_set: Sequence[int] | None = None,
    progress: Progress | None = None,
    resume: bool = True,
    max_age: float = MAX_AGE,
) -> BlessResult:
    """Make the base ``base`` of a raw image: a file, a block device, or an open descriptor of any of
    them or of a pipe.

    ``pack_bytes``: stored bytes of a pack, at most :data:`PACK_TARGET`. ``level`` is zstd's, ``workers`` the
    threads that compress (default: one per CPU). ``hot_set``: blocks that a boot reads, in order. With
    ``resume``, an interrupted bless of this name is continued; ``max_age`` is half of gc's grace.

    Raises ExportExists where the name has other content or is that of a removed base, ConfigError for
    an image that cannot be read, InvalidName, CorruptObject, StoreError.
    """
    options = Options(
        pack_bytes=pack_bytes,
        level=level,
        workers=workers or len(os.sched_getaffinity(0)),
        hot_set=hot_set,
        progress=progress,
        max_age=max_age,
    )
    existing = _existing(store, prefix, base)
    with open_image(source) as image:
        if existing is not None:
            content = _read_only(image, existing.root, options)
            return _is_same(store, prefix, existing, content, image, options)
        return _Run(store, prefix, base, image, options, resume).run()


def _existing(store: ObjectStore, prefix: str, base: str) -> StoredBase | None:
    """The base of that name. Raises ExportExists for one that nothing can be the same as."""
    try:
        found = load_base(store, prefix, base)
    except UnknownExport:
        return None
    if found.root.removed_at:
        raise name_taken(prefix, found.root)
    if not found.root.content_hash:
        raise ExportExists(
            base,
            f"prefix {prefix} has a base of this name that was not made from an image, so the two cannot be "
            "compared; choose another name",
        )
    return found


def _read_only(image: Image, root: Root, options: Options) -> _Content:
    """What an image holds, without writing anything."""
    if image.length is not None and image.length + -image.length % 512 != root.size:
        return _Content(image.length, 0, b"")  # no need to read it
    content = ContentHash()
    with contextlib.closing(batches(image, options.workers, Batch.hash, options.progress)) as read:
        for batch in read:
            content.add(batch.blocks, batch.hashes)
    size = image.end()
    return _Content(size, content.blocks, content.digest(size))


def _is_same(
    store: ObjectStore, prefix: str, found: StoredBase, content: _Content, image: Image, options: Options
) -> BlessResult:
    """The result for a base that is there already, with this content. Raises ExportExists otherwise."""
    root = found.root
    if content.digest != root.content_hash:
        raise name_taken(prefix, root)
    if options.hot_set is not None:
        _put_hot_set(store, prefix, root.name, found.manifest_hash, options.hot_set)
    refs = () if root.inline_page is None else root.inline_page.packs
    return BlessResult(
        name=root.name,
        prefix=prefix,
        created=False,
        size=root.size,
        data_bytes=min(content.blocks * BLOCK, content.size),
        packs=len(refs),
        reused_packs=0,
        stored_bytes=sum(ref.size for ref in refs),
        manifest_hash=found.manifest_hash.hex(),
        content_hash=root.content_hash.hex(),
        note=_note(image),
    )


def _note(image: Image) -> str:
    padding = -image.position % 512
    return f"{padding} zero bytes were added to a size that is not a multiple of 512" if padding else ""


def _label(image: Image) -> str:
    """The image's file name, whatever bytes that has."""
    return f"image:{os.path.basename(image.name)}".encode("utf-8", "replace").decode()[:1024]


def _put_hot_set(store: ObjectStore, prefix: str, base: str, manifest: bytes, blocks: Sequence[int]) -> None:
    """A hot set names the manifest that it is of, so one that loses a race to a base does no harm."""
    key = names.hot_set_key(prefix, base)
    store.put(key, encode_hot_set(make_hot_set(manifest, blocks), key))


class _Run:
    """One bless of a name that is free."""

    def __init__(
        self, store: ObjectStore, prefix: str, base: str, image: Image, options: Options, resume: bool
    ) -> None:
        self._store = store
        self._prefix = prefix
        self._base = base
        self._image = image
        self._options = options
        self._volume_id = secrets.token_bytes(ID_SIZE)
        self._started = int(time.time())
        usable = checkpoints.load(store, prefix, base, self._started, options.max_age) if resume else []
        self._matcher = Matcher(store, prefix, usable)
        self._writer = PackWriter(store, prefix, self._volume_id, options.pack_bytes, self._checkpoint)

    def run(self) -> BlessResult:
        """All of it."""
        try:
            return self._publish(self._pack())
        except BaseException as error:
            self._writer.abandon()
            # A store that fails would not take it either; a name that is taken has no use for it.
            if not isinstance(error, StoreError | ExportExists):
                self._checkpoint(self._writer.packs)
            raise

    def _checkpoint(self, packs: Sequence[DonePack]) -> None:
        done = [*self._matcher.reused, *packs]
        if done and not self._matcher.active:  # else the one that is there knows more
            checkpoints.save(self._store, self._prefix, self._base, self._started, done)

    def _pack(self) -> _Content:
        """Read the image into packs."""
        content = ContentHash()
        options = self._options
        resuming = self._matcher.active
        with contextlib.closing(batches(self._image, options.workers, self._work, options.progress)) as read:
            for batch in read:
                content.add(batch.blocks, batch.hashes)
                there = self._matcher.count(batch.blocks, batch.hashes) if resuming else 0
                if there == len(batch.blocks):
                    continue
                if resuming:
                    self._writer.put(*self._matcher.rest())
                    resuming = False
                if batch.stored is None:
                    batch.compress(options.level)
                self._writer.add(batch, there)
        if resuming:
            self._writer.put(*self._matcher.rest())
        size = self._image.end()
        self._writer.finish()
        return _Content(size, content.blocks, content.digest(size))

    def _work(self, batch: Batch) -> None:
        batch.hash()
        if not self._matcher.active:
            batch.compress(self._options.level)

    def _publish(self, content: _Content) -> BlessResult:
        packs = [self._fresh(pack) for pack in (*self._matcher.reused, *self._writer.packs)]
        root = self._root(content, packs)
        data = encode_root(root, names.base_manifest_key(self._prefix, self._base))
        if self._options.hot_set is not None:
            _put_hot_set(self._store, self._prefix, self._base, manifest_hash(data), self._options.hot_set)
        try:
            publish_base(self._store, self._prefix, root)
        except ExportExists:
            # Somebody was faster with the name. With the same content that is as good as our own.
            found = _existing(self._store, self._prefix, self._base)
            if found is None:
                raise
            checkpoints.forget(self._store, self._prefix, self._base)
            return _is_same(self._store, self._prefix, found, content, self._image, self._options)
        checkpoints.forget(self._store, self._prefix, self._base)
        return BlessResult(
            name=self._base,
            prefix=self._prefix,
            created=True,
            size=content.size,
            data_bytes=min(content.blocks * BLOCK, content.size),
            packs=len(packs),
            reused_packs=len(self._matcher.reused),
            stored_bytes=sum(pack.ref.size for pack in packs),
            manifest_hash=manifest_hash(data).hex(),
            content_hash=content.digest.hex(),
            note=_note(self._image),
        )

    def _fresh(self, pack: DonePack) -> DonePack:
        """The pack, or a copy if gc might take it before it sees the manifest."""
        now = int(time.time())
        if now - pack.put_at <= self._options.max_age:
            return pack
        ref = pack.ref
        data = self._store.get(names.pack_key(self._prefix, ref.id.hex())).data
        decode_index(names.pack_key(self._prefix, ref.id.hex()), data, len(data), ref.id)
        new, parts = rename(data, self._volume_id, secrets.token_bytes(ID_SIZE))
        self._store.put(names.pack_key(self._prefix, new.hex()), parts)
        return DonePack(msgspec.structs.replace(ref, id=new), pack.chunks, now)

    def _root(self, content: _Content, packs: Sequence[DonePack]) -> Root:
        """The root; pages that are not in it are put."""
        pages = build_pages(packs)
        count = page_count(content.size)
        ids = [b""] * count
        if count > 1:
            for number, page in pages.items():
                ids[number] = self._put_page(page)
        return Root(
            volume_id=self._volume_id,
            name=self._base,
            size=content.size,
            page_ids=tuple(ids),
            inline_page=pages.get(0, Page()) if count == 1 else None,
            source=_label(self._image),
            read_only=True,
            created_at=int(time.time()),
            content_hash=content.digest,
        )

    def _put_page(self, page: Page) -> bytes:
        data = encode_page(page, self._volume_id, secrets.token_bytes(ID_SIZE))
        new = page_id(data)
        self._store.put(names.page_key(self._prefix, new.hex()), data)
        return new


def build_pages(packs: Sequence[DonePack]) -> dict[int, Page]:
    """The pages that say which chunks these packs hold, by number; those of zeros are left out."""
    tables: dict[int, dict[PackRef, int]] = {}
    chunks: dict[int, dict[int, tuple[int, ...]]] = {}
    for pack in packs:
        for chunk in pack.chunks:
            number, within = divmod(chunk, PAGE_CHUNKS)
            table = tables.setdefault(number, {})
            index = table.setdefault(pack.ref, len(table))
            page = chunks.setdefault(number, {})
            page[within] = (*page.get(within, ()), index)
    return {number: Page(packs=tuple(tables[number]), chunks=chunks[number]) for number in tables}
