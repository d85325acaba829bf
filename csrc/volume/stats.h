/*
 * Counters and latency histograms of a volume. Written by its worker only,
 * read by any thread: relaxed atomics without read-modify-write, so a count
 * costs a load and a store.
 *
 * Histogram bucket b >= 1 holds latencies in [L(b), L(b + 1)) where
 * L(b) = 256 ns * 2^(b / 2) for even b, and 1.5 times L(b - 1) for odd b;
 * bucket 0 is all below L(1) = 384 ns, the last is open-ended (beyond 9 minutes).
 */
#ifndef GLIDE_STATS_H
#define GLIDE_STATS_H

#include "glide_core_internal.h"

#include <stdatomic.h>

struct stats {
    _Atomic uint64_t ops[GLIDE_OPS], bytes[GLIDE_OPS], errors[GLIDE_OPS];
    _Atomic uint64_t latency[GLIDE_OPS][GLIDE_HIST_BUCKETS];
    _Atomic uint64_t latency_sum_ns[GLIDE_OPS];
    _Atomic uint64_t faults, log_hits, cache_reads, zero_reads, rmw, syncs, log_full_waits, map_full_waits, paced;
    _Atomic uint64_t shadow_compared, shadow_differences, shadow_changed, shadow_absent;
};

static inline void stat_add(_Atomic uint64_t *counter, uint64_t n)
{
    atomic_store_explicit(counter, atomic_load_explicit(counter, memory_order_relaxed) + n, memory_order_relaxed);
}

static inline uint32_t stats_bucket(uint64_t ns)
{
    uint64_t units = ns >> 8;

    if (units < 1)
        return 0;
    uint32_t log2 = 63 - (uint32_t)__builtin_clzll(units);
    uint32_t half = log2 ? (units >> (log2 - 1)) & 1 : (ns >> 7) & 1; /* second half of the octave */
    uint32_t bucket = 2 * log2 + half;
    return bucket < GLIDE_HIST_BUCKETS ? bucket : GLIDE_HIST_BUCKETS - 1;
}

static inline void stats_done(struct stats *s, int op, uint64_t bytes, int err, uint64_t ns)
{
    stat_add(&s->ops[op], 1);
    stat_add(&s->bytes[op], bytes);
    if (err)
        stat_add(&s->errors[op], 1);
    stat_add(&s->latency[op][stats_bucket(ns)], 1);
    stat_add(&s->latency_sum_ns[op], ns);
}

#endif
