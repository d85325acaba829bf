/*
 * The block cache of the host: one file of 128 KiB slots, content-addressed.
 * The public calls are in glide_packs.h (glide_cache_*); this adds what workers
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
    _Atomic(struct fresh *) fresh; /* cache_sync.c: what it must hold, if that is known; stays while it is pinned */
};

/* What was put into a slot, and whether it is known to be on the disk. */
struct fresh {
    struct fresh *next; /* in block_cache.fresh, or among those of the sync under way */
    uint32_t sums[GLIDE_BLOCK / GLIDE_SECTOR];
    uint32_t slot, generation;
    bool listed;   /* it is not known to be */
    bool detached; /* the slot has other content by now: only the list has it */
};

struct block_cache {
    pthread_mutex_t lock; /* guards everything below except the slots' atomics */
    int fd, index_fd;
    struct cache_slot *slots;
    uint32_t capacity;
    uint32_t touched;  /* slots [0, touched) were used at some time */
    uint32_t *buckets; /* slot + 1 */
    uint32_t bucket_mask;
    uint32_t hand;          /* of CLOCK (Corbato 1968) */
    uint64_t full_until_ns; /* the disk was full: reuse slots until then */
    uint64_t used, hits, misses, evictions;
    struct fresh *fresh;
    int sick;               /* -errno: the disk failed since the last sync that worked */
    uint64_t sick_until_ns; /* nothing is written before */
    uint64_t failures;      /* calls of cache_failed */
    uint64_t lost;          /* slots whose content was gone */
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
/* One more pin for a holder of one: cannot fail, even if the slot was dropped meanwhile. */
void cache_pin_again(struct block_cache *c, uint32_t slot);
/* What a slot is for. False: it holds something else by now. Any thread. */
bool cache_identify(struct block_cache *c, uint32_t slot, uint32_t generation, uint8_t *key, uint8_t *hash);

/* ---- what Python calls, on any thread: see glide_packs.h, glide_cache_* ---- */
int cache_lookup(struct block_cache *c, const uint8_t *keys, uint32_t count, struct glide_slot *out);
int cache_insert(struct block_cache *c, const uint8_t *key, const uint8_t *hash, const void *data,
                 struct glide_slot *out);
int cache_read(struct block_cache *c, const struct glide_slot *slot, void *buf);
int cache_mark_verified(struct block_cache *c, const struct glide_slot *slot, const void *data);
void cache_drop(struct block_cache *c, const struct glide_slot *slot);
uint64_t cache_evict_all(struct block_cache *c);
int cache_sync(struct block_cache *c);
int cache_give(struct block_cache *c);
int cache_take(struct block_cache *c);
void cache_shutdown(struct block_cache *c);

/* ---- cache_sync.c ---- */

/* Whether sectors [first, end) that were read from a pinned slot, which was filled or verified by this process, are
 * what it must hold. Any thread. */
bool cache_check(const struct block_cache *c, uint32_t slot, uint32_t first, uint32_t end, const uint8_t *data);
/* A read failed (err), or its data was wrong (0): the slot is dropped, with all slots that were not synced. */
void cache_lost(struct block_cache *c, uint32_t slot, uint32_t generation, int err);
/* The hashes that `data` must have in a slot. NULL = no memory. */
struct fresh *cache_fresh(const void *data);
/* Under lock. Its content is what was given to cache_fresh, and the caller has it pinned. */
void cache_set_fresh(struct block_cache *c, struct cache_slot *s, struct fresh *f);
/* Under lock. The slot, which nobody has pinned, gets other content. */
void cache_detach_fresh(struct cache_slot *s);
/* Under lock. The disk failed: nothing that was not synced is believed, and nothing is written for a while. */
void cache_failed(struct block_cache *c, int err);
/* At the end: no sync is under way. */
void cache_free_fresh(struct block_cache *c);
/* Under lock. Forget a used slot: nobody pins it again. */
void cache_forget(struct block_cache *c, struct cache_slot *s);

static inline uint64_t cache_offset(uint32_t slot) { return (uint64_t)slot * GLIDE_BLOCK; }

#endif
