/* The part of engine.h that volumes use; api/engine.c opens and closes the engine. */
#include "volume/engine.h"

#include "volume/volume.h"

#include <stdlib.h>

uint64_t engine_map_bytes(struct engine *e)
{
    pthread_mutex_lock(&e->leaves.lock);
    uint64_t leaves = e->leaves.bytes;
    pthread_mutex_unlock(&e->leaves.lock);
    return leaves + atomic_load(&e->table_bytes);
}

/* ---- space: every worker looks at its volumes ---- */

struct space_task {
    struct task task;
    bool wanted; /* else freed */
};

static void look_around(struct task *task, struct worker *w)
{
    struct space_task *t = container_of(task, struct space_task, task);
    bool freed = false;

    list_each(at, &w->members) {
        struct volume *v = container_of(container_of(at, struct member, link), struct volume, member);
        if (v->frozen)
            continue;
        if (t->wanted)
            freed |= log_drop_spares(&v->log);
        else if (v->blocked)
            volume_want_flush(v);
    }
    free(t);
    if (freed)
        engine_space_freed(w->engine);
}

static void tell_workers(struct engine *e, bool wanted)
{
    for (unsigned i = 0; i < e->worker_count; i++) {
        struct space_task *t = malloc(sizeof(*t));
        if (!t)
            return; /* waiting requests look again at the next tick */
        t->task.run = look_around;
        t->wanted = wanted;
        if (!worker_post(&e->workers[i], &t->task))
            free(t);
    }
}

void engine_space_freed(struct engine *e) { tell_workers(e, false); }
void engine_space_wanted(struct engine *e) { tell_workers(e, true); }

/* ---- volumes by cookie ---- */

/* Add the counters of a volume. Most volumes of a host are idle: their histograms are not looked at. */
static void stats_sum(struct glide_volume_stats *sum, struct volume *v)
{
    struct glide_volume_stats one;
    const uint64_t *from = (const uint64_t *)&one;
    uint64_t *to = (uint64_t *)sum, used = 0;

    _Static_assert(sizeof(one) % sizeof(uint64_t) == 0, "all of it are counters");
    for (int op = 0; op < GLIDE_OPS; op++)
        used += atomic_load_explicit(&v->stats.ops[op], memory_order_relaxed);
    if (!used && !atomic_load_explicit(&v->stats.faults, memory_order_relaxed))
        return;
    glide_volume_stats_get(v, &one);
    for (size_t i = 0; i < sizeof(one) / sizeof(uint64_t); i++)
        to[i] += from[i];
}

int engine_enter(struct engine *e, struct volume *v)
{
    pthread_mutex_lock(&e->open_lock);
    uint64_t *entry = table_insert(&e->open_volumes, v->cookie);
    if (entry)
        *entry = (uint64_t)(uintptr_t)v;
    pthread_mutex_unlock(&e->open_lock);
    return entry ? 0 : -ENOMEM;
}

void engine_leave(struct engine *e, struct volume *v)
{
    pthread_mutex_lock(&e->open_lock);
    const uint64_t *entry = table_find(&e->open_volumes, v->cookie);
    if (entry && *entry == (uint64_t)(uintptr_t)v) {
        stats_sum(&e->gone, v);
        table_remove(&e->open_volumes, v->cookie);
    }
    pthread_mutex_unlock(&e->open_lock);
}

static bool sum_one(uint64_t cookie, uint64_t volume, void *sum)
{
    (void)cookie;
    stats_sum(sum, (struct volume *)(uintptr_t)volume);
    return false; /* it stays */
}

void glide_engine_totals(glide_engine *e, struct glide_volume_stats *out)
{
    pthread_mutex_lock(&e->open_lock);
    *out = e->gone;
    table_filter(&e->open_volumes, sum_one, out);
    pthread_mutex_unlock(&e->open_lock);
}
