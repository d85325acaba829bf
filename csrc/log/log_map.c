#include "log/log_map.h"

#include "base/util.h"

#include <stdlib.h>
#include <string.h>

#define SLAB_LEAVES 64
#define GROUP_BLOCKS 64 /* bits of a value of log_map.groups */

/* ---- leaf pool: one for the host, so that memory freed by one volume serves another ---- */

struct leaf_slab {
    struct leaf_slab *next;
    struct log_leaf leaves[SLAB_LEAVES];
};

void leaf_pool_init(struct leaf_pool *pool)
{
    memset(pool, 0, sizeof(*pool));
    pthread_mutex_init(&pool->lock, NULL);
}

void leaf_pool_destroy(struct leaf_pool *pool)
{
    struct leaf_slab *next;

    for (struct leaf_slab *slab = pool->slabs; slab; slab = next) {
        next = slab->next;
        free(slab);
    }
    pthread_mutex_destroy(&pool->lock);
}

static bool pool_grow(struct leaf_pool *pool)
{
    struct leaf_slab *slab = malloc(sizeof(*slab));

    if (!slab)
        return false;
    slab->next = pool->slabs;
    pool->slabs = slab;
    for (int i = 0; i < SLAB_LEAVES; i++) {
        slab->leaves[i].pos[0] = (uint64_t)(uintptr_t)pool->free;
        pool->free = &slab->leaves[i];
    }
    return true;
}

static struct log_leaf *leaf_new(struct log_map *m)
{
    struct leaf_pool *pool = m->pool;
    struct log_leaf *leaf = NULL;

    pthread_mutex_lock(&pool->lock);
    if (pool->free || pool_grow(pool)) {
        leaf = pool->free;
        pool->free = (struct log_leaf *)(uintptr_t)leaf->pos[0];
        pool->bytes += sizeof(*leaf);
    }
    pthread_mutex_unlock(&pool->lock);
    if (leaf) {
        memset(leaf, 0, sizeof(*leaf));
        m->leaf_bytes += sizeof(*leaf);
    }
    return leaf;
}

static void leaf_free(struct log_map *m, struct log_leaf *leaf)
{
    struct leaf_pool *pool = m->pool;

    pthread_mutex_lock(&pool->lock);
    leaf->pos[0] = (uint64_t)(uintptr_t)pool->free;
    pool->free = leaf;
    pool->bytes -= sizeof(*leaf);
    pthread_mutex_unlock(&pool->lock);
    m->leaf_bytes -= sizeof(*leaf);
}

/* ---- map ------------------------------------------------------------------------------ */

void log_map_init(struct log_map *m, struct leaf_pool *pool)
{
    table_init(&m->leaves);
    table_init(&m->groups);
    zero_map_init(&m->zeros);
    m->pool = pool;
    m->leaf_bytes = 0;
    m->live = NULL;
    m->live_first = 0;
    m->live_count = m->live_capacity = 0;
}

/* ---- live sectors by segment ---- */

/* Make room for a segment, the newest so far or one that is known; those that nothing names go from the front. */
static bool live_room(struct log_map *m, uint64_t seq)
{
    uint32_t gone = 0;

    if (m->live_count && seq - m->live_first < m->live_count)
        return true;
    while (gone < m->live_count && !m->live[gone])
        gone++;
    m->live_count -= gone;
    m->live_first = m->live_count ? m->live_first + gone : seq;
    if (gone)
        memmove(m->live, m->live + gone, m->live_count * sizeof(*m->live));
    uint64_t need = seq - m->live_first + 1;
    if (need > UINT32_MAX / sizeof(*m->live))
        return false;
    if (need > m->live_capacity) {
        uint32_t capacity = (uint32_t)max_u64(need, 2ull * m->live_capacity);
        uint32_t *live = realloc(m->live, capacity * sizeof(*live));
        if (!live)
            return false;
        m->live = live;
        m->live_capacity = capacity;
    }
    memset(m->live + m->live_count, 0, (need - m->live_count) * sizeof(*m->live));
    m->live_count = (uint32_t)need;
    return true;
}

/* The entry of a leaf goes. */
static void live_drop(struct log_map *m, uint64_t pos)
{
    if (pos)
        m->live[pos_seq(pos) - m->live_first]--;
}

uint32_t log_map_live(const struct log_map *m, uint64_t seq)
{
    return seq - m->live_first < m->live_count ? m->live[seq - m->live_first] : 0;
}

static bool drop_any(uint64_t block, uint64_t value, void *arg)
{
    (void)block;
    leaf_free(arg, (struct log_leaf *)(uintptr_t)value);
    return true;
}

void log_map_destroy(struct log_map *m)
{
    table_filter(&m->leaves, drop_any, m);
    table_destroy(&m->leaves);
    table_destroy(&m->groups);
    zero_map_destroy(&m->zeros);
    free(m->live);
    m->live = NULL;
}

uint64_t log_map_table_bytes(const struct log_map *m) { return m->leaves.bytes + m->groups.bytes + m->zeros.bytes; }

uint64_t log_map_bytes(const struct log_map *m) { return m->leaf_bytes + log_map_table_bytes(m); }

static bool group_add(struct log_map *m, uint64_t block)
{
    uint64_t *bits = table_insert(&m->groups, block / GROUP_BLOCKS);

    if (bits)
        *bits |= 1ull << block % GROUP_BLOCKS;
    return bits != NULL;
}

static void group_remove(struct log_map *m, uint64_t block)
{
    uint64_t *bits = table_find(&m->groups, block / GROUP_BLOCKS);

    *bits &= ~(1ull << block % GROUP_BLOCKS);
    if (!*bits)
        table_remove(&m->groups, block / GROUP_BLOCKS);
}

static struct log_leaf *find_leaf(const struct log_map *m, uint64_t block)
{
    uint64_t *value = table_find(&m->leaves, block);

    return value ? (struct log_leaf *)(uintptr_t)*value : NULL;
}

static struct log_leaf *need_leaf(struct log_map *m, uint64_t block)
{
    uint64_t *value = table_insert(&m->leaves, block);

    if (!value)
        return NULL;
    if (!*value) {
        struct log_leaf *leaf = leaf_new(m);
        if (!leaf || !group_add(m, block)) {
            if (leaf)
                leaf_free(m, leaf);
            table_remove(&m->leaves, block);
            return NULL;
        }
        *value = (uint64_t)(uintptr_t)leaf;
    }
    return (struct log_leaf *)(uintptr_t)*value;
}

/* A leaf leaves the table, with what is left in it. */
static void leaf_gone(struct log_map *m, uint64_t block, struct log_leaf *leaf)
{
    for (uint32_t i = 0; leaf->used && i < BLOCK_SECTORS; i++)
        live_drop(m, leaf->pos[i]);
    group_remove(m, block);
    leaf_free(m, leaf);
}

static void drop_leaf(struct log_map *m, uint64_t block, struct log_leaf *leaf)
{
    table_remove(&m->leaves, block);
    leaf_gone(m, block, leaf);
}

static void leaf_set(struct log_map *m, struct log_leaf *leaf, uint32_t i, uint64_t pos)
{
    if (leaf->pos[i])
        live_drop(m, leaf->pos[i]);
    else
        leaf->used++;
    leaf->pos[i] = pos;
    m->live[pos_seq(pos) - m->live_first]++;
}

int log_map_write(struct log_map *m, uint64_t sector, uint64_t count, uint64_t pos)
{
    if (!live_room(m, pos_seq(pos)))
        return -ENOMEM;
    while (count) {
        uint32_t first = (uint32_t)(sector % BLOCK_SECTORS);
        uint32_t n = (uint32_t)min_u64(count, BLOCK_SECTORS - first);
        struct log_leaf *leaf = need_leaf(m, sector / BLOCK_SECTORS);
        if (!leaf)
            return -ENOMEM;
        for (uint32_t i = 0; i < n; i++)
            leaf_set(m, leaf, first + i, pos + i);
        sector += n;
        count -= n;
        pos += n;
    }
    return 0;
}

static int zero_part(struct log_map *m, uint64_t sector, uint64_t count, uint64_t pos)
{
    struct log_leaf *leaf = need_leaf(m, sector / BLOCK_SECTORS);

    if (!leaf)
        return -ENOMEM;
    for (uint64_t i = 0; i < count; i++)
        leaf_set(m, leaf, (uint32_t)(sector % BLOCK_SECTORS + i), pos | POS_ZERO);
    return 0;
}

struct drop_range {
    struct log_map *map;
    uint64_t start, end;
};

static bool drop_in_range(uint64_t block, uint64_t value, void *arg)
{
    struct drop_range *r = arg;

    if (block < r->start || block >= r->end)
        return false;
    leaf_gone(r->map, block, (struct log_leaf *)(uintptr_t)value);
    return true;
}

static void drop_leaves(struct log_map *m, uint64_t start, uint64_t end)
{
    struct drop_range range = {m, start, end};

    if ((end - start) / GROUP_BLOCKS > table_count(&m->leaves)) {
        table_filter(&m->leaves, drop_in_range, &range);
        return;
    }
    for (uint64_t block = start; block < end;) {
        uint64_t next = min_u64(end, (block / GROUP_BLOCKS + 1) * GROUP_BLOCKS);
        const uint64_t *bits = table_find(&m->groups, block / GROUP_BLOCKS);
        for (uint64_t left = bits ? *bits >> block % GROUP_BLOCKS : 0; left && block < next; left >>= 1, block++) {
            if (left & 1)
                drop_leaf(m, block, find_leaf(m, block));
        }
        block = next;
    }
}

int log_map_zero(struct log_map *m, uint64_t sector, uint64_t count, uint64_t pos)
{
    uint64_t end = sector + count;
    uint64_t first_whole = div_up(sector, BLOCK_SECTORS), end_whole = end / BLOCK_SECTORS;

    if (!live_room(m, pos_seq(pos)))
        return -ENOMEM;
    if (first_whole >= end_whole) { /* no whole block: one or two parts */
        uint64_t cut = min_u64(end, first_whole * BLOCK_SECTORS);
        int err = cut > sector ? zero_part(m, sector, cut - sector, pos) : 0;
        return err || cut >= end ? err : zero_part(m, cut, end - cut, pos);
    }
    int err = zero_map_set(&m->zeros, first_whole, end_whole, pos);
    if (err)
        return err;
    drop_leaves(m, first_whole, end_whole);
    if (sector < first_whole * BLOCK_SECTORS)
        err = zero_part(m, sector, first_whole * BLOCK_SECTORS - sector, pos);
    if (!err && end > end_whole * BLOCK_SECTORS)
        err = zero_part(m, end_whole * BLOCK_SECTORS, end - end_whole * BLOCK_SECTORS, pos);
    return err;
}

struct log_view log_map_view(const struct log_map *m, uint64_t block)
{
    const struct log_leaf *leaf = find_leaf(m, block);

    return (struct log_view){leaf ? leaf->pos : NULL, m->zeros.root && zero_map_find(&m->zeros, block)};
}

uint64_t log_map_next_leaf(const struct log_map *m, uint64_t block, uint64_t end)
{
    while (block < end) {
        const uint64_t *bits = table_find(&m->groups, block / GROUP_BLOCKS);
        uint64_t left = bits ? *bits >> block % GROUP_BLOCKS : 0;
        if (left)
            return min_u64(end, block + (uint64_t)__builtin_ctzll(left));
        block = (block / GROUP_BLOCKS + 1) * GROUP_BLOCKS;
    }
    return end;
}

uint64_t log_map_find(const struct log_map *m, uint64_t sector)
{
    uint64_t block = sector / BLOCK_SECTORS;
    const struct log_leaf *leaf = find_leaf(m, block);

    if (leaf && leaf->pos[sector % BLOCK_SECTORS])
        return leaf->pos[sector % BLOCK_SECTORS];
    uint64_t pos = zero_map_find(&m->zeros, block);
    return pos ? pos | POS_ZERO : 0;
}

/* Forget sectors of one block whose entry is `pos` (+ step for each next sector). */
static bool forget_part(struct log_map *m, uint64_t sector, uint32_t count, uint64_t pos, uint32_t step)
{
    uint64_t block = sector / BLOCK_SECTORS;
    struct log_leaf *leaf = find_leaf(m, block);
    bool any = false;

    for (uint32_t i = 0; leaf && i < count; i++) {
        uint64_t *entry = &leaf->pos[sector % BLOCK_SECTORS + i];
        if (*entry == pos + (uint64_t)i * step) {
            live_drop(m, *entry);
            *entry = 0;
            leaf->used--;
            any = true;
        }
    }
    if (leaf && !leaf->used)
        drop_leaf(m, block, leaf);
    return any;
}

int log_map_forget_write(struct log_map *m, uint64_t sector, uint64_t count, uint64_t pos, log_map_forgot forgot,
                         void *arg)
{
    while (count) {
        uint32_t n = (uint32_t)min_u64(count, BLOCK_SECTORS - sector % BLOCK_SECTORS);
        if (forget_part(m, sector, n, pos, 1))
            forgot(sector / BLOCK_SECTORS, 1, arg);
        sector += n;
        count -= n;
        pos += n;
    }
    return 0;
}

int log_map_forget_zero(struct log_map *m, uint64_t sector, uint64_t count, uint64_t pos, log_map_forgot forgot,
                        void *arg)
{
    uint64_t end = sector + count, first_whole = div_up(sector, BLOCK_SECTORS), end_whole = end / BLOCK_SECTORS;
    uint64_t edges[2][2] = {{sector, min_u64(end, first_whole * BLOCK_SECTORS)},
                            {max_u64(sector, end_whole * BLOCK_SECTORS), end}};
    bool one_edge = first_whole > end_whole; /* both ends in the same block */

    for (int i = 0; i < (one_edge ? 1 : 2); i++) {
        uint64_t from = edges[i][0], to = one_edge ? end : edges[i][1];
        if (to > from && forget_part(m, from, (uint32_t)(to - from), pos | POS_ZERO, 0))
            forgot(from / BLOCK_SECTORS, 1, arg);
    }
    struct zero_extent e;
    for (uint64_t at = first_whole; at < end_whole && zero_map_next(&m->zeros, at, &e) && e.start < end_whole;) {
        uint64_t from = max_u64(at, e.start), to = min_u64(e.end, end_whole);
        if (e.pos == pos) {
            int err = zero_map_clear(&m->zeros, from, to);
            if (err)
                return err;
            forgot(from, to - from, arg);
        }
        at = to;
    }
    return 0;
}

struct forget_upto {
    struct log_map *map;
    uint64_t seq;
    log_map_forgot forgot;
    void *arg;
};

/* True: something was forgotten. */
static bool leaf_forget_upto(struct log_map *m, struct log_leaf *leaf, uint64_t seq)
{
    bool any = false;

    for (uint32_t i = 0; i < BLOCK_SECTORS; i++) {
        if (!leaf->pos[i] || pos_seq(leaf->pos[i]) > seq)
            continue;
        live_drop(m, leaf->pos[i]);
        leaf->pos[i] = 0;
        leaf->used--;
        any = true;
    }
    return any;
}

static bool forget_old(uint64_t block, uint64_t value, void *arg)
{
    struct forget_upto *f = arg;
    struct log_leaf *leaf = (struct log_leaf *)(uintptr_t)value;

    if (leaf_forget_upto(f->map, leaf, f->seq))
        f->forgot(block, 1, f->arg);
    if (leaf->used)
        return false;
    leaf_gone(f->map, block, leaf);
    return true;
}

int log_map_forget_block(struct log_map *m, uint64_t block, uint64_t seq)
{
    struct log_leaf *leaf = find_leaf(m, block);
    uint64_t zeroed = zero_map_find(&m->zeros, block);
    /* First what is older: else it would show. */
    int err = zeroed && pos_seq(zeroed) <= seq ? zero_map_clear(&m->zeros, block, block + 1) : 0;

    if (!err && leaf && leaf_forget_upto(m, leaf, seq) && !leaf->used)
        drop_leaf(m, block, leaf);
    return err;
}

int log_map_forget_upto(struct log_map *m, uint64_t seq, log_map_forgot forgot, void *arg)
{
    struct forget_upto f = {m, seq, forgot, arg};
    struct zero_extent e;

    for (uint64_t at = 0; zero_map_next(&m->zeros, at, &e); at = e.end) {
        if (pos_seq(e.pos) > seq)
            continue;
        int err = zero_map_clear(&m->zeros, e.start, e.end);
        if (err)
            return err;
        forgot(e.start, e.end - e.start, arg);
    }
    table_filter(&m->leaves, forget_old, &f);
    return 0;
}
