"""Blocks that the core fetches by itself: many faults planned together, none of them with a thread.

What needs no request to be planned (pages and indices in memory, a signed URL, a store without trouble) is
handed to the core in one call for each chunk, and what became of it comes back in batches. All else is for
:mod:`glidefs.reading.reader`, on a thread that may wait: loads, retries, damage, TLS. So what a failure
means is decided in one place, and nothing here raises one.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Final, NamedTuple

from glidefs.core.carry import ABSENT, DONE, UNSURE, ZERO, AbsentBlock, BlockPlans, Carried, Row
from glidefs.core.check import Closed
from glidefs.core.engine import Engine
from glidefs.errors import GlideError
from glidefs.formats.pack import CHUNK_BLOCKS, PackIndex
from glidefs.reading.flights import Flights
from glidefs.reading.holes import ChunkHoles, Zeros
from glidefs.store.base import Source
from glidefs.store.resilient import StoreView
from glidefs.volume.settings import HostSettings

if TYPE_CHECKING:
    from glidefs.reading.slow import Turn
    from glidefs.volume.volume import Volume

log = logging.getLogger(__name__)

_FIRST_PAUSE = 0.05
_LONGEST_PAUSE = 30.0
_NOT_THE_SOURCE = (errno.EUCLEAN, errno.EAGAIN, errno.ENOMEM, errno.ESHUTDOWN, errno.EMFILE)
_BLOCK: Final = 0
_KEY: Final = 1
_STATE: Final = 4
_TASK: Final = 5
_ANSWERED = (DONE, ZERO)


class Request(NamedTuple):
    """What is asked for: blocks of ``volume``, all but ``leave`` mapped. ``guest``: somebody waits.

    ``turn`` notes when what happens, where somebody wants to know.
    """

    volume: Volume
    store: StoreView
    stamp: int
    leave: int
    guest: bool
    turn: Turn | None = None


class Task(NamedTuple):
    """Blocks of a request on their way together, with their keys."""

    request: Request
    blocks: dict[int, bytes]


class _Group(NamedTuple):
    """Blocks of one chunk, ascending, and the indices of its packs, newest first."""

    indices: list[PackIndex]
    blocks: list[int]

    def records(self) -> list[bytes]:
        return [index.records for index in self.indices]


class Carrier:
    """The tasks of an engine. Thread-safe; ``_lock`` guards their table, and is held while some begin.

    ``waited`` is told of faults with stages that a landing answered, though it was not begun for them.
    """

    def __init__(
        self, engine: Engine, settings: HostSettings, flights: Flights, chunk_holes: ChunkHoles
    ) -> None:
        self._engine = engine
        self._settings = settings
        self._flights = flights
        self._chunk_holes = chunk_holes
        self.waited: Callable[[AbsentBlock], None] | None = None
        self._lock = threading.Lock()
        self._tasks: dict[int, Task] = {}
        self._next = 0
        self._closed = False
        self._pause = 0.0
        self._paused_until = 0.0

    @property
    def begun(self) -> int:
        """Tasks so far."""
        return self._next

    @property
    def pausing(self) -> bool:
        """Whether sources failed a moment ago: then everything goes through the store."""
        return self._pause > 0 and time.monotonic() < self._paused_until

    def carry(
        self, request: Request, blocks: Sequence[int], faults: Mapping[int, AbsentBlock] | None = None
    ) -> tuple[list[int], int]:
        """Begin what can be begun of ``blocks``, ascending. The others; how many the store is asked for.

        What needs no store is answered at once; ``faults`` of blocks that are on their way already are told
        of by the flights. The stamp of the request is from before the manifest is read here.
        """
        manifest = request.volume.manifest(request.store)
        rest: list[int] = []
        groups: list[_Group] = []
        zeros = Zeros(self._chunk_holes)
        for chunk, group in groupby(blocks, lambda block: block // CHUNK_BLOCKS):
            wanted = list(group)
            found = manifest.ready(chunk)
            if found is None:
                rest += wanted
            elif found:
                groups.append(_Group(found, wanted))
            else:
                for block in wanted:
                    zeros.add_absent(manifest, block, 1)
        left, asked = self._carry_groups(request, groups, zeros, faults or {}) if groups else ([], 0)
        try:
            zeros.install(request.volume.core, request.stamp)
        except GlideError as error:  # what was begun has to be counted all the same
            log.debug("volume %s: zeros are not installed: %s", request.volume.name, error)
            left = left + zeros.blocks()
        return rest + left, asked

    def _carry_groups(
        self,
        request: Request,
        groups: list[_Group],
        zeros: Zeros,
        faults: Mapping[int, AbsentBlock],
    ) -> tuple[list[int], int]:
        volume = request.volume
        plans = BlockPlans([(group.records(), group.blocks) for group in groups], self._prefix(volume))
        left, used = plans.answer(self._engine, volume.cookie, request.stamp, request.leave)
        if not left:
            return [], 0
        rows = plans.rows()
        _add_zeros(zeros, groups, rows)
        absent = [i for i, row in enumerate(rows) if row[_STATE] == ABSENT]
        indices = [index for group in groups for index in group.indices]
        sources = self._sources(request.store, indices, used) if absent else {}
        if not absent or sources is None:
            return [row[_BLOCK] for row in rows if row[_STATE] not in _ANSWERED], 0
        waiters = [faults.get(rows[i][_BLOCK]) for i in absent]
        mine = self._flights.board([rows[i][_KEY] for i in absent], waiters)
        fetched = []
        for i, is_mine in zip(absent, mine, strict=True):
            if is_mine:
                fetched.append(i)
            else:
                plans.skip(i)
        if fetched and not self._begin(request, plans, rows, fetched, sources):
            return [row[_BLOCK] for row in rows if row[_STATE] not in _ANSWERED], 0
        if request.turn is not None:
            request.turn.under_way(rows[i][_BLOCK] for i in absent)
        return [row[_BLOCK] for row in rows if row[_STATE] == UNSURE], len(fetched)

    def _prefix(self, volume: Volume) -> str | None:
        return volume.prefix if self._settings.cache_scope == "prefix" else None

    def _sources(
        self, store: StoreView, indices: list[PackIndex], used: list[int]
    ) -> dict[int, Source] | None:
        """Where the packs are; None if that is not known of all."""
        if self.pausing:
            return None
        sources: dict[int, Source] = {}
        for pack in used:
            source = store.source(indices[pack].key)
            if source is None:
                return None
            sources[pack] = source
        return sources

    def _begin(
        self,
        request: Request,
        plans: BlockPlans,
        rows: list[Row],
        fetched: list[int],
        sources: dict[int, Source],
    ) -> bool:
        settings = self._settings
        count = 0
        with self._lock, ExitStack() as undo:
            undo.callback(self._flights.land, [rows[i][_KEY] for i in fetched])
            first = self._next
            try:
                if self._closed:
                    raise Closed("nothing is carried any more")
                if request.turn is not None:
                    request.turn.hand_over()
                count = plans.carry(
                    self._engine,
                    request.volume.cookie,
                    request.stamp,
                    first,
                    sources,
                    gap=settings.coalesce_gap,
                    limit=settings.fetch_bytes,
                    leave=request.leave,
                )
            except GlideError as error:
                log.debug("volume %s: the core does not carry: %s", request.volume.name, error)
            else:
                self._next += count
                rows = plans.rows()
                tasks = [Task(request, {}) for _ in range(count)]
                for i in fetched:
                    row = rows[i]
                    tasks[row[_TASK]].blocks[row[_BLOCK]] = row[_KEY]
                self._tasks.update(zip(range(first, first + count), tasks, strict=True))
                undo.pop_all()
        return count > 0

    def prepare(self, volume: Volume, store: StoreView, blocks: Sequence[int]) -> bool:
        """Find out where the packs of ``blocks`` are, whose indices were loaded.

        False: not all can be carried. Raises StoreError.
        """
        if self.pausing:
            return False
        manifest = volume.manifest(store)
        for chunk, group in groupby(blocks, lambda block: block // CHUNK_BLOCKS):
            indices = manifest.ready(chunk)
            if indices is None:
                return False
            wanted = list(group)
            plans = BlockPlans([([index.records for index in indices], wanted)], None)
            for pack in {part[0] for i in range(len(wanted)) for part in plans.parts(i)}:
                store.prepare(indices[pack].key)
                if store.source(indices[pack].key) is None:
                    return False
        return True

    def landed(self, carried: Sequence[Carried]) -> list[tuple[Task, Carried]]:
        """Tasks ended: whoever waits for their blocks is told. Which they were."""
        with self._lock:
            tasks = [self._tasks.pop(one.task, None) for one in carried]
        found = [(task, one) for task, one in zip(tasks, carried, strict=True) if task is not None]
        for task, one in found:
            failed = one.err != 0
            self._flights.land(
                task.blocks.values(), None if failed else partial(self._is_answered, task, one.order)
            )
            if failed or self._pause:
                self._judge(one.err)
            try:
                task.request.store.carried(one.gets, one.bytes, one.ns / 1e9, failed=failed)
            except Exception:
                log.exception("what was carried is not counted")
        return found

    def close(self) -> None:
        """Begin no more, and tell who waits for what is on its way that it is not here."""
        with self._lock:
            self._closed = True
            tasks, self._tasks = self._tasks, {}
        for task in tasks.values():
            self._flights.land(task.blocks.values())

    def _is_answered(self, task: Task, order: int, fault: AbsentBlock) -> bool:
        """Whether the landing of a task answered this fault, too."""
        request = task.request
        found = (
            fault.order < order
            and fault.block in task.blocks
            and fault.volume == request.volume.cookie
            and fault.block != request.leave
        )
        if found and fault.stages is not None and self.waited is not None:
            self.waited(fault)
        return found

    def _judge(self, err: int) -> None:
        """Keep away from sources for a while that fail: each costs a request for nothing.

        What was begun before the pause and fails in it says nothing new.
        """
        if err and self.pausing:
            return
        if err and -err not in _NOT_THE_SOURCE:
            self._pause = min(max(2 * self._pause, _FIRST_PAUSE), _LONGEST_PAUSE)
            self._paused_until = time.monotonic() + self._pause
        elif not err and not self.pausing:
            self._pause = 0.0


def _add_zeros(zeros: Zeros, groups: list[_Group], rows: list[Row]) -> None:
    at = 0
    for group in groups:
        for row in rows[at : at + len(group.blocks)]:
            if row[_STATE] == ZERO:
                zeros.add(row[_BLOCK], group.indices)
        at += len(group.blocks)
