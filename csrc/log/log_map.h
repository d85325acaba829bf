/*
 * The log map: where in the write log the newest data of a sector is.
 *
 * Two layers. Whole blocks that were zeroed last are extents (zero_map). A
 * block with data, or partly zeroed, has a leaf of 32 positions. Invariant:
 * what a leaf holds is newer than the extent over its block, because a ZERO of
 * the whole block drops the leaf. So the newest of a sector is: its leaf entry,
 * else the extent, else not in the log.
 *
 * Owned by the volume's worker. Positions only grow (appends are made in order
 * on one thread, replay is in position order), so a later set always wins.
 */
#ifndef GLIDE_LOG_MAP_H
#define GLIDE_LOG_MAP_H

#include "base/table.h"
#include "base/zero_map.h"

#include <pthread.h>

#define BLOCK_SECTORS 32

/* A log position: segment sequence number and record index; never 0. */
#define POS_INDEX_BITS 24
#define POS_ZERO ((uint64_t)1 << 63) /* the sector is zero; the other bits say since when */
static inline uint64_t pos_make(uint64_t seq, uint32_t index) { return seq << POS_INDEX_BITS | index; }
static inline uint64_t pos_seq(uint64_t pos) { return (pos & ~POS_ZERO) >> POS_INDEX_BITS; }
static inline uint32_t pos_index(uint64_t pos) { return (uint32_t)(pos & ((1u << POS_INDEX_BITS) - 1)); }

struct log_leaf {
    uint64_t pos[BLOCK_SECTORS]; /* 0 = not in the log */
    uint32_t used;               /* non-zero positions */
};

/* Leaves of all volumes of the host; any thread. */
struct leaf_pool {
    pthread_mutex_t lock;
    struct log_leaf *free; /* chained through pos[0] */
    void *slabs;
    uint64_t bytes; /* of leaves in use */
};
void leaf_pool_init(struct leaf_pool *pool);
void leaf_pool_destroy(struct leaf_pool *pool);

struct log_map {
    struct table leaves; /* block -> struct log_leaf * */
    struct table groups; /* block / 64 -> which of 64 blocks have a leaf: a discard looks for them here */
    struct zero_map zeros;
    struct leaf_pool *pool;
    uint64_t leaf_bytes;
    /* Entries of leaves by the segment that they name: live[i] is of segment live_first + i. */
    uint32_t *live;
    uint64_t live_first;
    uint32_t live_count, live_capacity;
};

void log_map_init(struct log_map *m, struct leaf_pool *pool);
void log_map_destroy(struct log_map *m);
uint64_t log_map_bytes(const struct log_map *m);
/* The same without leaves, which the pool counts. */
uint64_t log_map_table_bytes(const struct log_map *m);

/* count sectors from `sector` were written at pos, pos + 1, ... -ENOMEM. */
int log_map_write(struct log_map *m, uint64_t sector, uint64_t count, uint64_t pos);
/* count sectors from `sector` are zero since pos. -ENOMEM. */
int log_map_zero(struct log_map *m, uint64_t sector, uint64_t count, uint64_t pos);

/* What the map says about a block. */
struct log_view {
    const uint64_t *pos; /* 32 positions, or NULL */
    bool zero;           /* sectors without a position are zero */
};
struct log_view log_map_view(const struct log_map *m, uint64_t block);
/* The first block in [block, end) that has a leaf, or `end`: a look for each 64 blocks. */
uint64_t log_map_next_leaf(const struct log_map *m, uint64_t block, uint64_t end);
/* Position of a sector with POS_ZERO where zero; 0 = not in the log. */
uint64_t log_map_find(const struct log_map *m, uint64_t sector);

/* How many sectors have their newest data in a segment; whole blocks of zeros do not count. */
uint32_t log_map_live(const struct log_map *m, uint64_t seq);

/*
 * Forget the record at pos: every sector that still maps to it. Calls forgot(first_block, count, arg) for
 * runs of blocks that lost something. -ENOMEM.
 */
typedef void (*log_map_forgot)(uint64_t block, uint64_t count, void *arg);
int log_map_forget_write(struct log_map *m, uint64_t sector, uint64_t count, uint64_t pos, log_map_forgot forgot,
                         void *arg);
int log_map_forget_zero(struct log_map *m, uint64_t sector, uint64_t count, uint64_t pos, log_map_forgot forgot,
                        void *arg);
/* Forget a block's positions in segments up to `seq`. -ENOMEM. */
int log_map_forget_block(struct log_map *m, uint64_t block, uint64_t seq);
/* Forget all positions in segments up to `seq`, by a walk over the whole map: milliseconds per ten thousand blocks. */
int log_map_forget_upto(struct log_map *m, uint64_t seq, log_map_forgot forgot, void *arg);

#endif
