/*
 * The value of a group in the table is ALL, NONE, or the address of its bitmap. A bitmap becomes ALL when its last bit
 * is set, and goes with its last one. To take one thing out of ALL needs a bitmap: where there is no memory for that
 * the group is forgotten, which costs a fault.
 */
#include "cache/zero_groups.h"

#include "base/util.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define ALL 1u
#define NONE 2u

struct bitmap {
    uint64_t bits[GROUP_WORDS];
    uint32_t used; /* bits that are set */
    bool known;    /* the others are not zero */
};

static struct bitmap *bitmap_of(uint64_t value) { return (struct bitmap *)(uintptr_t)value; }

static bool has_bitmap(uint64_t value) { return value > NONE; }

static bool bit(const struct bitmap *b, uint32_t i) { return b->bits[i / 64] >> i % 64 & 1; }

void zero_groups_init(struct zero_groups *g)
{
    table_init(&g->groups);
    g->bytes = 0;
}

static void bitmap_free(struct zero_groups *g, uint64_t value)
{
    if (!has_bitmap(value))
        return;
    free(bitmap_of(value));
    g->bytes -= sizeof(struct bitmap);
}

static bool drop_any(uint64_t group, uint64_t value, void *arg)
{
    (void)group;
    bitmap_free(arg, value);
    return true;
}

void zero_groups_destroy(struct zero_groups *g)
{
    table_filter(&g->groups, drop_any, g);
    table_destroy(&g->groups);
}

uint64_t zero_groups_bytes(const struct zero_groups *g) { return g->groups.bytes + g->bytes; }

bool zero_groups_find(const struct zero_groups *g, uint64_t at)
{
    const uint64_t *value = table_find(&g->groups, at / GLIDE_GROUP);

    if (!value || !has_bitmap(*value))
        return value && *value == ALL;
    return bit(bitmap_of(*value), at % GLIDE_GROUP);
}

/* The first bit from `i` on that is not `same`, at most GLIDE_GROUP. */
static uint32_t run_end(const struct bitmap *b, uint32_t i, bool same)
{
    while (i < GLIDE_GROUP) {
        uint64_t others = (same ? ~b->bits[i / 64] : b->bits[i / 64]) >> i % 64;
        if (others)
            return i + (uint32_t)__builtin_ctzll(others);
        i = (i / 64 + 1) * 64;
    }
    return GLIDE_GROUP;
}

enum zero_state zero_groups_run(const struct zero_groups *g, uint64_t at, uint64_t limit, uint64_t *end)
{
    uint64_t first = at - at % GLIDE_GROUP;
    const uint64_t *value = table_find(&g->groups, at / GLIDE_GROUP);

    *end = min_u64(limit, first + GLIDE_GROUP);
    if (!value || !has_bitmap(*value))
        return !value ? ZERO_UNKNOWN : *value == ALL ? ZERO_IS : ZERO_NOT;
    const struct bitmap *b = bitmap_of(*value);
    bool zero = bit(b, at % GLIDE_GROUP);
    *end = min_u64(limit, first + run_end(b, at % GLIDE_GROUP, zero));
    return zero ? ZERO_IS : b->known ? ZERO_NOT : ZERO_UNKNOWN;
}

/* ---- changes -------------------------------------------------------------------------------- */

static struct bitmap *bitmap_new(struct zero_groups *g)
{
    struct bitmap *b = calloc(1, sizeof(*b));

    if (b)
        g->bytes += sizeof(*b);
    return b;
}

/* The group's bitmap, for a bit that is to be set: NULL and 0 if all are already, -ENOMEM. */
static int open_group(struct zero_groups *g, uint64_t group, struct bitmap **out)
{
    uint64_t *value = table_insert(&g->groups, group);

    *out = NULL;
    if (!value)
        return -ENOMEM;
    if (*value == ALL)
        return 0;
    if (!has_bitmap(*value)) {
        struct bitmap *b = bitmap_new(g);
        if (!b) {
            if (!*value)
                table_remove(&g->groups, group);
            return -ENOMEM;
        }
        b->known = *value == NONE;
        *value = (uint64_t)(uintptr_t)b;
    }
    *out = bitmap_of(*value);
    return 0;
}

/* What is shorter to say, or not worth saying. */
static void settle(struct zero_groups *g, uint64_t group, struct bitmap *b)
{
    if (b->used && b->used < GLIDE_GROUP)
        return;
    uint64_t *value = table_find(&g->groups, group), now = b->used ? ALL : b->known ? NONE : 0;
    *value = now;
    bitmap_free(g, (uint64_t)(uintptr_t)b);
    if (!now)
        table_remove(&g->groups, group);
}

static void set_all(struct zero_groups *g, uint64_t *value)
{
    bitmap_free(g, *value);
    *value = ALL;
}

int zero_groups_set(struct zero_groups *g, uint64_t at, uint64_t end)
{
    uint64_t group = at / GLIDE_GROUP;
    struct bitmap *b;

    if (end - at == GLIDE_GROUP) { /* no bitmap in between */
        uint64_t *value = table_insert(&g->groups, group);
        if (value)
            set_all(g, value);
        return value ? 0 : -ENOMEM;
    }
    int err = open_group(g, group, &b);
    for (; b && at < end; at++) {
        uint64_t mask = 1ull << at % 64, *word = &b->bits[at % GLIDE_GROUP / 64];
        b->used += !(*word & mask);
        *word |= mask;
    }
    if (b)
        settle(g, group, b);
    return err;
}

int zero_groups_put(struct zero_groups *g, uint64_t group, const uint64_t bits[GROUP_WORDS])
{
    uint32_t count = 0;
    struct bitmap *b;

    for (uint32_t i = 0; i < GROUP_WORDS; i++)
        count += (uint32_t)__builtin_popcountll(bits[i]);
    if (count == GLIDE_GROUP)
        return zero_groups_set(g, group * GLIDE_GROUP, (group + 1) * GLIDE_GROUP);
    uint64_t *value = count ? NULL : table_insert(&g->groups, group);
    if (value && !*value)
        *value = NONE;
    if (value && !has_bitmap(*value))
        return 0;
    int err = open_group(g, group, &b);
    if (!b)
        return err;
    b->used = 0;
    b->known = true;
    for (uint32_t i = 0; i < GROUP_WORDS; i++) {
        b->bits[i] |= bits[i];
        b->used += (uint32_t)__builtin_popcountll(b->bits[i]);
    }
    settle(g, group, b);
    return 0;
}

static void clear_bits(struct bitmap *b, uint32_t from, uint32_t to)
{
    for (uint32_t i = from; i < to; i++) {
        uint64_t mask = 1ull << i % 64, *word = &b->bits[i / 64];
        b->used -= (*word & mask) != 0;
        *word &= ~mask;
    }
    b->known = false;
}

/* What is left of a group without its [from, to). 0: nothing that is worth an entry. */
static uint64_t value_without(struct zero_groups *g, uint64_t value, uint32_t from, uint32_t to)
{
    bool all = to - from == GLIDE_GROUP;
    struct bitmap *b = has_bitmap(value) ? bitmap_of(value) : value == ALL && !all ? bitmap_new(g) : NULL;

    if (!b)
        return 0;
    if (value == ALL) {
        memset(b->bits, 0xff, sizeof(b->bits));
        b->used = GLIDE_GROUP;
    }
    if (!all)
        clear_bits(b, from, to);
    if (!all && b->used)
        return (uint64_t)(uintptr_t)b;
    bitmap_free(g, (uint64_t)(uintptr_t)b);
    return 0;
}

struct range {
    struct zero_groups *g;
    uint64_t first, end; /* whole groups */
};

static bool drop_in_range(uint64_t group, uint64_t value, void *arg)
{
    const struct range *r = arg;

    if (group < r->first || group >= r->end)
        return false;
    bitmap_free(r->g, value);
    return true;
}

/* [from, to) of one group */
static void clear_part(struct zero_groups *g, uint64_t group, uint32_t from, uint32_t to)
{
    uint64_t *value = table_find(&g->groups, group);

    if (!value)
        return;
    *value = value_without(g, *value, from, to);
    if (!*value)
        table_remove(&g->groups, group);
}

void zero_groups_clear(struct zero_groups *g, uint64_t at, uint64_t end)
{
    if (at % GLIDE_GROUP || end - at < GLIDE_GROUP) {
        uint64_t first = at - at % GLIDE_GROUP, to = min_u64(end, first + GLIDE_GROUP);
        clear_part(g, at / GLIDE_GROUP, (uint32_t)(at - first), (uint32_t)(to - first));
        at = to;
    }
    struct range r = {g, at / GLIDE_GROUP, end / GLIDE_GROUP};
    if (r.end > r.first && r.end - r.first > table_count(&g->groups)) {
        table_filter(&g->groups, drop_in_range, &r);
        at = r.end * GLIDE_GROUP;
    }
    for (; end > at && end - at >= GLIDE_GROUP; at += GLIDE_GROUP)
        clear_part(g, at / GLIDE_GROUP, 0, GLIDE_GROUP);
    if (at < end)
        clear_part(g, at / GLIDE_GROUP, 0, (uint32_t)(end % GLIDE_GROUP));
}
