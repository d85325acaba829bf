/* The state of a volume, asked of its worker, and its counters, read as they are. */
#include "volume/fault.h"
#include "volume/volume.h"

#include <string.h>

static uint64_t count_parked(const struct volume *v)
{
    uint64_t n = v->waiting;

    list_each(at, &v->batch)
        n++;
    list_each(at, &v->sync.store)
        n++;
    return n;
}

static uint64_t longest_wait_ns(struct volume *v)
{
    const struct list *lists[] = {&v->batch, &v->sync.store};
    uint64_t now = now_ns(), longest = fault_longest_wait_ns(v, now);

    for (size_t i = 0; i < sizeof(lists) / sizeof(lists[0]); i++)
        list_each(at, lists[i]) {
            uint64_t ns = elapsed_ns(now, container_of(at, struct io_req, link)->start_ns);
            longest = ns > longest ? ns : longest;
        }
    return longest;
}

/* On the volume's worker. */
static void tell(struct volume *v, struct glide_volume_info *out)
{
    *out = (struct glide_volume_info){.size = atomic_load(&v->size),
                                      .sealed_seq = log_sealed_seq(&v->log),
                                      .committed_seq = v->committed_seq,
                                      .active_bytes = v->log.active ? v->log.active->bytes : 0,
                                      .map_bytes = log_map_bytes(&v->map) + block_map_bytes(&v->base),
                                      .parked = count_parked(v),
                                      .longest_wait_ns = longest_wait_ns(v),
                                      .connections = v->client_count,
                                      .failed = (uint32_t)v->failed};
    bool dead = true;
    for (uint32_t i = 0; i < v->log.count; i++) {
        const struct log_segment *s = v->log.segments[i];
        out->first_seq = i ? out->first_seq : s->seq;
        out->last_seq = s->seq;
        dead = dead && s != v->log.active && !log_map_live(&v->map, s->seq);
        out->dead_seq = dead ? s->seq : out->dead_seq;
        out->oldest_ns = i ? out->oldest_ns : s->first_ns;
        out->log_bytes += s->bytes;
        if (s->seq <= v->committed_seq)
            continue;
        out->dirty_bytes += s->valid ? (uint64_t)s->end * SECTOR : 0;
        if (s->valid && (!out->oldest_dirty_ns || s->first_ns < out->oldest_dirty_ns))
            out->oldest_dirty_ns = s->first_ns;
    }
}

struct info_call {
    glide_volume *const *volumes;
    struct glide_volume_info *out;
    uint32_t count;
    uint32_t told;
};

/* Of each volume that is this worker's: a volume keeps its worker for life. */
static int tell_own(struct worker *w, void *arg)
{
    struct info_call *c = arg;

    for (uint32_t i = 0; i < c->count; i++) {
        if (c->volumes[i]->worker == w) {
            tell(c->volumes[i], &c->out[i]);
            c->told++;
        }
    }
    return 0;
}

static bool has_any(const struct worker *w, const struct info_call *c)
{
    for (uint32_t i = 0; i < c->count; i++) {
        if (c->volumes[i]->worker == w)
            return true;
    }
    return false;
}

int glide_volume_info_get(glide_volume *volume, struct glide_volume_info *out)
{
    return worker_call(volume->worker, tell_own, &(struct info_call){&volume, out, 1, 0});
}

int glide_volumes_info_get(glide_volume *const *volumes, uint32_t count, struct glide_volume_info *out)
{
    struct info_call c = {volumes, out, count, 0};

    memset(out, 0, count * sizeof(*out));
    for (unsigned i = 0; count && i < volumes[0]->engine->worker_count; i++) {
        struct worker *w = &volumes[0]->engine->workers[i];
        if (has_any(w, &c)) /* the others are not woken */
            worker_call(w, tell_own, &c);
    }
    return (int)c.told;
}

int glide_volume_stats_get(glide_volume *volume, struct glide_volume_stats *out)
{
    const struct stats *s = &volume->stats;

    for (int op = 0; op < GLIDE_OPS; op++) {
        out->ops[op] = atomic_load_explicit(&s->ops[op], memory_order_relaxed);
        out->bytes[op] = atomic_load_explicit(&s->bytes[op], memory_order_relaxed);
        out->errors[op] = atomic_load_explicit(&s->errors[op], memory_order_relaxed);
        out->latency_sum_ns[op] = atomic_load_explicit(&s->latency_sum_ns[op], memory_order_relaxed);
        for (int b = 0; b < GLIDE_HIST_BUCKETS; b++)
            out->latency[op][b] = atomic_load_explicit(&s->latency[op][b], memory_order_relaxed);
    }
    out->faults = atomic_load_explicit(&s->faults, memory_order_relaxed);
    out->log_hits = atomic_load_explicit(&s->log_hits, memory_order_relaxed);
    out->cache_reads = atomic_load_explicit(&s->cache_reads, memory_order_relaxed);
    out->zero_reads = atomic_load_explicit(&s->zero_reads, memory_order_relaxed);
    out->rmw = atomic_load_explicit(&s->rmw, memory_order_relaxed);
    out->syncs = atomic_load_explicit(&s->syncs, memory_order_relaxed);
    out->log_full_waits = atomic_load_explicit(&s->log_full_waits, memory_order_relaxed);
    out->map_full_waits = atomic_load_explicit(&s->map_full_waits, memory_order_relaxed);
    out->paced = atomic_load_explicit(&s->paced, memory_order_relaxed);
    out->shadow_compared = atomic_load_explicit(&s->shadow_compared, memory_order_relaxed);
    out->shadow_differences = atomic_load_explicit(&s->shadow_differences, memory_order_relaxed);
    out->shadow_changed = atomic_load_explicit(&s->shadow_changed, memory_order_relaxed);
    out->shadow_absent = atomic_load_explicit(&s->shadow_absent, memory_order_relaxed);
    return 0;
}

void glide_volumes_stats_get(glide_volume *const *volumes, uint32_t count, struct glide_volume_stats *out)
{
    for (uint32_t i = 0; i < count; i++)
        glide_volume_stats_get(volumes[i], &out[i]);
}
