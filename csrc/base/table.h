/*
 * Hash table from u64 keys to u64 values: open addressing in independently
 * growing parts, so that no single insert pays for rehashing the whole table.
 * Owned by one thread. Memory is proportional to the entries that are there,
 * not to the volume: 655 k random blocks of a 10 TB volume touch every page of
 * a flat directory (671 MB), and cost 21 MB here.
 */
#ifndef GLIDE_TABLE_H
#define GLIDE_TABLE_H

#include <stdbool.h>
#include <stdint.h>

#define TABLE_PARTS 32

struct table_entry {
    uint64_t key; /* key + 1; 0 = free */
    uint64_t value;
};
struct table_part {
    struct table_entry *entries;
    uint32_t capacity; /* a power of two, or 0 */
    uint32_t used;
};
struct table {
    struct table_part part[TABLE_PARTS];
    uint64_t bytes; /* allocated for entries */
};

void table_init(struct table *t);
void table_destroy(struct table *t);
/* The value's address until the next insert or remove; NULL = absent. */
uint64_t *table_find(const struct table *t, uint64_t key);
/* Find or add (value 0). NULL = out of memory. Keys are below UINT64_MAX. */
uint64_t *table_insert(struct table *t, uint64_t key);
bool table_remove(struct table *t, uint64_t key);
uint64_t table_count(const struct table *t);
void table_clear(struct table *t);

/* Remove every entry for which `drop` says so. */
void table_filter(struct table *t, bool (*drop)(uint64_t key, uint64_t value, void *arg), void *arg);

#endif
