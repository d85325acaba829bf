/*
 * The plan of an upload, over flat arrays: a million small writes are as many entries, and none of them becomes an
 * object of Python. Made by one thread; from glide_plan_cut on it only is read.
 */
#include "upload/plan.h"

#include "base/util.h"

#include <stdlib.h>

/* The sectors of a block that lie within a volume of `size` bytes. */
static uint32_t sectors_within(uint64_t block, uint64_t size)
{
    uint64_t start = block * GLIDE_BLOCK;

    if (start >= size)
        return 0;
    uint64_t sectors = div_up(size - start, GLIDE_SECTOR);
    return sectors >= GLIDE_BLOCK_SECTORS ? UINT32_MAX : (1u << sectors) - 1;
}

static int count_chunks(struct upload_plan *p, uint64_t size)
{
    uint64_t count = 0;

    for (uint64_t i = 0; i < p->entry_count; i++)
        count += !i || p->entries[i].block / GLIDE_GROUP != p->entries[i - 1].block / GLIDE_GROUP;
    p->chunks = calloc(count + 1, sizeof(*p->chunks));
    if (!p->chunks)
        return fail(-ENOMEM, "no memory to plan an upload of %llu blocks", (unsigned long long)p->entry_count);
    for (uint64_t i = 0; i < p->entry_count; i++) {
        const struct glide_entry *e = &p->entries[i];
        uint64_t chunk = e->block / GLIDE_GROUP;
        uint32_t within = sectors_within(e->block, size);
        if (!p->chunk_count || p->chunks[p->chunk_count - 1].chunk != chunk)
            p->chunks[p->chunk_count++].chunk = chunk;
        struct glide_chunk *c = &p->chunks[p->chunk_count - 1];
        c->whole += within && (within & ~(e->mask | e->zero_mask)) == 0;
        c->zeros += e->zero_mask != 0;
    }
    return 0;
}

int glide_plan_open(glide_gather *gather, uint64_t size, glide_plan **out)
{
    struct upload_plan *p = calloc(1, sizeof(*p));

    *out = NULL;
    if (!p)
        return -ENOMEM;
    p->gather = gather;
    p->entry_count = glide_gather_entries(gather, &p->entries);
    int err = count_chunks(p, size);
    if (err)
        glide_plan_close(p);
    else
        *out = p;
    return err;
}

uint64_t glide_plan_chunks(glide_plan *p, const struct glide_chunk **out)
{
    *out = p->chunks;
    return p->chunk_count;
}

/* ---- cutting --------------------------------------------------------------------------------------- */

struct cutter {
    struct upload_plan *plan;
    struct glide_pack_job job; /* the pack that is being filled */
    uint64_t pack_bytes, max_items;
};

static int end_job(struct cutter *c)
{
    struct upload_plan *p = c->plan;

    if (!c->job.count)
        return 0;
    if (!(p->job_count & (p->job_count - 1))) { /* room grows by the power of two */
        uint64_t room = p->job_count ? 2 * p->job_count : 1;
        struct glide_pack_job *jobs = realloc(p->jobs, room * sizeof(*jobs));
        if (!jobs)
            return -ENOMEM;
        p->jobs = jobs;
    }
    p->jobs[p->job_count++] = c->job;
    c->job = (struct glide_pack_job){.first = p->item_count};
    return 0;
}

static int add_item(struct cutter *c, const struct glide_entry *item)
{
    uint64_t plain = (uint64_t)__builtin_popcount(item->mask) * GLIDE_SECTOR;
    int err = c->job.plain + plain > c->pack_bytes || c->job.count >= c->max_items ? end_job(c) : 0;

    c->plan->items[c->plan->item_count++] = *item;
    c->job.count++;
    c->job.plain += plain;
    return err;
}

/* `*at` is the next block of `*run`, which lies below `end`. */
static int add_zeros(struct cutter *c, const struct glide_extent **run, uint64_t *at, uint64_t end)
{
    uint64_t stop = min_u64((*run)->block + (*run)->count, end);
    int err = 0;

    for (; *at < stop && !err; (*at)++)
        err = add_item(c, &(struct glide_entry){.block = *at, .zero_mask = UINT32_MAX});
    if (*at == (*run)->block + (*run)->count)
        *at = (++*run)->block; /* behind the last one is an empty one */
    return err;
}

static int cut(struct cutter *c, const uint8_t *keep, const struct glide_extent *zero)
{
    const struct upload_plan *p = c->plan;
    const struct glide_chunk *chunk = p->chunks;
    uint64_t at = zero->block;
    int err = 0;

    for (uint64_t i = 0; i < p->entry_count && !err; i++) {
        struct glide_entry item = p->entries[i];
        while (zero->count && at < item.block && !err)
            err = add_zeros(c, &zero, &at, item.block);
        while (chunk->chunk != item.block / GLIDE_GROUP)
            chunk++;
        if (!keep[chunk - p->chunks])
            item.zero_mask = 0;
        if (!err && (item.mask || item.zero_mask))
            err = add_item(c, &item);
    }
    while (zero->count && !err)
        err = add_zeros(c, &zero, &at, UINT64_MAX);
    return err ? err : end_job(c);
}

int glide_plan_cut(glide_plan *p, const uint8_t *keep, const struct glide_extent *zeros, uint64_t zero_count,
                   uint64_t pack_bytes, uint64_t max_items)
{
    struct cutter c = {.plan = p, .pack_bytes = pack_bytes, .max_items = max_items};
    uint64_t count = p->entry_count;

    if (p->items || !max_items)
        return fail(-EINVAL, "a plan is cut once, into packs of one item at least");
    struct glide_extent *runs = calloc(zero_count + 1, sizeof(*runs));
    for (uint64_t i = 0; i < zero_count && runs; i++) {
        runs[i] = zeros[i];
        count += zeros[i].count;
    }
    p->items = runs ? calloc(count + 1, sizeof(*p->items)) : NULL;
    int err = p->items ? cut(&c, keep, runs) : -ENOMEM;
    free(runs);
    return err ? fail(err, "no memory to plan an upload of %llu blocks", (unsigned long long)count) : 0;
}

uint64_t glide_plan_jobs(glide_plan *p, const struct glide_pack_job **out)
{
    *out = p->jobs;
    return p->job_count;
}

uint64_t glide_plan_items(glide_plan *p, const struct glide_entry **out)
{
    *out = p->items;
    return p->item_count;
}

void glide_plan_close(glide_plan *p)
{
    free(p->chunks);
    free(p->items);
    free(p->jobs);
    free(p);
}
