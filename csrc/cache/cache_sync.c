/*
 * The block cache on a disk that loses what was written: a thin volume that is
 * full, an SSD that dies. Such a disk fails write-back, and readers do not
 * learn of it: the page is clean, is dropped, and old data comes back. Or the file
 * system loses metadata of the file, and a slot lies where another file is by now.
 *
 * So the hashes of a slot's sectors are in memory (32 bits each: a thousandth of
 * the cache's size) as long as it has its content, and every read is compared.
 * A reader holds a pin, so they stay while it looks.
 *
 * Until a sync that began after it was written has worked a slot is listed, too. A
 * sync that fails, a write or read that fails or data that is wrong mean that any
 * listed slot may be gone: all are dropped, and the pages of the file with them, so
 * that whoever reads a slot next sees what the disk has. Then nothing is written for
 * a while, and blocks are served from the store without the cache, until writing is
 * tried again and a sync of it works.
 *
 * The list is under the cache's lock; one thread syncs.
 */
#include "cache/block_cache.h"
#include "base/data_hash.h"
#include "base/disk.h"
#include "base/util.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define SECTORS (GLIDE_BLOCK / GLIDE_SECTOR)
#define SICK_RETRY_NS 2000000000u /* how long a disk that failed is left alone */

static uint32_t generation_of(const struct cache_slot *s) { return (uint32_t)(atomic_load(&s->word) >> 32); }

struct fresh *cache_fresh(const void *data)
{
    struct fresh *f = calloc(1, sizeof(*f));

    for (uint32_t i = 0; f && i < SECTORS; i++)
        f->sums[i] = (uint32_t)data_hash((const uint8_t *)data + (size_t)i * GLIDE_SECTOR, GLIDE_SECTOR);
    return f;
}

void cache_set_fresh(struct block_cache *c, struct cache_slot *s, struct fresh *f)
{
    f->slot = (uint32_t)(s - c->slots);
    f->generation = generation_of(s);
    f->listed = true;
    f->next = c->fresh;
    c->fresh = f;
    atomic_store(&s->fresh, f);
}

void cache_detach_fresh(struct cache_slot *s)
{
    struct fresh *f = atomic_exchange(&s->fresh, NULL);

    if (f && f->listed)
        f->detached = true;
    else
        free(f);
}

void cache_free_fresh(struct block_cache *c)
{
    for (struct fresh *f = c->fresh, *next; f; f = next) {
        next = f->next;
        f->listed = false;
        if (f->detached)
            free(f);
    }
    for (uint32_t i = 0; c->slots && i < c->capacity; i++)
        free(atomic_load(&c->slots[i].fresh));
}

bool cache_check(const struct block_cache *c, uint32_t slot, uint32_t first, uint32_t end, const uint8_t *data)
{
    const struct fresh *f = atomic_load(&c->slots[slot].fresh);

    for (uint32_t i = first; f && i < end; i++) {
        if ((uint32_t)data_hash(data + (size_t)(i - first) * GLIDE_SECTOR, GLIDE_SECTOR) != f->sums[i])
            return false;
    }
    return f != NULL;
}

/* ---- failure ---------------------------------------------------------------------------------- */

/* Forget the slots of a list; what they must hold stays with them. */
static void drop_list(struct block_cache *c, struct fresh *list)
{
    for (struct fresh *f = list, *next; f; f = next) {
        next = f->next;
        f->listed = false;
        if (f->detached) {
            free(f);
            continue;
        }
        struct cache_slot *s = &c->slots[f->slot];
        if (s->used && generation_of(s) == f->generation) {
            cache_forget(c, s);
            c->lost++;
        }
    }
}

void cache_failed(struct block_cache *c, int err)
{
    struct fresh *list = c->fresh;

    c->fresh = NULL;
    drop_list(c, list);
    c->sick = err;
    c->failures++;
    c->sick_until_ns = now_ns() + SICK_RETRY_NS;
    if (!c->given)
        posix_fadvise(c->fd, 0, 0, POSIX_FADV_DONTNEED); /* pages whose write-back failed: clean, and wrong later */
}

void cache_lost(struct block_cache *c, uint32_t slot, uint32_t generation, int err)
{
    struct cache_slot *s = &c->slots[slot];

    pthread_mutex_lock(&c->lock);
    if (generation_of(s) == generation) { /* else it was dropped by another reader, and the disk judged */
        if (s->used) {
            cache_forget(c, s);
            c->lost++;
        }
        cache_failed(c, err ? err : -EIO);
    }
    pthread_mutex_unlock(&c->lock);
}

/* ---- sync --------------------------------------------------------------------------------------- */

/* The slots of a list are on the disk. */
static void settle_list(struct fresh *list)
{
    for (struct fresh *f = list, *next; f; f = next) {
        next = f->next;
        f->listed = false;
        if (f->detached)
            free(f);
    }
}

/*
 * Nothing was put in since the disk failed: whether it takes a sector behind the index, and syncs it. 0 or -errno.
 * The caller has made this thread one of the cache's writers.
 */
static int try_again(struct block_cache *c)
{
    static const uint8_t sector[GLIDE_SECTOR];
    uint64_t at = ((uint64_t)c->capacity * 64 / GLIDE_SECTOR + 1) * GLIDE_SECTOR; /* an entry has less than 64 bytes */
    int err = disk_injected(DISK_CACHE_WRITE);

    if (!err && pwrite(c->index_fd, sector, sizeof(sector), (off_t)at) != (ssize_t)sizeof(sector))
        err = -EIO;
    if (!err && (fdatasync(c->index_fd) || fdatasync(c->fd)))
        err = -errno;
    pthread_mutex_lock(&c->lock);
    c->sick = err;
    if (--c->writers == 0)
        pthread_cond_broadcast(&c->changed);
    pthread_mutex_unlock(&c->lock);
    return err;
}

int cache_sync(struct block_cache *c)
{
    pthread_mutex_lock(&c->lock);
    struct fresh *list = c->given ? NULL : c->fresh;
    if (list)
        c->fresh = NULL;
    uint64_t failures = c->failures;
    int sick = c->sick;
    bool again = !list && sick && !c->given;
    c->writers += again;
    pthread_mutex_unlock(&c->lock);
    if (!list)
        return again ? try_again(c) : sick;
    int err = fdatasync(c->fd) ? -errno : 0;
    int injected = disk_injected(DISK_CACHE_SYNC);
    err = injected ? injected : err;
    pthread_mutex_lock(&c->lock);
    if (err) {
        drop_list(c, list);
        cache_failed(c, err);
    } else if (c->failures != failures) { /* somebody else was told meanwhile */
        drop_list(c, list);
    } else {
        settle_list(list);
        c->sick = 0; /* what was written since it failed is there */
    }
    sick = c->sick;
    pthread_mutex_unlock(&c->lock);
    return sick;
}

/* ---- slots that were checked ------------------------------------------------------------------------ */

int cache_read(struct block_cache *c, const struct glide_slot *slot, void *buf)
{
    uint64_t got;
    int err = disk_pread(c->fd, buf, GLIDE_BLOCK, cache_offset(slot->slot), &got);

    if (!err && got < GLIDE_BLOCK)
        err = -EIO;
    return err ? fail(err, "cannot read the block cache") : 0;
}

int cache_mark_verified(struct block_cache *c, const struct glide_slot *slot, const void *data)
{
    struct cache_slot *s = &c->slots[slot->slot];
    struct fresh *fresh = cache_fresh(data);

    if (!fresh)
        return fail(-ENOMEM, "no memory for the hashes of a block");
    pthread_mutex_lock(&c->lock);
    if (!s->verified && generation_of(s) == slot->generation && !atomic_load(&s->fresh)) {
        s->verified = 1;
        cache_set_fresh(c, s, fresh); /* the process that wrote it may not have synced it */
        fresh = NULL;
    }
    pthread_mutex_unlock(&c->lock);
    free(fresh);
    return 0;
}

void cache_drop(struct block_cache *c, const struct glide_slot *slot)
{
    struct cache_slot *s = &c->slots[slot->slot];

    pthread_mutex_lock(&c->lock);
    if (s->used && generation_of(s) == slot->generation)
        cache_forget(c, s);
    cache_unpin(c, slot->slot);
    pthread_mutex_unlock(&c->lock);
}

bool cache_identify(struct block_cache *c, uint32_t slot, uint32_t generation, uint8_t *key, uint8_t *hash)
{
    struct cache_slot *s = &c->slots[slot];

    if (!cache_pin(c, slot, generation))
        return false;
    pthread_mutex_lock(&c->lock); /* a key is written under it, also while an inserter has the slot pinned */
    memcpy(key, s->key, 16);
    memcpy(hash, s->hash, 16);
    pthread_mutex_unlock(&c->lock);
    cache_unpin(c, slot);
    return true;
}
