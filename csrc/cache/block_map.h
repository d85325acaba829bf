/*
 * The block map: what is known about the base of a volume (its data in the store) without asking Python: zero, or a
 * slot of the block cache. All of it is a cache of the manifest: forgetting an entry costs a fault, never data. Owned
 * by the volume's worker.
 *
 * Zeros are kept by group: the chunks of a manifest page that are absent, and the blocks of a chunk for which none of
 * its packs has data. A block is zero if its chunk is, or if it is itself.
 */
#ifndef GLIDE_BLOCK_MAP_H
#define GLIDE_BLOCK_MAP_H

#include "base/table.h"
#include "cache/zero_groups.h"

enum base_kind { BASE_UNKNOWN, BASE_ZERO, BASE_SLOT, BASE_LENT /* volume->lent, not in the map */ };
struct base_view {
    enum base_kind kind;
    uint32_t slot, generation;
};

struct block_map {
    struct table slots;        /* block -> slot and generation */
    struct zero_groups blocks; /* which are zero, by chunk */
    struct zero_groups chunks; /* which are zero, by page */
    uint64_t limit;            /* bytes; beyond it the map starts over */
};

void block_map_init(struct block_map *m, uint64_t limit);
void block_map_destroy(struct block_map *m);
uint64_t block_map_bytes(const struct block_map *m);
struct base_view block_map_find(const struct block_map *m, uint64_t block);
/* What is known about the blocks from `block` on, up to *end, which is at most `limit` (above `block`). ZERO_NOT: its
 * whole chunk was described; a slot alone says nothing about its neighbours. */
enum zero_state block_map_run(const struct block_map *m, uint64_t block, uint64_t limit, uint64_t *end);
/* -ENOMEM is harmless: the block stays unknown. */
int block_map_set_slot(struct block_map *m, uint64_t block, uint32_t slot, uint32_t generation);
int block_map_set_zero(struct block_map *m, uint64_t block, uint64_t count);
/* Which blocks of a chunk, or chunks of a page, are zero: bit i = block, or chunk, i. */
int block_map_put_chunk(struct block_map *m, uint64_t chunk, const uint64_t zeros[GROUP_WORDS]);
int block_map_put_page(struct block_map *m, uint64_t page, const uint64_t zeros[GROUP_WORDS]);
/* The base of these blocks has changed: forget what is known about them, and that their chunks are zero. */
void block_map_drop(struct block_map *m, uint64_t block, uint64_t count);
/* The slot of a block is gone. Whether the block is zero in the base has not changed. */
void block_map_drop_slot(struct block_map *m, uint64_t block);

#endif
