/*
 * Linear probing with backward-shift deletion: no tombstones, so a table that
 * lives for months of inserts and removes does not decay.
 */
#include "base/table.h"

#include "base/hash.h"

#include <stdlib.h>
#include <string.h>

#define PART_MIN 8u

static struct table_part *part_of(const struct table *t, uint64_t hash)
{
    return (struct table_part *)&t->part[hash >> 59];
}

void table_init(struct table *t) { memset(t, 0, sizeof(*t)); }

void table_destroy(struct table *t)
{
    for (int i = 0; i < TABLE_PARTS; i++)
        free(t->part[i].entries);
    table_init(t);
}

void table_clear(struct table *t) { table_destroy(t); }

uint64_t *table_find(const struct table *t, uint64_t key)
{
    uint64_t hash = hash_u64(key);
    const struct table_part *p = part_of(t, hash);

    if (!p->used)
        return NULL;
    uint32_t mask = p->capacity - 1;
    for (uint32_t i = (uint32_t)hash & mask;; i = (i + 1) & mask) {
        if (p->entries[i].key == key + 1)
            return &p->entries[i].value;
        if (!p->entries[i].key)
            return NULL;
    }
}

static bool part_resize(struct table *t, struct table_part *p, uint32_t capacity)
{
    struct table_entry *fresh = calloc(capacity, sizeof(*fresh));

    if (!fresh)
        return false;
    for (uint32_t i = 0; i < p->capacity; i++) {
        if (!p->entries[i].key)
            continue;
        uint32_t at = (uint32_t)hash_u64(p->entries[i].key - 1) & (capacity - 1);
        while (fresh[at].key)
            at = (at + 1) & (capacity - 1);
        fresh[at] = p->entries[i];
    }
    t->bytes += ((uint64_t)capacity - p->capacity) * sizeof(*fresh);
    free(p->entries);
    p->entries = fresh;
    p->capacity = capacity;
    return true;
}

uint64_t *table_insert(struct table *t, uint64_t key)
{
    uint64_t *found = table_find(t, key);
    if (found)
        return found;

    uint64_t hash = hash_u64(key);
    struct table_part *p = part_of(t, hash);
    if ((uint64_t)p->used * 10 >= (uint64_t)p->capacity * 7 &&
        !part_resize(t, p, p->capacity ? p->capacity * 2 : PART_MIN))
        return NULL;
    uint32_t mask = p->capacity - 1;
    uint32_t i = (uint32_t)hash & mask;
    while (p->entries[i].key)
        i = (i + 1) & mask;
    p->entries[i].key = key + 1;
    p->entries[i].value = 0;
    p->used++;
    return &p->entries[i].value;
}

static void part_remove_at(struct table_part *p, uint32_t hole)
{
    uint32_t mask = p->capacity - 1;

    for (uint32_t i = (hole + 1) & mask; p->entries[i].key; i = (i + 1) & mask) {
        uint32_t home = (uint32_t)hash_u64(p->entries[i].key - 1) & mask;
        if (((i - home) & mask) >= ((i - hole) & mask)) { /* may move back to the hole */
            p->entries[hole] = p->entries[i];
            hole = i;
        }
    }
    p->entries[hole].key = 0;
    p->used--;
}

static void part_shrink(struct table *t, struct table_part *p)
{
    if (!p->used) {
        t->bytes -= (uint64_t)p->capacity * sizeof(*p->entries);
        free(p->entries);
        memset(p, 0, sizeof(*p));
    } else if (p->capacity > PART_MIN && p->used < p->capacity / 8) {
        part_resize(t, p, p->capacity / 2); /* failing to shrink is harmless */
    }
}

bool table_remove(struct table *t, uint64_t key)
{
    uint64_t *value = table_find(t, key);

    if (!value)
        return false;
    struct table_part *p = part_of(t, hash_u64(key));
    part_remove_at(p, (uint32_t)((struct table_entry *)(void *)((char *)value - sizeof(uint64_t)) - p->entries));
    part_shrink(t, p);
    return true;
}

uint64_t table_count(const struct table *t)
{
    uint64_t n = 0;
    for (int i = 0; i < TABLE_PARTS; i++)
        n += t->part[i].used;
    return n;
}

void table_filter(struct table *t, bool (*drop)(uint64_t, uint64_t, void *), void *arg)
{
    for (int i = 0; i < TABLE_PARTS; i++) {
        struct table_part *p = &t->part[i];
        /* A removal shifts later entries back, around the end of the array too, so one pass may
         * miss an entry that moved behind it: scan until a pass removes nothing. */
        for (bool removed = p->used > 0; removed;) {
            removed = false;
            for (uint32_t j = 0; j < p->capacity; j++) {
                while (p->entries[j].key && drop(p->entries[j].key - 1, p->entries[j].value, arg)) {
                    part_remove_at(p, j);
                    removed = true;
                }
            }
        }
        part_shrink(t, p);
    }
}
