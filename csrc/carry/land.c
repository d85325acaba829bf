/*
 * From the payloads of a block to its answer, in one go: decompress, verify, put together, cache, install. A block
 * that is one raw payload is hashed and cached where it was received. Nothing is believed that does not have the hash
 * of its index entry.
 */
#include "carry/carrier.h"

#include "base/payload_hash.h"
#include "volume/install.h"

#include <string.h>
#include <zstd.h>

#define PINNED_AT_ONCE 8 /* the smallest cache has no more slots */

/* The verified plain bytes of a payload: in `scratch`, or where they are. NULL: it is damaged. */
static const uint8_t *decode(const struct carry_task *task, const struct glide_part *part)
{
    uint8_t *scratch = task->thread->scratch;
    const struct get *get = &task->gets[part->pack];
    const uint8_t *stored = get->data + (part->offset - get->offset), *plain = stored;
    uint32_t length = (uint32_t)__builtin_popcount(part->mask) * GLIDE_SECTOR;
    uint8_t hash[16];

    if (part->stored < length) {
        size_t n = ZSTD_decompressDCtx(task->thread->decompressor, scratch, length, stored, part->stored);
        if (ZSTD_isError(n) || n != length)
            return NULL;
        plain = scratch;
    }
    payload_hash(plain, length, hash);
    return memcmp(hash, part->hash, 16) ? NULL : plain;
}

/* The 128 KiB of a block and their hash; NULL: a payload is damaged. */
static const uint8_t *assemble(const struct carry_task *task, const struct glide_block_plan *plan, uint8_t hash[16])
{
    const struct glide_part *parts = task->parts + plan->first;
    uint8_t *block = task->thread->scratch + GLIDE_BLOCK;

    if (plan->count == 1 && parts[0].mask == GLIDE_FULL_MASK) {
        memcpy(hash, parts[0].hash, 16);
        return decode(task, &parts[0]);
    }
    memset(block, 0, GLIDE_BLOCK);
    for (uint32_t i = plan->count; i-- > 0;) {
        const uint8_t *plain = parts[i].mask ? decode(task, &parts[i]) : block;
        if (!plain)
            return NULL;
        glide_block_overlay(block, parts[i].mask, parts[i].zero_mask, plain);
    }
    payload_hash(block, GLIDE_BLOCK, hash);
    return block;
}

/* Slots that were filled and are not answered yet. */
struct answers {
    struct glide_install list[PINNED_AT_ONCE];
    uint32_t count;
};

static int post(struct engine *e, const struct carry_task *task, struct answers *answers)
{
    int err = answers->count ? install_by_cookie(e, task->volume, task->stamp, answers->list, answers->count) : 0;

    answers->count = 0;
    return err == -ESHUTDOWN ? 0 : err; /* the volume is gone, and with it who waits */
}

static int land_block(struct engine *e, const struct carry_task *task, const struct glide_block_plan *plan,
                      struct answers *answers)
{
    struct glide_fill fill = {.block = plan->block};
    struct glide_slot slot;

    fill.data = assemble(task, plan, fill.hash);
    if (!fill.data)
        return -EUCLEAN;
    int err = cache_insert(&e->cache, plan->key, fill.hash, fill.data, &slot);
    if (err == -EAGAIN || err == -ESHUTDOWN)
        return err;
    if (err) { /* the disk of the cache: without it */
        err = plan->block == task->leave ? 0 : lend_by_cookie(e, task->volume, task->stamp, &fill);
        return err == -ESHUTDOWN ? 0 : err;
    }
    if (plan->block == task->leave) {
        cache_unpin(&e->cache, slot.slot);
        return 0;
    }
    answers->list[answers->count++] = (struct glide_install){
        .block = plan->block, .count = 1, .slot = slot.slot, .generation = slot.generation, .kind = GLIDE_INSTALL_SLOT};
    return answers->count == PINNED_AT_ONCE ? post(e, task, answers) : 0;
}

int land(struct carry_task *task)
{
    struct engine *e = task->thread->engine;
    struct answers answers = {.count = 0};
    int first = 0;

    if (!task->thread->decompressor && !(task->thread->decompressor = ZSTD_createDCtx()))
        return -ENOMEM;
    task->result.order = atomic_load(&e->fault_order) + 1;
    for (uint32_t i = 0; i < task->plan_count; i++) { /* the others are good, whatever becomes of one */
        int err = land_block(e, task, &task->plans[i], &answers);
        first = first ? first : err;
    }
    int err = post(e, task, &answers);
    return first ? first : err;
}

void land_free(struct carrier_thread *t) { ZSTD_freeDCtx(t->decompressor); }
