#include "volume/engine.h"

#include "carry/carrier.h"
#include "volume/fault.h"
#include "transport/nbd/nbd_conn.h"
#include "volume/volume.h"

#include <sched.h>
#include <stdlib.h>

static unsigned cpu_count(void)
{
    cpu_set_t set;

    return sched_getaffinity(0, sizeof(set), &set) ? 1 : (unsigned)CPU_COUNT(&set);
}

static int check_config(const struct glide_engine_config *c)
{
    uint64_t segment = (uint64_t)c->segment_sectors * SECTOR;

    if (c->segment_sectors < 8 || c->segment_sectors > SEGMENT_MAX_SECTORS)
        return fail(-EINVAL, "a log segment has 8 to %u sectors, not %u", SEGMENT_MAX_SECTORS, c->segment_sectors);
    if (c->log_limit < 4 * segment)
        return fail(-EINVAL, "the log limit must be at least four segments (%llu bytes)",
                    (unsigned long long)(4 * segment));
    if (c->nbd_memory < 2ull * NBD_MAX_LENGTH)
        return fail(-EINVAL, "the memory of NBD connections must be at least %u bytes", 2 * NBD_MAX_LENGTH);
    return 0;
}

int glide_engine_open(const struct glide_engine_config *config, glide_engine **out)
{
    int err = check_config(config);
    struct engine *e = err ? NULL : calloc(1, sizeof(*e));

    *out = NULL;
    if (!e)
        return err ? err : -ENOMEM;
    fail(0, "%s", ""); /* what an earlier call said */
    e->config = *config;
    e->config.cache_dir = NULL; /* the caller's memory */
    e->logs.limit = config->log_limit;
    e->logs.segment_sectors = config->segment_sectors;
    e->nbd = calloc(1, sizeof(*e->nbd));
    if (!e->nbd) {
        free(e);
        return -ENOMEM;
    }
    e->nbd->limit = config->nbd_memory;
    err = cache_open(&e->cache, config->cache_dir, config->cache_bytes, config->standby);
    if (err) {
        free(e->nbd);
        free(e);
        return err;
    }
    leaf_pool_init(&e->leaves);
    outbox_init(&e->faults);
    outbox_init(&e->events);
    outbox_init(&e->shadows);
    list_init(&e->carried);
    pthread_mutex_init(&e->open_lock, NULL);
    table_init(&e->open_volumes);
    err = carrier_open(e, &e->carrier);
    unsigned workers = config->workers ? config->workers : cpu_count();
    workers = workers > 32 ? 32 : workers;
    uint64_t busy_poll_ns = cpu_count() > 1 ? 1000ull * config->busy_poll_us : 0; /* else the client could not run */
    e->workers = calloc(workers, sizeof(*e->workers));
    err = e->workers ? err : -ENOMEM;
    while (!err && e->worker_count < workers) {
        struct worker *w = &e->workers[e->worker_count];
        err = worker_start(w, e, e->worker_count, busy_poll_ns);
        e->worker_count += !err;
        if (!err && !(w->append = malloc(sizeof(*w->append))))
            err = -ENOMEM;
    }
    if (err) {
        glide_engine_close(e);
        return err;
    }
    *out = e;
    return 0;
}

void glide_engine_shutdown(glide_engine *e)
{
    outbox_close(&e->faults);
    outbox_close(&e->events);
    cache_shutdown(&e->cache);
    outbox_close(&e->shadows);
}

void glide_engine_wake(glide_engine *e)
{
    outbox_wake(&e->faults);
    outbox_wake(&e->events);
    outbox_wake(&e->shadows);
}

void glide_engine_end_workers(glide_engine *e)
{
    if (e->workers_ended)
        return;
    e->workers_ended = true;
    for (unsigned i = 0; i < e->worker_count; i++)
        worker_stop(&e->workers[i]);
    for (unsigned i = 0; i < e->worker_count; i++)
        worker_join(&e->workers[i]);
}

void glide_engine_close(glide_engine *e)
{
    cache_shutdown(&e->cache);
    carrier_close(e->carrier);
    glide_engine_end_workers(e);
    for (unsigned i = 0; i < e->worker_count; i++)
        worker_destroy(&e->workers[i]);
    free(e->workers);
    outbox_destroy(&e->faults);
    outbox_destroy(&e->events);
    outbox_destroy(&e->shadows);
    carried_forget(e);
    table_destroy(&e->open_volumes);
    pthread_mutex_destroy(&e->open_lock);
    leaf_pool_destroy(&e->leaves);
    cache_close(&e->cache);
    free(e->nbd);
    free(e);
}

void glide_engine_pace(glide_engine *e, uint64_t bytes_per_second) { pace_set(&e->logs.pace, bytes_per_second); }

void glide_engine_stats_get(glide_engine *e, struct glide_engine_stats *out)
{
    *out = (struct glide_engine_stats){.log_bytes = atomic_load(&e->logs.used),
                                       .log_spare_bytes = atomic_load(&e->logs.spare),
                                       .log_limit = e->logs.limit,
                                       .map_bytes = engine_map_bytes(e),
                                       .map_budget = e->config.map_budget,
                                       .nbd_replies = atomic_load(&e->nbd->used[NBD_REPLIES]),
                                       .nbd_payloads = atomic_load(&e->nbd->used[NBD_PAYLOADS]) +
                                                       atomic_load(&e->nbd->used[NBD_PIPELINE]),
                                       .workers = e->worker_count};
    pthread_mutex_lock(&e->cache.lock);
    out->cache_slots = e->cache.capacity;
    out->cache_used = e->cache.used;
    out->cache_hits = e->cache.hits;
    out->cache_misses = e->cache.misses;
    out->cache_evictions = e->cache.evictions;
    out->cache_lost = e->cache.lost;
    out->cache_errno = (uint64_t)-e->cache.sick;
    pthread_mutex_unlock(&e->cache.lock);
    pthread_mutex_lock(&e->faults.lock);
    out->faults_queued = e->faults.count;
    pthread_mutex_unlock(&e->faults.lock);
}
