"""Tunables of a host, with units; the daemon fills them from its configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from glidefs.formats.pack import PACK_TARGET

MIB = 1 << 20


class HostSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes and seconds throughout.

    Reading: the core carries at most ``carried_blocks`` that guests wait for at a time. What it cannot,
    ``reader_threads`` answer, runs of at most ``fault_blocks`` blocks each; ``fetch_threads`` help with the
    ranged GETs of one, ``prefetch_threads`` read ahead. ``read_ahead_bytes`` is the largest window of a
    volume, ``ahead_bytes`` what all volumes together have on its way of that.
    ``coalesce_gap``: bytes between two payloads that are read rather than ending the request;
    ``fetch_bytes``: largest ranged GET of a fault that several requests share. Pack indices are kept
    up to ``index_cache_bytes`` in memory and ``index_disk_bytes`` in the state directory.
    ``hot_volumes`` forks at a time get their hot set, up to ``hot_set_bytes``, with ``hot_threads``.
    Guests' reads of ``slow_read`` and longer become spans, where those go somewhere.

    Uploading: ``uploaders`` volumes at once, ``put_threads`` packs in the making (each holds
    ``pack_bytes``). ``batch_bytes`` of sealed log make a volume due before its age does;
    ``batch_segments`` bounds one commit.

    ``retire_fraction`` of the log limit, or of the memory for maps, is where committed segments begin to go;
    with ``retire_segments`` a volume keeps at most so many (0: no limit).

    Compaction: a chunk of ``compact_width`` packs is looked at; after ``settle_idle`` seconds
    without a commit those of more than ``settle_width`` are, too. ``compact_rate`` bytes per second.

    Debugging: with ``shadow_dir`` every read is compared with a second source, which is kept there.
    """

    log_dir: Path
    reader_threads: int = 16
    fetch_threads: int = 16
    prefetch_threads: int = 8
    hot_volumes: int = 2
    hot_threads: int = 8
    hot_set_bytes: int = 1024 * MIB
    fault_blocks: int = 32
    poll_ms: int = 500
    cache_scope: Literal["host", "prefix"] = "host"
    carried_blocks: int = 512
    read_ahead_bytes: int = 64 * MIB
    ahead_bytes: int = 128 * MIB
    coalesce_gap: int = 64 << 10
    fetch_bytes: int = 2 * MIB
    index_cache_bytes: int = 32 * MIB
    index_disk_bytes: int = 128 * MIB
    page_cache_pages: int = 32
    store_patience: float = 5.0
    slow_read: float = 0.1
    uploaders: int = 8
    put_threads: int = 3
    sync_interval: float = 30.0
    max_dirty_age: float = 300.0
    pack_bytes: int = PACK_TARGET
    compression_level: int = 1
    batch_bytes: int = 256 * MIB
    batch_segments: int = 16
    gc_grace: float = 86400.0
    retire_fraction: float = 0.8
    retire_segments: int = 0
    poll_interval: float = 15.0
    backoff: float = 1.0
    nice: int = 15
    compaction: bool = True
    compact_width: int = 16
    compact_rate: int = 64 * MIB
    compact_commit_packs: int = 8
    settle_idle: float = 60.0
    settle_width: int = 4
    shadow_dir: Path | None = None
