/*
 * A rate that several threads share, as a virtual clock (GCRA, the algorithm of ATM traffic shaping): what was
 * admitted is paid for at `due_ns`, and nothing is admitted while that is in the future. After idle time up to
 * PACE_BURST_NS are saved.
 */
#ifndef GLIDE_PACE_H
#define GLIDE_PACE_H

#include "base/util.h"

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#define PACE_BURST_NS 5000000u

struct pace {
    _Atomic uint64_t rate; /* bytes per second, 0 = as they come */
    _Atomic uint64_t due_ns;
};

/* Whether `bytes` may go now; then they are charged. Any thread. */
static inline bool pace_take(struct pace *p, uint64_t bytes)
{
    uint64_t rate = atomic_load_explicit(&p->rate, memory_order_relaxed);

    if (!rate)
        return true;
    uint64_t now = now_ns(), cost = bytes * 1000000000u / rate, due = atomic_load(&p->due_ns), from;
    do {
        from = max_u64(due, now - PACE_BURST_NS);
        if (from > now)
            return false;
    } while (!atomic_compare_exchange_weak(&p->due_ns, &due, from + cost));
    return true;
}

/* What was admitted is still to be paid for, at the new rate. One thread at a time. */
static inline void pace_set(struct pace *p, uint64_t rate)
{
    uint64_t old = atomic_exchange(&p->rate, rate), now = now_ns(), due = atomic_load(&p->due_ns);

    if (rate && due > now)
        atomic_store(&p->due_ns, now + (uint64_t)((double)(due - now) * (double)old / (double)rate));
}

#endif
