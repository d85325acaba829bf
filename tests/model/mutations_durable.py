"""Ways to break what the C core makes durable: writes, syncs and recovery, for mutations.py."""

from __future__ import annotations

from mutation import Mutation

LOG = "tests/core/test_core_log.py::"
SYNCS = "tests/core/test_core_sync.py::"
MUTATED = "tests/core/test_core_mutations.py::"
RECOVERY = "tests/core/test_core_recovery.py::"
CUT = "tests/model/test_power_cut.py::"
MODEL = "tests/model/test_core_model.py"

DURABLE = [
    # -- section 4: the order of a write
    Mutation(
        "position-reused-after-failed-append",
        "csrc/log/write_log.c",
        "    if (err) {\n        log_seal(log);\n        return err;\n    }\n    s->end += taken;",
        "    if (err)\n        return err;\n    s->end += taken;",
        (LOG + "test_a_position_is_never_used_twice",),
    ),
    Mutation(
        "record-before-data",
        "csrc/log/write_log.c",
        "    int err = disk_pwritev(&s->file, x->iov, (int)count, segment_data_offset(s->sectors, at));\n"
        "    if (!err)\n"
        "        err = disk_pwritev(&s->file, &journal, 1, segment_record_offset(at));",
        "    int err = disk_pwritev(&s->file, &journal, 1, segment_record_offset(at));\n"
        "    if (!err)\n"
        "        err = disk_pwritev(&s->file, x->iov, (int)count, segment_data_offset(s->sectors, at));",
        (SYNCS + "test_a_write_is_data_then_record",),
    ),
    Mutation(
        "write-does-not-mark-unsynced",
        "csrc/log/write_log.c",
        "    s->unsynced = true; /* before the bytes",
        "    /* before the bytes",
        (CUT + "test_what_was_flushed_is_there",),
    ),
    Mutation(
        "mapped-only-after-acknowledgement",
        "csrc/volume/io.c",
        "        int err = map_piece(v, &pieces[i]);",
        "        int err = i + 1 < count ? 0 : map_piece(v, &pieces[i]);",
        (MODEL,),
    ),
    # -- section 4: power cuts
    Mutation(
        "torn-data-replayed",
        "csrc/log/replay.c",
        "    bool verify = record->op == RECORD_WRITE && must_verify(r, f);",
        "    bool verify = record->op == RECORD_WRITE && false && must_verify(r, f);",
        (MODEL,),
    ),
    Mutation(
        "replay-stops-at-a-bad-record",
        "csrc/log/replay.c",
        "        r->dropped++;\n",
        "        r->dropped++;\n        f->journal.sectors = index;\n",
        (RECOVERY + "test_replay_goes_on_behind_a_bad_record",),
    ),
    Mutation(
        "rot-below-a-sync-is-dropped",
        "csrc/log/replay.c",
        "    if (err == -EUCLEAN && pos >= f->durable) {",
        "    if (err == -EUCLEAN) {",
        (RECOVERY + "test_damage_below_a_sync_is_an_error_that_names_it[data]",),
    ),
    Mutation(
        "missing-record-below-a-sync-is-skipped",
        "csrc/log/replay.c",
        "        else if (i < durable_end)\n            err = lost_record(r, f, i, NULL);\n",
        "",
        (RECOVERY + "test_damage_below_a_sync_is_an_error_that_names_it[record]",),
    ),
    Mutation(
        "sync-vouches-for-what-was-written-after-it-began",
        "csrc/volume/sync.c",
        "        log_note_sync(&v->log, s->pos);",
        "        log_note_sync(&v->log, log_position(&v->log));",
        (MODEL,),
    ),
    Mutation(
        "missing-segment-below-a-sync",
        "csrc/log/replay.c",
        "    bool missing = f->usable && f->header.previous_seq > before;",
        "    bool missing = false && f->header.previous_seq > before;",
        (RECOVERY + "test_a_sync_covers_segments_before_its_own",),
    ),
    Mutation(
        "sync-between-segments-vouches-for-the-next",
        "csrc/log/replay.c",
        "{ return durable_for(r, seq) > pos_make(seq, 0); }",
        "{ return durable_for(r, seq) >= pos_make(seq, 0); }",
        (SYNCS + "test_a_sync_does_not_vouch_for_the_segment_after_it",),
    ),
    Mutation(
        "later-syncs-vouch-for-what-recovery-dropped",
        "csrc/volume/recover.c",
        "    log->vouch_from = max_u64(log->vouch_from, r->replay.damage_end);",
        "    log->vouch_from = 0;",
        (RECOVERY + "test_what_was_dropped_once_stays_dropped",),
    ),
    Mutation(
        "later-syncs-vouch-for-what-recovery-dropped-model",
        "csrc/volume/recover.c",
        "    log->vouch_from = max_u64(log->vouch_from, r->replay.damage_end);",
        "    log->vouch_from = 0;",
        (MODEL,),
    ),
    Mutation(
        "second-header-not-read",
        "csrc/log/segment.c",
        "    int second = read_copy(f, id, h, SECTOR);",
        "    int second = first;",
        (MUTATED + "test_one_fault_in_a_segment",),
    ),
    Mutation(
        "vouches-not-read",
        "csrc/log/replay.c",
        "    r->vouch_count += segment_read_vouches(",
        "    r->vouch_count += 0 * segment_read_vouches(",
        (MUTATED + "test_the_end_of_a_journal_is_lost",),
    ),
    Mutation(
        "missing-last-segment-not-noticed",
        "csrc/log/replay.c",
        "        else if (seq > r->committed_seq && access(path, F_OK))",
        "        else if (false && access(path, F_OK))",
        (MUTATED + "test_one_fault_in_a_segment",),
    ),
    Mutation(
        "vouch-of-a-lost-writer-believed",
        "csrc/log/replay.c",
        "        durable_end = (uint32_t)min_u64(pos_index(f->durable), f->limit);",
        "        durable_end = pos_index(f->durable);",
        (MUTATED + "test_a_vouch_of_a_writer_that_lost_the_log_does_not_count",),
    ),
    Mutation(
        "noted-record-not-synced",
        "csrc/volume/sync.c",
        "        if ((x->unsynced || x->noted) && x->end)",
        "        if (x->unsynced && x->end)",
        (CUT + "test_a_sync_of_names_alone_vouches_for_nothing_new",),
    ),
    Mutation(
        "witness-at-the-end-of-a-segment-not-synced",
        "csrc/log/write_log.c",
        "    s->unsynced |= s->noted;",
        "    s->unsynced |= false;",
        (CUT + "test_a_sealed_segment_keeps_its_last_witness",),
    ),
    # -- section 4: flush
    Mutation(
        "flush-joins-the-running-sync",
        "csrc/volume/sync.c",
        "        list_append(&v->sync.next, &req->link);",
        "        list_append(v->sync.running ? &v->sync.current : &v->sync.next, &req->link);",
        (SYNCS + "test_a_flush_joins_only_a_sync_that_starts_after_it_came",),
    ),
    Mutation(
        "fua-is-ignored",
        "csrc/volume/io.c",
        "        if (!err && (req->flags & GLIDE_FUA))",
        "        if (!err && (req->flags & GLIDE_FUA) && false)",
        (CUT + "test_what_was_flushed_is_there",),
    ),
    Mutation(
        "recovered-segments-count-as-synced",
        "csrc/log/write_log.c",
        "    s->valid = valid;\n    s->unsynced = true;",
        "    s->valid = valid;\n    s->unsynced = false;",
        (CUT + "test_recovered_data_is_durable_after_a_flush",),
    ),
    Mutation(
        "directory-not-synced",
        "csrc/log/write_log.c",
        "    if (!err) {\n        log->dir_unsynced = true;",
        "    if (!err) {",
        (CUT + "test_what_was_flushed_is_there",),
    ),
    Mutation(
        "directory-of-the-log-not-synced",
        "csrc/log/log_dir.c",
        "        else if ((err = sync_parent(copy)))",
        "        else if ((err = 0))",
        (SYNCS + "test_flush_syncs_file_and_directory",),
    ),
    Mutation(
        "failed-sync-forgotten",
        "csrc/volume/sync.c",
        "        if (v->log.segments[i]->sync_failed && v->log.segments[i]->seq > v->committed_seq)\n"
        "            return true;",
        "        if (v->log.segments[i]->sync_failed && v->log.segments[i]->seq > v->committed_seq)\n"
        "            return false;",
        (SYNCS + "test_a_failed_sync_is_sticky",),
    ),
    Mutation(
        "failed-sync-not-durable",
        "csrc/volume/recover.c",
        "    s->sync_failed = f->suspect;",
        "    s->sync_failed = false;",
        (SYNCS + "test_a_failed_sync_is_sticky",),
    ),
    Mutation(
        "failed-sync-not-verified-on-replay",
        "csrc/log/replay.c",
        "r->always_verify || f->suspect ||",
        "r->always_verify ||",
        (SYNCS + "test_a_segment_whose_sync_failed_is_verified_on_replay",),
    ),
    Mutation(
        "uploaders-sync-vouches-after-a-failed-one",
        "csrc/volume/sync.c",
        "    if (!err && !v->frozen && !lost_data(v))",
        "    if (!err && !v->frozen)",
        (SYNCS + "test_no_sync_vouches_for_what_an_earlier_one_lost",),
    ),
]
