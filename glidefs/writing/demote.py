"""What a segment leaves in the block cache when it goes: blocks whose newest data it has, while that is here.

So what was written here is read from the store only once neither the log nor the cache has room for it. A
slot of the cache is a whole block: those go first of which the segment has most, until as many bytes
were written to the cache as :data:`AMPLIFICATION` times those of the segment, or the time is up. A block
of which a part is neither in the log nor in the cache is left out: the store would have to be asked.
"""

from __future__ import annotations

import logging
import time
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from glidefs.core.carry import BlockPlans
from glidefs.core.check import Closed
from glidefs.core.gather import Gather
from glidefs.errors import GlideError
from glidefs.formats.pack import CHUNK_BLOCKS, SECTORS_PER_BLOCK
from glidefs.manifest.view import Manifest
from glidefs.store.base import ObjectStore
from glidefs.volume.settings import HostSettings

if TYPE_CHECKING:
    from glidefs.volume.volume import Volume

log = logging.getLogger(__name__)

AMPLIFICATION = 4
"""Bytes written to the cache for each of the segment: small writes far from each other cost a block each."""
PATIENCE = 0.25
"""Seconds for a segment: who retires it has writers to look after."""
_AT_ONCE = 128


class Demoter:
    """Thread-safe; keeps only counts. ``store`` is never asked."""

    def __init__(self, settings: HostSettings, store: ObjectStore) -> None:
        self._settings = settings
        self._store = store
        self.blocks = 0
        """Blocks that were put in the cache."""

    def demote(self, volume: Volume, segment: int) -> int:
        """Put blocks of a committed segment, the oldest, in the cache; how many. Raises Closed.

        Whatever else is in the way only means that the store will be asked.
        """
        until = time.monotonic() + PATIENCE
        done = 0
        try:
            manifest = volume.manifest(self._store)
            densest = _densest_blocks(volume, segment)
            while densest.blocks and done < densest.room and time.monotonic() < until:
                plans = self._plans(manifest, volume, densest.take(min(_AT_ONCE, densest.room - done)))
                if plans is not None:
                    done += plans.demote(volume.core, segment, manifest.root.last_segment)
        except Closed:
            raise
        except GlideError as error:
            log.debug("volume %s: segment %d leaves nothing more: %s", volume.name, segment, error)
        self.blocks += done
        return done

    def _plans(self, manifest: Manifest, volume: Volume, blocks: list[int]) -> BlockPlans | None:
        """What blocks, ascending, are made of; those are left out whose indices are not in memory."""
        groups: list[tuple[list[bytes], list[int]]] = []
        for chunk, group in groupby(blocks, lambda block: block // CHUNK_BLOCKS):
            indices = manifest.ready(chunk)
            if indices:
                groups.append(([index.records for index in indices], list(group)))
        prefix = volume.prefix if self._settings.cache_scope == "prefix" else None
        return BlockPlans(groups, prefix) if groups else None


class _Densest(NamedTuple):
    """Blocks of a segment, those last of which it has most, and how many may be put in the cache."""

    blocks: list[int]
    room: int

    def take(self, count: int) -> list[int]:
        """So many of those of which the segment has most, ascending. They are gone from ``blocks``."""
        found = sorted(self.blocks[-count:])
        del self.blocks[-count:]
        return found


def _densest_blocks(volume: Volume, segment: int) -> _Densest:
    with Gather(volume.core, volume.log_dir, volume.id, volume.log_id, segment, segment) as gather:
        sectors = {entry.block: entry.mask.bit_count() for entry in gather.entries()}
    room = AMPLIFICATION * sum(sectors.values()) // SECTORS_PER_BLOCK
    return _Densest(sorted(sectors, key=sectors.__getitem__), room)
