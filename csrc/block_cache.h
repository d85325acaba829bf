/*
 * The block cache of the host: one file of 128 KiB slots, content-addressed.
 * The public calls are in glide_core.h (glide_cache_*); this adds what workers
 * need on the data path: pin, read position, unpin.
 */
#ifndef GLIDE_BLOCK_CACHE_H
#define GLIDE_BLOCK_CACHE_H

#include "glide_core_internal.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>

struct cache_slot {
    _Atomic uint64_t word; /* generation << 32 | pins */
    uint8_t key[16], hash[16];
    uint32_t next; /* in the bucket's chain: slot + 1 */
    _Atomic uint8_t referenced;
    uint8_t used; /* in the hash table */
    uint8_t verified;
};

struct block_cache {
    pthread_mutex_t lock; /* guards everything below but the slots' atomics */
    int fd, index_fd;
    struct cache_slot *slots;
    uint32_t capacity;
    uint32_t touched;  /* slots [0, touched) were used at some time */
    uint32_t *buckets; /* slot + 1 */
    uint32_t bucket_mask;
    uint32_t hand;          /* of CLOCK (Corbato 1968) */
    uint64_t full_until_ns; /* the disk was full: reuse slots until then */
    uint64_t used, hits, misses, evictions;
    pthread_cond_t changed; /* of the next two, and of `closed` */
    uint32_t writers;       /* threads that write data now */
    bool given;             /* the files are another process's: nothing is written */
    bool closed;
};

/* `standby`: the files are another process's until glide_cache_take. */
int cache_open(struct block_cache *c, const char *dir, uint64_t bytes, bool standby);
void cache_close(struct block_cache *c);

/* False: the slot holds something else by now. Any thread, no lock. */
bool cache_pin(struct block_cache *c, uint32_t slot, uint32_t generation);
void cache_unpin(struct block_cache *c, uint32_t slot);
/* One more pin for who holds one: cannot fail, even if the slot was dropped meanwhile. */
void cache_pin_again(struct block_cache *c, uint32_t slot);
/* What a slot is for. False: it holds something else by now. Any thread. */
bool cache_identify(struct block_cache *c, uint32_t slot, uint32_t generation, uint8_t *key, uint8_t *hash);
static inline uint64_t cache_offset(uint32_t slot) { return (uint64_t)slot * GLIDE_BLOCK; }

#endif
