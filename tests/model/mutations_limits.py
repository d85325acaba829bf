"""Ways to break what bounds waits, memory and devices, for mutations.py."""

from __future__ import annotations

from mutation import Mutation

TIMEOUTS = "tests/core/test_core_timeouts.py::"
MEMORY = "tests/nbd/test_nbd_memory.py::"
FULL = "tests/core/test_core_full_disk.py::"
DEVICES = "tests/daemon/test_devices.py::"

LIMITS = [
    Mutation(
        "timeout-fails-all-waiters-of-the-block",
        "csrc/volume/fault.c",
        "        if (!is_chosen(s, w)) {",
        "        if (s->tag && !is_chosen(s, w)) {",
        (TIMEOUTS + "test_a_timeout_fails_only_who_waited_that_long",),
    ),
    Mutation(
        "limit-subtracted-from-the-clock",
        "csrc/volume/fault.c",
        "elapsed_ns(s->now_ns, w->req->start_ns) > s->limit_ns",
        "w->req->start_ns <= s->now_ns - s->limit_ns",
        (TIMEOUTS + "test_a_limit_is_no_earlier_on_a_young_clock",),
    ),
    Mutation(
        "hash-without-a-secret",
        "csrc/base/hash.c",
        "    hash_secret[1] |= 1;",
        "    hash_secret[0] = 5, hash_secret[1] = 7, hash_secret[2] = 9;",
        ("tests/core/test_core_hash.py::test_each_process_has_its_own_places",),
    ),
    Mutation(
        "nbd-one-client-takes-all-memory",
        "csrc/transport/nbd/nbd_memory.c",
        " <= unused / SHARE;",
        " <= unused;",
        (MEMORY + "test_a_client_that_comes_late_gets_its_share",),
    ),
    Mutation(
        "nbd-memory-without-a-limit",
        "csrc/transport/nbd/nbd_memory.c",
        "    return used < limit ? limit - used : 0;",
        "    return used < limit ? limit - used : limit;",
        (MEMORY + "test_clients_that_do_not_read_take_no_more_than_the_budget",),
    ),
    Mutation(
        "nbd-stalled-clients-stay",
        "csrc/transport/nbd/nbd_conn.c",
        "    return sending || filling;",
        "    return (sending || filling) && false;",
        (
            MEMORY + "test_who_takes_nothing_is_cut_off",
            MEMORY + "test_who_leaves_a_write_unfinished_is_cut_off",
        ),
    ),
    Mutation(
        "nbd-slow-readers-are-cut",
        "csrc/transport/nbd/nbd_conn.c",
        "    if (queued < c->queued)\n        c->send_ticks = 0;\n",
        "",
        (MEMORY + "test_who_takes_a_little_is_not",),
    ),
    Mutation(
        "ublk-waits-for-an-open-device",
        "glidefs/transport/ublk/device.py",
        "            if error.errno != errno.ETIMEDOUT:\n                raise\n            _say_open(",
        "            if True:\n                raise\n            _say_open(",
        (DEVICES + "test_a_dead_device_that_somebody_has_open_is_not_replaced_in_place",),
    ),
    Mutation(
        "ublk-on-any-kernel",
        "glidefs/transport/ublk/driver.py",
        "    if refused is not None:\n        return refused\n",
        "",
        ("tests/daemon/test_ublk_kernels.py",),
    ),
    Mutation(
        "hints-do-not-give-way",
        "glidefs/formats/reserve.py",
        "        gone = [remove() for remove in self.hints]\n",
        "        gone: list[bool] = []\n",
        (FULL + "test_copies_of_indices_give_way_to_what_frees_the_log",),
    ),
    Mutation(
        "hints-take-the-last-inode",
        "glidefs/manifest/cache.py",
        "            if not reserve.has_files(self._directory) and not self.give_way(1):\n",
        "            if False:\n",
        (FULL + "test_copies_of_indices_give_way_to_what_frees_the_log",),
    ),
    Mutation(
        "missing-log-taken-for-one-not-begun",
        "glidefs/exports/opener.py",
        "        if record.is_view or os.path.isdir(directory):\n",
        "        if record.is_view or not self.places.logs_missing:\n",
        ("tests/forks/test_damaged_files.py::test_a_directory_that_is_lost",),
    ),
    Mutation(
        "committed-segments-are-kept-though-one-is-not-whole",
        "csrc/log/replay.c",
        "    if (!is_whole(f)) {",
        "    if (!f->usable) {",
        ["tests/core/test_core_warm_start.py"],
    ),
    Mutation(
        "committed-segments-are-kept-though-one-between-is-gone",
        "csrc/log/replay.c",
        "    if (r->kept && f->usable && f->header.previous_seq != r->kept)",
        "    if (false)",
        ["tests/core/test_core_warm_start.py"],
    ),
    Mutation(
        "committed-segments-are-kept-though-the-last-is-gone",
        "csrc/log/replay.c",
        "    if (r->kept && r->kept != r->committed_seq)",
        "    if (false)",
        ["tests/core/test_core_warm_start.py"],
    ),
    Mutation(
        "a-leaf-that-goes-keeps-its-segment-alive",
        "csrc/log/log_map.c",
        "i = 0; leaf->used && i < BLOCK_SECTORS",
        "i = 0; i < 0",
        ["tests/core/test_core_warm_start.py"],
    ),
]
