/*
 * What blocks are made of. Indices are the bytes of glidefs/formats/pack.py (validated there): a binary search in
 * them costs a cache miss or two, and no object. The rules are those of glidefs/reading/plan.py and manifest/keys.py,
 * and tests/core/test_carry.py compares the two.
 */
#include "base/payload_hash.h"
#include "base/util.h"
#include "volume/engine.h"
#include "volume/install.h"

#include <string.h>

#define MAX_PREFIX 1024u
#define ANSWERS 64u

struct entry { /* of an index; little-endian as the format */
    uint64_t block;
    uint32_t mask, zero_mask, offset, stored;
    uint8_t hash[16];
};
_Static_assert(sizeof(struct entry) == 40, "index entry layout");

#define MERGED_CONTEXT "glidefs 2026 block cache: merged block"
#define PREFIX_CONTEXT "glidefs 2026 block cache: scope of a prefix"

static bool find(const uint8_t *entries, uint32_t count, uint64_t block, struct entry *out)
{
    uint32_t low = 0, high = count;

    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        uint64_t at;
        memcpy(&at, entries + (size_t)middle * sizeof(*out), sizeof(at));
        if (at < block)
            low = middle + 1;
        else
            high = middle;
    }
    if (low == count)
        return false;
    memcpy(out, entries + (size_t)low * sizeof(*out), sizeof(*out));
    return out->block == block;
}

static void make_key(struct glide_block_plan *plan, const struct glide_part *parts, const char *prefix)
{
    uint8_t text[GLIDE_BLOCK_SECTORS * 24 + MAX_PREFIX];

    if (plan->count == 1 && parts[0].mask == GLIDE_FULL_MASK) {
        memcpy(plan->key, parts[0].hash, 16);
    } else {
        for (uint32_t i = 0; i < plan->count; i++) {
            memcpy(text + i * 24, parts[i].hash, 16);
            memcpy(text + i * 24 + 16, &parts[i].mask, 4);
            memcpy(text + i * 24 + 20, &parts[i].zero_mask, 4);
        }
        payload_derive(MERGED_CONTEXT, text, plan->count * 24, plan->key);
    }
    if (prefix) {
        size_t length = strnlen(prefix, MAX_PREFIX);
        memcpy(text, plan->key, 16);
        memcpy(text + 16, prefix, length);
        payload_derive(PREFIX_CONTEXT, text, 16 + length, plan->key);
    }
}

/* The parts that show in a block, newest first; how many. `first` is the number of the first of the packs. */
static uint32_t plan_block(const void *const *entries, const uint32_t *lengths, uint32_t packs, uint32_t first,
                           struct glide_block_plan *plan, struct glide_part *parts)
{
    uint32_t data = 0, seen = 0;
    struct entry e;

    for (uint32_t p = 0; p < packs && seen != GLIDE_FULL_MASK; p++) {
        if (!find(entries[p], lengths[p], plan->block, &e) || !((e.mask | e.zero_mask) & ~seen))
            continue;
        struct glide_part *part = &parts[plan->count++];
        *part = (struct glide_part){
            .mask = e.mask, .zero_mask = e.zero_mask, .offset = e.offset, .stored = e.stored, .pack = first + p};
        memcpy(part->hash, e.hash, 16);
        data |= e.mask & ~seen;
        seen |= e.mask | e.zero_mask;
    }
    plan->state = data ? GLIDE_PLAN_ABSENT : GLIDE_PLAN_ZERO;
    return plan->count;
}

void glide_plan_blocks(const void *const *entries, const uint32_t *lengths, const struct glide_block_group *groups,
                       uint32_t group_count, const uint64_t *blocks, const char *prefix, struct glide_block_plan *plans,
                       struct glide_part *parts)
{
    uint32_t pack = 0, at = 0, used = 0;

    for (uint32_t g = 0; g < group_count; g++) {
        for (uint32_t end = at + groups[g].blocks; at < end; at++) {
            plans[at] = (struct glide_block_plan){.block = blocks[at], .first = used};
            used += plan_block(entries + pack, lengths + pack, groups[g].packs, pack, &plans[at], parts + used);
            if (plans[at].state == GLIDE_PLAN_ABSENT)
                make_key(&plans[at], parts + plans[at].first, prefix);
        }
        pack += groups[g].packs;
    }
}

/* ---- answers ------------------------------------------------------------------------------------- */

/* Post what there is. Of no memory whoever asks again hears. */
static int post(struct engine *e, uint64_t volume, uint64_t stamp, const struct glide_install *answers, uint32_t count)
{
    int err = count ? install_by_cookie(e, volume, stamp, answers, count) : 0;

    return err == -ESHUTDOWN ? 0 : err;
}

/* What to do with a slot that has the key of a plan. */
static void use_slot(struct engine *e, const struct glide_slot *slot, uint64_t leave, struct glide_block_plan *plan,
                     struct glide_install *answers, uint32_t *count)
{
    if (slot->slot == GLIDE_NO_SLOT)
        return;
    plan->state = slot->verified ? GLIDE_PLAN_DONE : GLIDE_PLAN_UNSURE;
    if (!slot->verified || plan->block == leave) {
        cache_unpin(&e->cache, slot->slot);
        return;
    }
    answers[(*count)++] = (struct glide_install){.block = plan->block,
                                                 .count = 1,
                                                 .slot = slot->slot,
                                                 .generation = slot->generation,
                                                 .kind = GLIDE_INSTALL_SLOT};
}

static int answer_some(struct engine *e, uint64_t volume, uint64_t stamp, uint64_t leave,
                       struct glide_block_plan *plans, uint32_t count)
{
    struct glide_install answers[ANSWERS];
    struct glide_slot slots[ANSWERS];
    uint8_t keys[ANSWERS][16];
    uint32_t n = 0, asked = 0, at[ANSWERS];

    for (uint32_t i = 0; i < count; i++) {
        if (plans[i].state != GLIDE_PLAN_ABSENT)
            continue;
        memcpy(keys[asked], plans[i].key, 16);
        at[asked++] = i;
    }
    if (asked && cache_lookup(&e->cache, keys[0], asked, slots))
        for (uint32_t i = 0; i < asked; i++)
            use_slot(e, &slots[i], leave, &plans[at[i]], answers, &n);
    return post(e, volume, stamp, answers, n);
}

int glide_plan_answer(glide_engine *engine, uint64_t volume, uint64_t stamp, uint64_t leave,
                      struct glide_block_plan *plans, uint32_t count, const struct glide_part *parts, uint8_t *used)
{
    int left = 0;

    for (uint32_t at = 0; at < count; at += ANSWERS) {
        int err = answer_some(engine, volume, stamp, leave, plans + at, (uint32_t)min_u64(ANSWERS, count - at));
        if (err)
            return err;
    }
    for (uint32_t i = 0; i < count; i++)
        left += plans[i].state != GLIDE_PLAN_DONE;
    for (uint32_t i = 0; i < count; i++)
        for (uint32_t p = plans[i].first; plans[i].state == GLIDE_PLAN_ABSENT && p < plans[i].first + plans[i].count;
             p++)
            used[parts[p].pack] = 1;
    return left;
}
