/*
 * Answers to faults, and blocks fetched before a fault: Python's threads post
 * them, the volume's worker applies them. Nobody waits for that. Tasks run in
 * the order of their posting, so whatever is posted later, the end of the
 * volume too, finds the answers applied.
 *
 * A slot travels pinned: by the caller, then by the task, until the block map
 * has it. An answer from before the last retire (its stamp tells) is not
 * mapped; its waiters look again.
 */
#include "volume/install.h"

#include "cache/block_cache.h"
#include "volume/engine.h"
#include "volume/fault.h"
#include "volume/volume.h"
#include "loop/worker.h"

#include <stdlib.h>
#include <string.h>

#define PINNED_AT_ONCE 8 /* by one glide_volume_fill: the smallest cache has no more slots */

struct install_task {
    struct task task;
    struct volume *v;
    uint64_t stamp;
    uint32_t count;
    struct glide_install list[];
};

uint64_t glide_volume_stamp(glide_volume *volume) { return atomic_load(&volume->stamp); }

static void install_one(struct volume *v, const struct glide_install *i, bool current)
{
    switch (i->kind) {
    case GLIDE_INSTALL_SLOT:
        if (current)
            block_map_set_slot(&v->base, i->block, i->slot, i->generation);
        fault_resolve(v, i->block, 0);
        cache_unpin(&v->engine->cache, i->slot);
        break;
    case GLIDE_INSTALL_ZERO:
        if (current)
            block_map_set_zero(&v->base, i->block, i->count);
        fault_resolve_range(v, i->block, i->count, 0);
        break;
    case GLIDE_INSTALL_ERROR:
        fault_resolve_range(v, i->block, i->count, i->err > 0 ? i->err : EIO);
        break;
    default:
        fault_resolve_range(v, i->block, i->count, 0);
        break;
    }
}

static void run_install(struct task *task, struct worker *w)
{
    struct install_task *t = container_of(task, struct install_task, task);

    (void)w;
    for (uint32_t i = 0; i < t->count; i++)
        install_one(t->v, &t->list[i], t->stamp == atomic_load(&t->v->stamp));
    volume_count_memory(t->v);
    free(t);
}

int glide_volume_install(glide_volume *volume, uint64_t stamp, const struct glide_install *list, uint32_t count)
{
    struct install_task *t = malloc(sizeof(*t) + count * sizeof(*list));

    if (!t)
        return fail(-ENOMEM, "no memory for %u answers", count);
    t->task.run = run_install;
    t->v = volume;
    t->stamp = stamp;
    t->count = count;
    memcpy(t->list, list, count * sizeof(*list));
    if (worker_post(volume->worker, &t->task))
        return 0;
    free(t);
    return fail(-ESHUTDOWN, "the volume was handed over");
}

struct holes_task {
    struct task task;
    struct volume *v;
    uint64_t stamp;
    uint32_t count;
    struct glide_holes list[];
};

/* Each item is compared anew: what looks again may read the log, and find that it has to bump the stamp. */
static void put_holes(struct volume *v, const struct glide_holes *h, uint64_t stamp)
{
    uint64_t blocks = h->kind == GLIDE_HOLES_PAGE ? (uint64_t)GLIDE_GROUP * GLIDE_GROUP : GLIDE_GROUP;

    if (stamp != atomic_load(&v->stamp))
        return;
    if (h->kind == GLIDE_HOLES_PAGE)
        block_map_put_page(&v->base, h->number, h->zeros);
    else
        block_map_put_chunk(&v->base, h->number, h->zeros);
    fault_resolve_zeros(v, h->number * blocks, blocks);
}

static void answer_holes(struct volume *v, const struct glide_holes *h, uint64_t stamp)
{
    if (h->kind != GLIDE_HOLES_ERROR)
        put_holes(v, h, stamp);
    if (h->kind != GLIDE_HOLES_PAGE)
        fault_resolve_holes(v, h->number, h->kind == GLIDE_HOLES_ERROR ? h->err : 0);
}

static void run_holes(struct task *task, struct worker *w)
{
    struct holes_task *t = container_of(task, struct holes_task, task);

    (void)w;
    for (uint32_t i = 0; i < t->count; i++)
        answer_holes(t->v, &t->list[i], t->stamp);
    volume_count_memory(t->v);
    free(t);
}

int glide_volume_install_holes(glide_volume *volume, uint64_t stamp, const struct glide_holes *list, uint32_t count)
{
    struct holes_task *t = malloc(sizeof(*t) + count * sizeof(*list));

    if (!t)
        return fail(-ENOMEM, "no memory for %u answers", count);
    t->task.run = run_holes;
    t->v = volume;
    t->stamp = stamp;
    t->count = count;
    memcpy(t->list, list, count * sizeof(*list));
    if (worker_post(volume->worker, &t->task))
        return 0;
    free(t);
    return fail(-ESHUTDOWN, "the volume was handed over");
}

int install_by_cookie(struct engine *e, uint64_t cookie, uint64_t stamp, const struct glide_install *list,
                      uint32_t count)
{
    pthread_mutex_lock(&e->open_lock);
    const uint64_t *entry = table_find(&e->open_volumes, cookie);
    int err = entry ? glide_volume_install((struct volume *)(uintptr_t)*entry, stamp, list, count) : -ESHUTDOWN;
    pthread_mutex_unlock(&e->open_lock);
    for (uint32_t i = 0; err && i < count; i++)
        if (list[i].kind == GLIDE_INSTALL_SLOT)
            cache_unpin(&e->cache, list[i].slot);
    return err;
}

struct lend_task {
    struct task task;
    struct volume *v;
    uint64_t stamp, block;
    uint8_t data[GLIDE_BLOCK];
};

static void run_lend(struct task *task, struct worker *w)
{
    struct lend_task *t = container_of(task, struct lend_task, task);
    struct volume *v = t->v;

    (void)w;
    if (t->stamp == atomic_load(&v->stamp)) {
        v->lent = t->data;
        v->lent_block = t->block;
    }
    fault_resolve(v, t->block, 0);
    v->lent = NULL;
    free(t);
}

/* Give a block to who waits for it, and keep it nowhere. */
static int lend(struct volume *v, uint64_t stamp, const struct glide_fill *fill)
{
    struct lend_task *t = malloc(sizeof(*t));

    if (!t)
        return fail(-ENOMEM, "no memory for a block");
    t->task.run = run_lend;
    t->v = v;
    t->stamp = stamp;
    t->block = fill->block;
    memcpy(t->data, fill->data, GLIDE_BLOCK);
    if (worker_post(v->worker, &t->task))
        return 0;
    free(t);
    return fail(-ESHUTDOWN, "the volume was handed over");
}

int lend_by_cookie(struct engine *e, uint64_t cookie, uint64_t stamp, const struct glide_fill *fill)
{
    pthread_mutex_lock(&e->open_lock);
    const uint64_t *entry = table_find(&e->open_volumes, cookie);
    int err = entry ? lend((struct volume *)(uintptr_t)*entry, stamp, fill) : -ESHUTDOWN;
    pthread_mutex_unlock(&e->open_lock);
    return err;
}

/* Insert up to PINNED_AT_ONCE blocks and install them. How many were done; the error if none. */
static int fill_some(struct volume *v, uint64_t stamp, const struct glide_fill *list, uint32_t count)
{
    struct glide_install answers[PINNED_AT_ONCE];
    struct glide_slot slot;
    uint32_t n = 0;
    int err = 0;

    for (; n < count && n < PINNED_AT_ONCE; n++) {
        err = cache_insert(&v->engine->cache, list[n].key, list[n].hash, list[n].data, &slot);
        if (err)
            break;
        answers[n] = (struct glide_install){.block = list[n].block,
                                            .count = 1,
                                            .slot = slot.slot,
                                            .generation = slot.generation,
                                            .kind = GLIDE_INSTALL_SLOT};
    }
    if (!n)
        return err;
    err = glide_volume_install(v, stamp, answers, n);
    for (uint32_t i = 0; err && i < n; i++)
        cache_unpin(&v->engine->cache, answers[i].slot);
    return err ? err : (int)n;
}

int glide_volume_fill(glide_volume *volume, uint64_t stamp, const struct glide_fill *list, uint32_t count, int through)
{
    uint32_t done = 0;

    while (done < count) {
        int n = through ? -EIO : fill_some(volume, stamp, list + done, count - done);
        if (n < 0 && n != -EAGAIN && n != -ESHUTDOWN)
            n = lend(volume, stamp, list + done) ? n : 1;
        if (n < 0)
            return done ? (int)done : n;
        done += (uint32_t)n;
    }
    return (int)done;
}
