"""Packs of an upload: what a gather holds is cut into packs, and each is built in one call (csrc/upload)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from glidefs.core._core import ffi, lib
from glidefs.core.check import Handle, check
from glidefs.core.gather import ENTRY, Gather, GatherEntry, GatherExtent


class GatherChunk(NamedTuple):
    """A chunk that entries lie in: blocks with each of their sectors, and blocks with a zero mask."""

    chunk: int
    whole: int
    zeros: int


class PackJob(NamedTuple):
    """A pack to build: its number in the plan, its items, and the bytes of their payloads, plain."""

    number: int
    first: int
    items: int
    plain: int


class PackRules(NamedTuple):
    """Compression: ``level`` of zstd.

    A pack of more than ``samples`` payloads is only compressed if the first ``sample`` bytes (a multiple of a
    sector) of about so many of them shrink to less than ``shrinks`` thousandths.
    """

    level: int
    samples: int
    sample: int
    shrinks: int


class PackParts(NamedTuple):
    """What was built: ``end`` of the payloads in the body, the plain index, the chunks, ascending."""

    end: int
    records: bytes
    chunks: tuple[int, ...]


class UploadPlan(Handle):
    """Which blocks go into which pack. Close it before the gather.

    ``size``: bytes of the volume within which :meth:`chunks` counts. :meth:`chunks` and :meth:`cut` are for
    one thread, :meth:`build` for any number.
    """

    __slots__ = ("_gather",)

    def __init__(self, gather: Gather, size: int) -> None:
        self._gather = gather
        out = ffi.new("glide_plan **")
        pointer = gather._acquire()
        try:
            check(lib.glide_plan_open(pointer, size, out), "plan an upload")
        except BaseException:
            gather._release()
            raise
        super().__init__(out[0])

    def _free(self, pointer: Any) -> None:
        lib.glide_plan_close(pointer)
        self._gather._release()

    def chunks(self) -> list[GatherChunk]:
        """The chunks that the gather has entries in, ascending."""
        out = ffi.new("const struct glide_chunk **")
        with self._use() as plan:
            count = lib.glide_plan_chunks(plan, out)
            return [GatherChunk(out[0][i].chunk, out[0][i].whole, out[0][i].zeros) for i in range(count)]

    def cut(
        self, keep: bytes, zeros: Sequence[GatherExtent], pack_bytes: int, max_items: int
    ) -> list[PackJob]:
        """Cut into packs of at most ``pack_bytes`` plain bytes (one block may have more) and ``max_items``.

        ``keep`` has a byte for each of :meth:`chunks`: 1 if zero masks are kept there. ``zeros``: runs of
        blocks, ascending, that packs say are zero. Once for each plan. Raises CoreError.
        """
        out = ffi.new("const struct glide_pack_job **")
        with self._use() as plan:
            if len(keep) != lib.glide_plan_chunks(plan, ffi.new("const struct glide_chunk **")):
                raise ValueError("not a byte for each chunk")
            runs = ffi.new("struct glide_extent[]", [(run.block, run.count) for run in zeros if run.count])
            result = lib.glide_plan_cut(plan, ffi.from_buffer(keep), runs, len(runs), pack_bytes, max_items)
            check(result, "plan an upload")
            count = lib.glide_plan_jobs(plan, out)
            jobs = [out[0][i] for i in range(count)]
            return [PackJob(i, job.first, job.count, job.plain) for i, job in enumerate(jobs)]

    def items(self, job: PackJob) -> list[GatherEntry]:
        """What packs will say about blocks, for tests."""
        out = ffi.new("const struct glide_entry **")
        with self._use() as plan:
            if job.first + job.items > lib.glide_plan_items(plan, out):
                raise ValueError("not a job of this plan")
            raw = bytes(ffi.buffer(out[0] + job.first, job.items * ENTRY.size))
        return list(map(GatherEntry._make, ENTRY.iter_unpack(raw)))

    def build(self, job: PackJob, rules: PackRules, body: memoryview) -> PackParts:
        """Build a pack's payloads in ``body``, behind room for the header; it needs ``job.plain`` bytes more.

        Raises CorruptLog, CoreError.
        """
        given = ffi.new("struct glide_pack_rules *", tuple(rules))
        out = ffi.new("struct glide_packed *")
        records = bytearray(job.items * lib.GLIDE_PACK_ENTRY)
        with self._use() as plan:
            # Only behind the check that the job is of this plan: its sizes are those of what is written.
            jobs = ffi.new("const struct glide_pack_job **")
            if job.number >= lib.glide_plan_jobs(plan, jobs) or jobs[0][job.number].count != job.items:
                raise ValueError("not a job of this plan")
            chunks = ffi.new("uint64_t[]", job.items)
            result = lib.glide_plan_build(
                plan,
                job.number,
                given,
                ffi.from_buffer(body, require_writable=True),
                len(body),
                ffi.from_buffer(records, require_writable=True),
                chunks,
                out,
            )
        check(result, "build a pack", path="write log")
        return PackParts(out.end, bytes(records), tuple(ffi.unpack(chunks, out.chunks)))
