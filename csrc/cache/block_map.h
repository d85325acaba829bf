/*
 * The block map: what is known of the base of a volume (what the store holds)
 * without asking Python: zero, or a slot of the block cache. All of it is a
 * cache of the manifest: forgetting an entry costs a fault, never data.
 * Owned by the volume's worker.
 */
#ifndef GLIDE_BLOCK_MAP_H
#define GLIDE_BLOCK_MAP_H

#include "base/table.h"

#define CHUNK_BLOCKS 1024

enum base_kind { BASE_UNKNOWN, BASE_ZERO, BASE_SLOT, BASE_LENT /* volume->lent, not in the map */ };
struct base_view {
    enum base_kind kind;
    uint32_t slot, generation;
};

struct block_map {
    struct table entries; /* block, or CHUNK_KEY | chunk -> packed view */
    uint64_t limit;       /* bytes; beyond it the map starts over */
};

void block_map_init(struct block_map *m, uint64_t limit);
void block_map_destroy(struct block_map *m);
struct base_view block_map_find(const struct block_map *m, uint64_t block);
/* -ENOMEM is harmless: the block stays unknown. */
int block_map_set_slot(struct block_map *m, uint64_t block, uint32_t slot, uint32_t generation);
int block_map_set_zero(struct block_map *m, uint64_t block, uint64_t count);
void block_map_drop(struct block_map *m, uint64_t block, uint64_t count);

#endif
