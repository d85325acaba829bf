"""Ways to break vhost-user, for mutations.py."""

from __future__ import annotations

from mutation import Mutation

RING = "csrc/transport/vhost/vhost_ring.c"
REQUEST = "csrc/transport/vhost/vhost_request.c"
HOSTILE = "tests/vhost/test_hostile.py::"
SESSIONS = "tests/vhost/test_sessions.py::"
MOVES = "tests/vhost/test_moves.py::"

VHOST = [
    Mutation(
        "vhost-blames-the-disk-for-the-guests-memory",
        "csrc/volume/io_read.c",
        "    if (!good && x->req->flags & IO_SHARED && !x->bounce) {",
        "    if (0) {",
        (HOSTILE + "test_reads_into_memory_that_goes_blame_no_disk",),
    ),
    Mutation(
        "vhost-memory-of-a-request-goes-with-the-table",
        REQUEST,
        "    r->memory->refs++;",
        "    r->memory->refs += 0;",
        (HOSTILE + "test_a_region_that_goes_lives_until_its_last_request",),
    ),
    Mutation(
        "vhost-a-descriptor-twice",
        RING,
        "    if (r->busy[*head]) {",
        "    if (0) {",
        (HOSTILE + "test_wrong_rings",),
    ),
    Mutation(
        "vhost-an-endless-chain",
        RING,
        "        if (++seen > entries)",
        "        if (++seen > entries + 100000)",
        (HOSTILE + "test_wrong_rings",),
    ),
    Mutation(
        "vhost-a-buffer-beyond-its-region",
        "csrc/transport/vhost/vhost_memory.c",
        "        *length = min_u64(*length, r->at.size - inside);",
        "        *length = min_u64(*length, r->at.size);",
        (HOSTILE + "test_wrong_rings", "tests/vhost/test_requests.py::test_buffers_across_regions"),
    ),
    Mutation(
        "vhost-what-was-in-flight-in-any-order",
        RING,
        "    return x < y ? -1 : x > y;",
        "    return x > y ? -1 : x < y;",
        (SESSIONS + "test_what_a_dead_process_left_is_done_again_in_its_order",),
    ),
    Mutation(
        "vhost-an-answer-that-was-seen-is-done-again",
        RING,
        "    if (record->used_index != r->used_index)\n        end_last_batch(r);",
        "",
        (SESSIONS + "test_a_process_that_died_within_an_answer",),
    ),
    Mutation(
        "vhost-a-record-is-cleared-before-the-answer",
        RING,
        "    __atomic_store_n(&e->inflight, 1, __ATOMIC_RELEASE);",
        "",
        (SESSIONS + "test_the_record_follows_what_is_under_way",),
    ),
    Mutation(
        "vhost-a-logged-write-is-written-again",
        REQUEST,
        "                r->record->entries[head].logged = 1;",
        "                r->record->entries[head].logged = 0;",
        (MOVES + "test_a_write_that_waits_for_its_commit_is_not_done_again",),
    ),
    Mutation(
        "vhost-a-mark-outlives-its-request",
        RING,
        "    e->logged = 0;",
        "",
        (SESSIONS + "test_a_write_that_is_in_the_log_is_not_done_again",),
    ),
    Mutation(
        "vhost-what-was-given-up-is-answered",
        REQUEST,
        "(d->ended && (err || d->volume->frozen))",
        "(d->ended && d->volume->frozen)",
        (SESSIONS + "test_a_front_end_that_comes_back",),
    ),
    Mutation(
        "vhost-the-driver-is-not-told",
        RING,
        "    return first || beyond < (uint16_t)(r->used_index - old);",
        "    return first || beyond + 1 < (uint16_t)(r->used_index - old);",
        ("tests/vhost/test_requests.py::test_what_is_written_is_read",),
    ),
    Mutation(
        "vhost-a-payload-is-not-copied-whole",
        REQUEST,
        "    vhost_gather(c->pieces, HEADER_BYTES, r->buf, length);",
        "    vhost_gather(c->pieces, HEADER_BYTES, r->buf, length - 1);",
        ("tests/vhost/test_requests.py::test_odd_pieces_and_split_headers",),
    ),
    Mutation(
        "vhost-writes-of-a-read-only-device",
        REQUEST,
        "    if (writes(h->type) && d->config.read_only)",
        "    if (0)",
        ("tests/vhost/test_requests.py::test_read_only",),
    ),
    Mutation(
        "vhost-no-cache-and-no-sync",
        REQUEST,
        "    r->io.flags |= d->writeback ? 0 : GLIDE_FUA;",
        "",
        ("tests/vhost/test_requests.py::test_the_write_cache",),
    ),
    Mutation(
        "vhost-a-stop-does-not-wait",
        "csrc/transport/vhost/vhost_queue.c",
        "{ return !r->count && r->again_at == r->again_count; }",
        "{ return r->again_at == r->again_count; }",
        (SESSIONS + "test_a_stop_waits_for_what_is_under_way",),
    ),
    Mutation(
        "vhost-any-descriptor-kicks",
        "glidefs/transport/vhost_user/session.py",
        "!= _EVENTFD:",
        '== "":',
        (HOSTILE + "test_wrong_messages",),
    ),
    Mutation(
        "vhost-a-second-front-end",
        "glidefs/transport/vhost_user/transport.py",
        "        if served.session is not None:\n            if served.refused",
        "        if False:\n            if served.refused",
        (HOSTILE + "test_a_second_front_end_is_told_no",),
    ),
]
