/*
 * The block map: what is known of the base of a volume (what the store holds)
 * without asking Python: zero, or a slot of the block cache. All of it is a
 * cache of the manifest: forgetting an entry costs a fault, never data.
 * Owned by the volume's worker.
 *
 * Zeros are kept by group: the chunks of a manifest page that the manifest does
 * not have, and the blocks of a chunk that none of its packs has data of. A
 * block is zero if its chunk is, or if it is itself.
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
/* What is known of the blocks from `block` on, up to *end, which is at most `limit` (above `block`). ZERO_NOT: somebody
 * has said so of its whole chunk; a slot alone says nothing of its neighbours. */
enum zero_state block_map_run(const struct block_map *m, uint64_t block, uint64_t limit, uint64_t *end);
/* -ENOMEM is harmless: the block stays unknown. */
int block_map_set_slot(struct block_map *m, uint64_t block, uint32_t slot, uint32_t generation);
int block_map_set_zero(struct block_map *m, uint64_t block, uint64_t count);
/* What of a whole chunk is zero, or of a page: bit i = its block, or chunk, i. */
int block_map_put_chunk(struct block_map *m, uint64_t chunk, const uint64_t zeros[GROUP_WORDS]);
int block_map_put_page(struct block_map *m, uint64_t page, const uint64_t zeros[GROUP_WORDS]);
/* The base of these blocks has changed: nothing is known of them, nor that a chunk of theirs is zero. */
void block_map_drop(struct block_map *m, uint64_t block, uint64_t count);
/* The slot of a block is gone. Whether it is zero in the base has not changed. */
void block_map_drop_slot(struct block_map *m, uint64_t block);

#endif
