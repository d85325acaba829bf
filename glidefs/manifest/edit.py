"""New manifests from old ones: packs are appended, dropped or replaced, never changed in place."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

import msgspec

from glidefs.formats.manifest import PAGE_CHUNKS, PackRef, Page, Root, chunk_count, page_count
from glidefs.manifest import lease
from glidefs.manifest.view import Manifest


class Append(NamedTuple):
    """A new pack and the chunks that it holds blocks of; it becomes the newest in each."""

    ref: PackRef
    chunks: tuple[int, ...]


class Replace(NamedTuple):
    """In ``chunk`` the packs ``old`` (ids, oldest first), where they follow each other, become ``new``."""

    chunk: int
    old: tuple[bytes, ...]
    new: tuple[PackRef, ...]


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """What a commit does to a manifest, in this order: ``drops``, ``replaces``, ``appends``.

    ``drops`` are chunks that were overwritten or zeroed whole. ``size`` and ``last_segment`` are
    None where they stay.
    """

    drops: frozenset[int] = frozenset()
    replaces: tuple[Replace, ...] = ()
    appends: tuple[Append, ...] = ()
    size: int | None = None
    last_segment: int | None = None


class Edited(NamedTuple):
    """The new root, still without ids of ``pages``, and the pages by number that are new."""

    root: Root
    pages: dict[int, Page]


def edit(manifest: Manifest, change: Change) -> Edited:
    """Apply ``change``. A replacement whose packs are no longer one run in its chunk is left out."""
    old = manifest.root
    size = old.size if change.size is None else change.size
    chunks = _edited_chunks(manifest, change, size)
    by_page: defaultdict[int, dict[int, tuple[PackRef, ...]]] = defaultdict(dict)
    for chunk, refs in chunks.items():
        by_page[chunk // PAGE_CHUNKS][chunk % PAGE_CHUNKS] = refs
    count = page_count(size)
    pages = {
        number: build_page(manifest.page(number), edits)
        for number, edits in by_page.items()
        if number < count
    }
    root = lease.next_root(
        old,
        size=size,
        last_segment=old.last_segment if change.last_segment is None else change.last_segment,
    )
    if count == 1:
        page = pages.get(0, manifest.page(0))
        return Edited(msgspec.structs.replace(root, page_ids=(b"",), inline_page=page), {})
    ids = list(old.page_ids[:count]) + [b""] * (count - len(old.page_ids))
    if old.inline_page is not None and old.inline_page.chunks:
        pages.setdefault(0, old.inline_page)
    for number in [n for n, page in pages.items() if not page.chunks]:
        ids[number] = b""
        del pages[number]
    return Edited(msgspec.structs.replace(root, page_ids=tuple(ids), inline_page=None), pages)


def _edited_chunks(manifest: Manifest, change: Change, size: int) -> dict[int, tuple[PackRef, ...]]:
    chunks: dict[int, tuple[PackRef, ...]] = dict.fromkeys(change.drops, ())
    for replace in change.replaces:
        refs = chunks.get(replace.chunk)
        if refs is None:
            refs = manifest.packs(replace.chunk)
        at = find_run(refs, replace.old)
        if at >= 0:
            chunks[replace.chunk] = refs[:at] + replace.new + refs[at + len(replace.old) :]
    for append in change.appends:
        for chunk in append.chunks:
            refs = chunks.get(chunk)
            if refs is None:
                refs = manifest.packs(chunk)
            chunks[chunk] = (*refs, append.ref)
    end, old_end = chunk_count(size), chunk_count(manifest.root.size)
    if end < old_end:
        chunks.update(dict.fromkeys(manifest.present(end, old_end - 1), ()))
    for chunk in [c for c in chunks if c >= end]:
        chunks[chunk] = ()
    return chunks


def find_run(refs: Iterable[PackRef], ids: tuple[bytes, ...]) -> int:
    """Where ``ids`` are, one after another, among ``refs``; -1 if they are not."""
    have = tuple(ref.id for ref in refs)
    width = len(ids)
    return next((i for i in range(len(have) - width + 1) if have[i : i + width] == ids), -1) if width else -1


def build_page(page: Page, edits: dict[int, tuple[PackRef, ...]]) -> Page:
    """``page`` with the packs of some chunks (numbers within the page) replaced; unused packs go."""
    kept = {chunk: indices for chunk, indices in page.chunks.items() if chunk not in edits}
    used = sorted({i for indices in kept.values() for i in indices})
    renumber = {old: new for new, old in enumerate(used)}
    table = [page.packs[i] for i in used]
    chunks = {chunk: tuple(renumber[i] for i in indices) for chunk, indices in kept.items()}
    where = {ref.id: i for i, ref in enumerate(table)}
    for chunk, refs in edits.items():
        for ref in refs:
            if ref.id not in where:
                where[ref.id] = len(table)
                table.append(ref)
        if refs:
            chunks[chunk] = tuple(where[ref.id] for ref in refs)
    return Page(packs=tuple(table), chunks=dict(sorted(chunks.items())))
