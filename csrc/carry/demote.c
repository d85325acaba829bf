/*
 * What a segment that is about to go leaves behind: blocks that are still here are put in the block cache, under the
 * keys by which their plans will look for them, so that what was written here is not read from the store for as long
 * as the cache has room.
 *
 * The content is what guests read. It is that of the plan if nothing of it is newer than the commit which the plan
 * comes from. So every position that the log map has of the block must be in a segment up to `committed`, and one of
 * them in the segment that goes: segments go in order, so nothing younger went meanwhile and is in the base now. The
 * worker looks at this and begins the read in one step, and a read has the positions of its beginning. Beyond that the
 * newest payload must have its hash.
 */
#include "base/payload_hash.h"
#include "volume/fault.h"
#include "volume/io.h"
#include "volume/volume.h"

#include <stdlib.h>
#include <string.h>

#define AT_ONCE 8u

struct demoted {
    struct io_req io;
    struct demotion *all;
    struct glide_block_plan *plan;
    int err; /* positive; 0: `io.buf` has the block */
};

struct demotion {
    struct call call;
    struct volume *v;
    uint64_t segment, committed;
    uint32_t count, pending;
    struct demoted list[AT_ONCE];
    uint8_t *blocks; /* AT_ONCE of them, and one more */
};

/* ---- on the worker ---------------------------------------------------------------------------------- */

/* Whether the block is as it was committed, and the segment has some of it. */
static bool is_leaving(const struct demotion *d, uint64_t block)
{
    uint64_t first = block * BLOCK_SECTORS;
    bool here = false;

    for (uint64_t s = first; s < first + BLOCK_SECTORS; s++) {
        uint64_t pos = log_map_find(&d->v->map, s);
        if (pos_seq(pos) > d->committed)
            return false;
        here |= pos && pos_seq(pos) == d->segment;
    }
    return here;
}

static void done_one(struct demotion *d)
{
    if (--d->pending == 0)
        call_done(&d->call, 0);
}

static void on_read(struct io_req *req, int err)
{
    struct demoted *one = container_of(req, struct demoted, io);

    one->err = err;
    done_one(one->all);
}

static void start(struct call *call, struct worker *w)
{
    struct demotion *d = container_of(call, struct demotion, call);

    (void)w;
    d->pending = 1; /* ours */
    for (uint32_t i = 0; i < d->count; i++) {
        struct demoted *one = &d->list[i];
        one->err = ESTALE;
        if (!is_leaving(d, one->plan->block))
            continue;
        d->pending++;
        io_submit(&one->io);
    }
    done_one(d);
}

/* ---- on the caller's thread --------------------------------------------------------------------------- */

/* The hash of the block, if its newest payload is what the index says. */
static bool verify(const struct demoted *one, const struct glide_part *newest, uint8_t *packed, uint8_t hash[16])
{
    if (newest->mask == GLIDE_FULL_MASK) {
        payload_hash(one->io.buf, GLIDE_BLOCK, hash);
        return !memcmp(hash, newest->hash, 16);
    }
    glide_block_extract(one->io.buf, newest->mask, packed);
    payload_hash(packed, (size_t)__builtin_popcount(newest->mask) * SECTOR, hash);
    if (memcmp(hash, newest->hash, 16))
        return false;
    payload_hash(one->io.buf, GLIDE_BLOCK, hash);
    return true;
}

static int keep(struct demotion *d, const struct demoted *one, const struct glide_part *parts)
{
    const struct glide_part *newest = &parts[one->plan->first];
    struct glide_slot slot;
    uint8_t hash[16];

    if (!verify(one, newest, d->blocks + AT_ONCE * GLIDE_BLOCK, hash))
        return 0;
    int err = cache_insert(&d->v->engine->cache, one->plan->key, hash, one->io.buf, &slot);
    if (err)
        return err;
    cache_unpin(&d->v->engine->cache, slot.slot);
    one->plan->state = GLIDE_PLAN_DONE;
    return 1;
}

static void add(struct demotion *d, struct glide_block_plan *plan)
{
    struct demoted *one = &d->list[d->count];
    uint64_t offset = plan->block * GLIDE_BLOCK;

    *one = (struct demoted){.io = {.volume = d->v,
                                   .buf = d->blocks + (size_t)d->count * GLIDE_BLOCK,
                                   .offset = offset,
                                   .length = GLIDE_BLOCK,
                                   .op = GLIDE_READ,
                                   .flags = IO_INTERNAL | IO_HERE,
                                   .done = on_read},
                            .all = d,
                            .plan = plan};
    d->count++;
}

/* Read and keep what was added. How many; or -errno, of the cache or a volume that closes. */
static int flush(struct demotion *d, const struct glide_part *parts)
{
    int kept = 0, err = d->count ? call_run(d->v->worker, &d->call, start, NULL) : 0;

    for (uint32_t i = 0; i < d->count && !err; i++) {
        int one = d->list[i].err ? 0 : keep(d, &d->list[i], parts);
        kept += one > 0;
        err = one < 0 ? one : 0;
    }
    d->count = 0;
    return err ? err : kept;
}

int glide_volume_demote(glide_volume *volume, uint64_t segment, uint64_t committed, struct glide_block_plan *plans,
                        uint32_t count, const struct glide_part *parts)
{
    struct demotion d = {.v = volume, .segment = segment, .committed = committed};
    int total = 0, kept = 0;

    d.blocks = malloc((AT_ONCE + 1) * (size_t)GLIDE_BLOCK);
    if (!d.blocks)
        return -ENOMEM;
    for (uint32_t i = 0; i < count && kept >= 0; i++) {
        struct glide_slot slot;
        if (plans[i].state != GLIDE_PLAN_ABSENT || !parts[plans[i].first].mask)
            continue;
        if (cache_lookup(&volume->engine->cache, plans[i].key, 1, &slot) && slot.slot != GLIDE_NO_SLOT) {
            cache_unpin(&volume->engine->cache, slot.slot);
            continue;
        }
        add(&d, &plans[i]);
        if (d.count == AT_ONCE)
            total += (kept = flush(&d, parts)) > 0 ? kept : 0;
    }
    if (kept >= 0)
        total += (kept = flush(&d, parts)) > 0 ? kept : 0;
    free(d.blocks);
    return kept < 0 ? kept : total;
}
