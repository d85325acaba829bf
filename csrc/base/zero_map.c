/*
 * split() and merge() are the only functions that touch the shape of the tree;
 * set and clear cut the affected range out whole and put back what remains.
 */
#include "base/zero_map.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

struct zero_node {
    struct zero_node *left, *right;
    struct zero_extent extent;
    uint64_t priority;
};

void zero_map_init(struct zero_map *m)
{
    memset(m, 0, sizeof(*m));
    m->seed = 0x9e3779b97f4a7c15u;
}

static uint64_t next_priority(struct zero_map *m)
{
    m->seed ^= m->seed << 13; /* xorshift64 (Marsaglia 2003) */
    m->seed ^= m->seed >> 7;
    m->seed ^= m->seed << 17;
    return m->seed;
}

static struct zero_node *node_new(struct zero_map *m, uint64_t start, uint64_t end, uint64_t pos)
{
    struct zero_node *n = calloc(1, sizeof(*n));

    if (!n)
        return NULL;
    n->extent = (struct zero_extent){start, end, pos};
    n->priority = next_priority(m);
    m->count++;
    m->bytes += sizeof(*n);
    return n;
}

/* Expected depth is logarithmic, so the recursions below are shallow. */
static void free_tree(struct zero_map *m, struct zero_node *n)
{
    if (!n)
        return;
    free_tree(m, n->left);
    free_tree(m, n->right);
    m->count--;
    m->bytes -= sizeof(*n);
    free(n);
}

void zero_map_destroy(struct zero_map *m)
{
    free_tree(m, m->root);
    m->root = NULL;
}

/* low: extents that start below `at`; high: the others. */
static void split(struct zero_node *n, uint64_t at, struct zero_node **low, struct zero_node **high)
{
    if (!n) {
        *low = *high = NULL;
    } else if (n->extent.start < at) {
        split(n->right, at, &n->right, high);
        *low = n;
    } else {
        split(n->left, at, low, &n->left);
        *high = n;
    }
}

static struct zero_node *merge(struct zero_node *low, struct zero_node *high)
{
    if (!low || !high)
        return low ? low : high;
    if (low->priority > high->priority) {
        low->right = merge(low->right, high);
        return low;
    }
    high->left = merge(low, high->left);
    return high;
}

/* Replace [start, end) by `fresh` (may be NULL). */
static int replace(struct zero_map *m, uint64_t start, uint64_t end, struct zero_node *fresh)
{
    struct zero_node *low, *middle, *high, *last, *tail = NULL;

    split(m->root, start, &low, &middle);
    split(middle, end, &middle, &high);
    /* Only the last extent below `start` can reach into or beyond the range; so can the last within. */
    for (last = low; last && last->right; last = last->right)
        ;
    uint64_t reach = last ? last->extent.end : 0, reach_pos = last ? last->extent.pos : 0;
    struct zero_node *inner;
    for (inner = middle; inner && inner->right; inner = inner->right)
        ;
    if (inner) {
        reach = inner->extent.end;
        reach_pos = inner->extent.pos;
    }
    if (reach > end) {
        tail = node_new(m, end, reach, reach_pos);
        if (!tail) {
            m->root = merge(low, merge(middle, high));
            return -ENOMEM;
        }
    }
    if (last && last->extent.end > start)
        last->extent.end = start;
    free_tree(m, middle);
    m->root = merge(merge(low, fresh), merge(tail, high));
    return 0;
}

int zero_map_set(struct zero_map *m, uint64_t start, uint64_t end, uint64_t pos)
{
    struct zero_node *fresh = node_new(m, start, end, pos);

    if (!fresh)
        return -ENOMEM;
    int err = replace(m, start, end, fresh);
    if (err)
        free_tree(m, fresh);
    return err;
}

int zero_map_clear(struct zero_map *m, uint64_t start, uint64_t end) { return replace(m, start, end, NULL); }

bool zero_map_next(const struct zero_map *m, uint64_t block, struct zero_extent *out)
{
    const struct zero_node *best = NULL;

    for (const struct zero_node *n = m->root; n;) {
        if (n->extent.end > block) {
            best = n;
            n = n->left;
        } else {
            n = n->right;
        }
    }
    if (!best)
        return false;
    *out = best->extent;
    return true;
}

uint64_t zero_map_find(const struct zero_map *m, uint64_t block)
{
    struct zero_extent e;

    return zero_map_next(m, block, &e) && e.start <= block ? e.pos : 0;
}
