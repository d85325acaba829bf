"""Ways to break how the C core reads, retires, caches and gathers, for mutations.py."""

from __future__ import annotations

from mutation import Mutation

LOG = "tests/core/test_core_log.py::"
IO = "tests/core/test_core_io.py::"
SYNCS = "tests/core/test_core_sync.py::"
RECOVERY = "tests/core/test_core_recovery.py::"
CACHE = "tests/core/test_core_cache.py::"
BAD_DISK = "tests/core/test_core_bad_disk.py::"
GATHER = "tests/core/test_core_gather.py::"
PACKS = "tests/core/test_core_packs.py::"
THIN = "tests/core/test_core_thin.py::"
MODEL = "tests/model/test_core_model.py"
HOLES = "tests/model/test_hole_model.py"
ALLOCATION = "tests/volume/test_volume_allocation.py"
STRUCTURED = "tests/nbd/test_nbd_structured.py::"

CORE = [
    # -- section 4: space, segments, retire
    Mutation(
        "uncommitted-segments-retired",
        "csrc/volume/retire.c",
        "    if (s->seq > r->v->committed_seq)",
        "    if (false && s->seq > r->v->committed_seq)",
        (LOG + "test_commit_without_retire_frees_nothing",),
    ),
    Mutation(
        "uncommitted-segments-thinned",
        "csrc/volume/thin.c",
        "s == v->log.active || s->seq > v->committed_seq || ",
        "s == v->log.active || ",
        (THIN + "test_what_is_not_committed_stays_whole",),
    ),
    Mutation(
        "holes-are-data",
        "csrc/log/replay.c",
        "    return from < f->data || to > f->data_end;",
        "    return false;",
        (THIN + "test_the_power_takes_what_was_newer",),
    ),
    Mutation(
        "thin-records-stay-whole",
        "csrc/volume/thin.c",
        "        if (space > 1 && memchr(",
        "        if (false && memchr(",
        (THIN + "test_a_start_serves_what_is_left",),
    ),
    Mutation(
        "no-log-limit",
        "csrc/volume/io.c",
        "    if (!err && !log_may_grow(&v->log, sectors)) {",
        "    if (!err && false && !log_may_grow(&v->log, sectors)) {",
        (LOG + "test_writers_wait_for_log_space",),
    ),
    Mutation(
        "no-map-budget",
        "csrc/volume/io.c",
        "    if (!err && !map_may_grow(v)) {",
        "    if (!err && false && !map_may_grow(v)) {",
        (LOG + "test_map_budget",),
    ),
    Mutation(
        "retire-believes-the-journal",
        "csrc/volume/retire.c",
        "    r->whole = !r->valid || read_whole(r);",
        "    r->whole = read_whole(r) || true;",
        (BAD_DISK + "test_retire_forgets_what_a_damaged_journal_hides",),
    ),
    Mutation(
        "reads-believe-the-log",
        "csrc/volume/io_read.c",
        "        return sums_check(&x->segment->sums, x->index, x->end, data);",
        "        return sums_check(&x->segment->sums, x->index, x->end, data) || true;",
        (BAD_DISK + "test_lost_data_is_an_error_until_it_is_committed",),
    ),
    Mutation(
        "reads-believe-the-cache",
        "csrc/cache/cache_sync.c",
        "            return false;\n    }\n    return f != NULL;",
        "            return true;\n    }\n    return f != NULL;",
        (BAD_DISK + "test_lost_slots_are_fetched_again",),
    ),
    Mutation(
        "a-failed-sync-of-the-cache-drops-nothing",
        "csrc/cache/cache_sync.c",
        "        drop_list(c, list);\n        cache_failed(c, err);",
        "        settle_list(list);\n        c->sick = err;",
        (BAD_DISK + "test_a_failed_sync_drops_what_it_covered",),
    ),
    Mutation(
        "lost-data-is-uncovered-to-an-older-zero",
        "csrc/log/log_map.c",
        "    int err = zeroed && pos_seq(zeroed) <= seq ?",
        "    int err = false && zeroed && pos_seq(zeroed) <= seq ?",
        (BAD_DISK + "test_lost_data_is_an_error_until_it_is_committed",),
    ),
    Mutation(
        "an-upload-believes-what-it-reads",
        "csrc/volume/gather.c",
        "    if (got == length && sums_check(&s->sums, index, index + (uint32_t)(length / SECTOR), buf))",
        "    if (got == length)",
        (BAD_DISK + "test_an_upload_checks_what_it_reads",),
    ),
    Mutation(
        "retire-clears-newer-positions",
        "csrc/log/log_map.c",
        "        if (*entry == pos + (uint64_t)i * step) {",
        "        if (*entry) {",
        (MODEL,),
    ),
    Mutation(
        "retire-clears-newer-extents",
        "csrc/log/log_map.c",
        "        if (e.pos == pos) {",
        "        if (e.pos) {",
        (CACHE + "test_retire_of_an_old_discard_leaves_a_newer_one",),
    ),
    Mutation(
        "discard-keeps-leaves",
        "csrc/log/log_map.c",
        "    drop_leaves(m, first_whole, end_whole);",
        "    (void)drop_leaves;",
        (MODEL,),
    ),
    Mutation(
        "recovery-appends-to-what-it-found",
        "csrc/log/replay.c",
        "            f->limit = f[1].header.previous_end;",
        "            (void)0;",
        (RECOVERY + "test_records_of_a_writer_that_lost_the_log_do_not_count",),
    ),
    Mutation(
        "sequence-numbers-used-again",
        "csrc/volume/recover.c",
        "    v->log.id.seq = committed_seq;",
        "    v->log.id.seq = 0;",
        (RECOVERY + "test_sequence_numbers_are_never_used_twice",),
    ),
    Mutation(
        "records-not-tied-to-their-segment",
        "csrc/log/segment.c",
        "return XXH3_64bits_withSeed(id->log_id, 16, id->seq); }",
        "return XXH3_64bits_withSeed(id->log_id, 16, 0); }",
        (RECOVERY + "test_files_of_retired_segments_are_used_again_and_never_believed",),
    ),
    Mutation(
        "foreign-log-replayed",
        "csrc/log/segment.c",
        '        return fail(-ESTALE, "%s: belongs to another log',
        '        return fail(-EUCLEAN, "%s: belongs to another log',
        (RECOVERY + "test_a_foreign_log_is_refused_and_left_alone",),
    ),
    # -- section 4: unaligned writes, resize, close
    Mutation(
        "unaligned-write-ignores-what-came-meanwhile",
        "csrc/volume/io_unaligned.c",
        "    if (req->rmw->ready && still_newest(req->rmw))",
        "    if (req->rmw->ready && (still_newest(req->rmw) || true))",
        (IO + "test_an_unaligned_write_reads_again_what_changed_meanwhile",),
    ),
    Mutation(
        "writes-outlive-a-shrink",
        "csrc/volume/volume.c",
        "    if (v->inflight > inflight)",
        "    if (v->inflight > inflight && list_empty(&v->batch))",
        (LOG + "test_writes_that_wait_do_not_outlive_a_shrink",),
    ),
    Mutation(
        "shrink-does-not-zero",
        "csrc/volume/volume.c",
        "    if (size >= old)\n",
        "    if (size != old)\n",
        (LOG + "test_a_shrink_and_a_grow_bring_zeros",),
    ),
    # -- section 5
    Mutation(
        "stale-installs-land",
        "csrc/volume/install.c",
        "        install_one(t->v, &t->list[i], t->stamp == atomic_load(&t->v->stamp));",
        "        install_one(t->v, &t->list[i], true);",
        (
            CACHE + "test_an_install_with_a_stale_stamp_does_not_land",
            CACHE + "test_a_stale_fill_is_cached_but_not_mapped",
        ),
    ),
    Mutation(
        "retire-does-not-bump-the-stamp",
        "csrc/volume/retire.c",
        "    atomic_fetch_add(&r->v->stamp, 1);",
        "    atomic_fetch_add(&r->v->stamp, 0);",
        (CACHE + "test_a_stale_prefetch_does_not_land",),
    ),
    Mutation(
        "retire-keeps-the-old-base",
        "csrc/volume/retire.c",
        "    block_map_drop(&((struct volume *)arg)->base, block, count);",
        "    (void)arg, (void)block, (void)count;",
        (CACHE + "test_retire_drops_what_the_map_knew_of_the_base",),
    ),
    Mutation(
        "stale-holes-land",
        "csrc/volume/install.c",
        "    if (stamp != atomic_load(&v->stamp))\n        return;\n    if (h->kind == GLIDE_HOLES_PAGE)",
        "    if (h->kind == GLIDE_HOLES_PAGE)",
        (HOLES,),
    ),
    Mutation(
        "retire-keeps-the-holes",
        "csrc/cache/block_map.c",
        "    zero_groups_clear(&m->blocks, block, r.end);\n"
        "    zero_groups_clear(&m->chunks, block / GLIDE_GROUP, div_up(r.end, GLIDE_GROUP));\n",
        "",
        (HOLES,),
    ),
    Mutation(
        "retire-keeps-the-chunk",
        "csrc/cache/block_map.c",
        "    zero_groups_clear(&m->chunks, block / GLIDE_GROUP, div_up(r.end, GLIDE_GROUP));\n",
        "",
        (HOLES,),
    ),
    Mutation(
        "retire-keeps-the-block",
        "csrc/cache/block_map.c",
        "    zero_groups_clear(&m->blocks, block, r.end);\n",
        "",
        (HOLES,),
    ),
    Mutation(
        "status-without-the-log",
        "csrc/volume/io_status.c",
        "    if (view.pos) {\n",
        "    if (false && view.pos) {\n",
        (ALLOCATION,),
    ),
    Mutation(
        "status-skips-blocks-of-the-log",
        "csrc/volume/io_status.c",
        "    return (struct run){log_map_next_leaf(&v->map, block + 1, stop) * GLIDE_BLOCK, state};",
        "    return (struct run){stop * GLIDE_BLOCK, state};",
        (ALLOCATION,),
    ),
    Mutation(
        "data-of-a-chunk-outlives-retire",
        "csrc/cache/zero_groups.c",
        "        *word &= ~mask;\n    }\n    b->known = false;",
        "        *word &= ~mask;\n    }",
        (ALLOCATION,),
    ),
    Mutation(
        "hole-of-a-read-that-is-done-again",
        "csrc/volume/io_read.c",
        "        *word = zero ? *word | mask : *word & ~mask;",
        "        *word = *word | mask;",
        (STRUCTURED + "test_data_and_holes_in_one_read",),
    ),
    Mutation(
        "flags-lost-in-a-handoff",
        "csrc/transport/nbd/nbd_request.c",
        "    uint16_t flags = type == NBD_FLUSH ? 0 : r->flags;",
        "    uint16_t flags = type == NBD_FLUSH ? 0 : r->flags & NBD_FLAG_FUA;",
        ("tests/core/test_core_sparse_handoff.py",),
    ),
    Mutation(
        "pin-without-looking-again",
        "csrc/cache/block_cache.c",
        "        if (generation_of(word) != generation)\n            return false;",
        "        if (generation_of(word) < generation)\n            return false;",
        (CACHE + "test_eviction_while_mapped",),
    ),
    Mutation(
        "pinned-slots-evicted",
        "csrc/cache/block_cache.c",
        "    if (pins_of(word))\n        return false;",
        "    if (pins_of(word) > 1000)\n        return false;",
        (CACHE + "test_every_slot_pinned",),
    ),
    Mutation(
        "index-believed-after-a-restart",
        "csrc/cache/block_cache.c",
        "    c->touched = (uint32_t)max_u64(c->touched, slot + 1);\n",
        "    c->touched = (uint32_t)max_u64(c->touched, slot + 1);\n    s->verified = 1;\n",
        (CACHE + "test_a_restart_finds_its_blocks_unverified",),
    ),
    Mutation(
        "index-not-checked",
        "csrc/cache/block_cache.c",
        "e->slot == slot && ",
        "",
        (CACHE + "test_a_damaged_index_costs_hits_never_data[swapped]",),
    ),
    # -- section 6
    Mutation(
        "gather-believes-any-record-in-memory",
        "csrc/log/sector_sums.c",
        "    return sums_hash(s->sum + index, count) == hash ? 1 : -EUCLEAN;",
        "    return 0;",
        (GATHER + "test_a_record_of_other_data_than_in_memory_is_refused",),
    ),
    Mutation(
        "pack-has-the-hash-of-what-is-stored",
        "csrc/upload/pack.c",
        "    payload_hash(b->plain, length, r->hash);",
        "    payload_hash(at, length, r->hash);",
        (PACKS + "test_the_object_is_the_same_byte_for_byte",),
    ),
    Mutation(
        "zero-masks-of-chunks-that-are-dropped",
        "csrc/upload/plan.c",
        "        if (!keep[chunk - p->chunks])",
        "        if (false && !keep[chunk - p->chunks])",
        (PACKS + "test_plan_and_packs_are_those_of_python",),
    ),
    Mutation(
        "packs-of-more-entries-than-there-may-be",
        "csrc/upload/plan.c",
        " || c->job.count >= c->max_items ? end_job(c) : 0;",
        " ? end_job(c) : 0;",
        (PACKS + "test_a_pack_of_as_many_entries_as_there_may_be",),
    ),
    Mutation(
        "gather-takes-what-is-left",
        "csrc/volume/gather.c",
        "    if (!err && good != s->valid)",
        "    if (false && good != s->valid)",
        (GATHER + "test_a_damaged_record_uploads_nothing",),
    ),
    Mutation(
        "gather-has-the-active-segment",
        "csrc/volume/gather.c",
        " && s != log->active)",
        ")",
        (GATHER + "test_the_active_segment_is_not_gathered",),
    ),
    Mutation(
        "gather-beyond-the-last-segment",
        "csrc/volume/gather.c",
        "        if (s->seq >= a->first && s->seq <= a->last",
        "        if (s->seq >= a->first",
        (GATHER + "test_newer_writes_do_not_leak_in",),
    ),
    Mutation(
        "store-flush-returns-early",
        "csrc/volume/sync.c",
        "        if (req->need_seq <= v->committed_seq) {\n            list_remove(at);",
        "        if (true) {\n            list_remove(at);",
        (SYNCS + "test_flush_store_waits_for_the_commit",),
    ),
]
