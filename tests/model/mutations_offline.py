"""Ways to break what reads a log offline, for mutations.py."""

from __future__ import annotations

from mutation import Mutation

GATHER = "tests/core/test_core_gather.py::"
MUTATED = "tests/core/test_core_mutations.py::"
DAMAGED = "tests/forks/test_damaged_logs.py::"

OFFLINE = [
    Mutation(
        "offline-loss-is-not-said",
        "glidefs/volume/log_damage.py",
        "    if damage.losses:\n        raise",
        "    if False:\n        raise",
        (DAMAGED + "test_a_damaged_log_is_exported_on_demand_only",),
    ),
    Mutation(
        "offline-loss-shows-what-is-older",
        "csrc/volume/gather.c",
        "log_map_write(&g->map, lost->record->sector,",
        "log_map_write(&g->map, lost->record->sector + 1,",
        (GATHER + "test_what_is_lost_and_written_again_is_not_missed",),
    ),
    Mutation(
        "offline-run-goes-on-into-what-is-lost",
        "csrc/volume/gather.c",
        "BLOCK_SECTORS && mask >> (i + n) & 1 && ",
        "BLOCK_SECTORS && ",
        (MUTATED + "test_one_fault_in_a_segment",),
    ),
    Mutation(
        "offline-end-of-the-log-not-looked-for",
        "csrc/volume/gather.c",
        "    if (!err && last == UINT64_MAX)",
        "    if (false)",
        (MUTATED + "test_segments_in_each_others_place",),
    ),
    Mutation(
        "offline-zeros-over-what-is-lost",
        "csrc/volume/gather.c",
        "        e->zero_mask = ~(e->mask | lost);",
        "        e->zero_mask = ~e->mask;",
        (GATHER + "test_what_is_lost_and_written_again_is_not_missed",),
    ),
    Mutation(
        "offline-foreign-file-ends-what-is-whole",
        "csrc/log/replay.c",
        "    if ((!r->calls->lost && !store_has(r, f)) || err == -ENOMEM)",
        "    if (true)",
        (DAMAGED + "test_a_file_of_another_log_is_damage",),
    ),
    Mutation(
        "offline-segments-that-go-are-damage",
        "glidefs/exports/logs/verbs.py",
        "            if log_segments(directory)[:1] == found and ",
        "            if True or ",
        (DAMAGED + "test_segments_that_go_while_they_are_read_are_no_damage",),
    ),
    Mutation(
        "inspect-reads-the-first-header-only",
        "csrc/log/segment.c",
        "    for (uint32_t i = 0; i < 2; i++) {\n        if (length < i * SECTOR",
        "    for (uint32_t i = 0; i < 1; i++) {\n        if (length < i * SECTOR",
        (MUTATED + "test_a_look_at_a_segment_needs_one_header",),
    ),
    Mutation(
        "offline-last-segment-excused-by-what-the-store-has",
        "csrc/volume/gather.c",
        "        r.committed_seq = min_u64(r.committed_seq, seqs[from] - 1);",
        "        (void)from;",
        (GATHER + "test_segments_that_nobody_knows_the_store_to_have",),
    ),
    Mutation(
        "a-log-without-a-name-is-not-said",
        "glidefs/exports/logs/lost_records.py",
        "        if found.segments and not aside",
        "        if False and not aside",
        ("tests/forks/test_damaged_files.py::test_a_record_of_a_fork_that_the_store_does_not_know",),
    ),
]
