/*
 * State: slots[] with one atomic word each (generation and pins), and a hash
 * table from key to slot under `lock`. Workers touch only the atomics of slots
 * they hold a (slot, generation) pair of; Python threads look up, insert and
 * drop under the lock, which is never held across a read or write of data.
 *
 * A slot changes content only when its pin count is zero, by one compare-and-
 * swap that bumps the generation: whoever holds the old pair fails to pin, and
 * whoever pinned keeps the content. The index file is a hint: its entries are
 * loaded unverified, and nobody maps a slot before its content was checked. What
 * was written may be gone when it is read back: see cache_sync.c.
 *
 * Two processes know the files during a handoff; the one that has `given` them writes neither.
 */
#include "cache/block_cache.h"

#include "base/disk.h"
#include "base/space.h"
#include "base/hash.h"
#include "base/util.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#define PREALLOCATED 8u            /* slots that a full disk cannot take away */
#define FULL_RETRY_NS 10000000000u /* how long a full disk is left alone */

struct index_entry {
    uint8_t key[16], hash[16];
    uint32_t used, slot;
    uint64_t check; /* XXH3-64 of the fields before */
};
_Static_assert(sizeof(struct index_entry) == 48, "index entry layout");

static uint32_t pins_of(uint64_t word) { return (uint32_t)word; }
static uint32_t generation_of(uint64_t word) { return (uint32_t)(word >> 32); }

bool cache_pin(struct block_cache *c, uint32_t slot, uint32_t generation)
{
    if (slot >= c->capacity)
        return false;
    struct cache_slot *s = &c->slots[slot];
    uint64_t word = atomic_load(&s->word);
    do {
        if (generation_of(word) != generation)
            return false;
    } while (!atomic_compare_exchange_weak(&s->word, &word, word + 1));
    if (!atomic_load_explicit(&s->referenced, memory_order_relaxed))
        atomic_store_explicit(&s->referenced, 1, memory_order_relaxed);
    return true;
}

void cache_pin_again(struct block_cache *c, uint32_t slot) { atomic_fetch_add(&c->slots[slot].word, 1); }

void cache_unpin(struct block_cache *c, uint32_t slot) { atomic_fetch_sub(&c->slots[slot].word, 1); }

/* ---- hash table, under lock ------------------------------------------------------------- */

static uint32_t *bucket_of(struct block_cache *c, const uint8_t *key)
{
    uint64_t h;

    memcpy(&h, key, sizeof(h)); /* of a hash, but whoever chooses the content can choose among many */
    return &c->buckets[hash_u64(h) & c->bucket_mask];
}

static struct cache_slot *find(struct block_cache *c, const uint8_t *key)
{
    for (uint32_t at = *bucket_of(c, key); at; at = c->slots[at - 1].next) {
        if (!memcmp(c->slots[at - 1].key, key, 16))
            return &c->slots[at - 1];
    }
    return NULL;
}

static void link_slot(struct block_cache *c, struct cache_slot *s)
{
    uint32_t *bucket = bucket_of(c, s->key);

    s->next = *bucket;
    *bucket = (uint32_t)(s - c->slots) + 1;
    s->used = 1;
    c->used++;
}

static void unlink_slot(struct block_cache *c, struct cache_slot *s)
{
    uint32_t *at = bucket_of(c, s->key);

    while (*at != (uint32_t)(s - c->slots) + 1)
        at = &c->slots[*at - 1].next;
    *at = s->next;
    s->used = 0;
    c->used--;
}

static void index_write(struct block_cache *c, uint32_t slot)
{
    struct cache_slot *s = &c->slots[slot];
    struct index_entry e = {.used = s->used, .slot = slot};

    if (c->given)
        return; /* a lost hint, and no harm: the content is checked before use */
    memcpy(e.key, s->key, 16);
    memcpy(e.hash, s->hash, 16);
    e.check = XXH3_64bits(&e, offsetof(struct index_entry, check));
    if (pwrite(c->index_fd, &e, sizeof(e), (off_t)(slot * sizeof(e))) < 0)
        return; /* a lost hint */
}

void cache_forget(struct block_cache *c, struct cache_slot *s)
{
    unlink_slot(c, s);
    s->verified = 0;
    index_write(c, (uint32_t)(s - c->slots));
    atomic_fetch_add(&s->word, (uint64_t)1 << 32);
}

/* ---- open, close --------------------------------------------------------------------------- */

/* What the index says about a slot that this process has not used itself. */
static void index_apply(struct block_cache *c, uint32_t slot, const struct index_entry *e, uint64_t data_bytes)
{
    struct cache_slot *s = &c->slots[slot];
    bool good = e->used && e->slot == slot && e->check == XXH3_64bits(e, offsetof(struct index_entry, check)) &&
                cache_offset(slot) + GLIDE_BLOCK <= data_bytes;

    if (s->verified || pins_of(atomic_load(&s->word)) || (good && s->used && !memcmp(s->key, e->key, 16)))
        return;
    if (s->used)
        unlink_slot(c, s);
    if (!good || find(c, e->key))
        return;
    memcpy(s->key, e->key, 16);
    memcpy(s->hash, e->hash, 16);
    link_slot(c, s);
    c->touched = (uint32_t)max_u64(c->touched, slot + 1);
}

static void index_load(struct block_cache *c, uint64_t data_bytes)
{
    enum { BATCH = 1024 };
    struct index_entry *e = malloc(BATCH * sizeof(*e));

    for (uint32_t base = 0; e && base < c->capacity; base += BATCH) {
        ssize_t n = pread(c->index_fd, e, BATCH * sizeof(*e), (off_t)(base * sizeof(*e)));
        if (n <= 0)
            break;
        for (uint32_t i = 0; i < (size_t)n / sizeof(*e) && base + i < c->capacity; i++)
            index_apply(c, base + i, &e[i], data_bytes);
    }
    free(e);
}

static int open_file(const char *dir, const char *name)
{
    char *path;

    if (asprintf(&path, "%s/%s", dir, name) < 0)
        return -ENOMEM;
    int fd = disk_open_fd(path, O_RDWR | O_CREAT);
    if (fd == -EUCLEAN && !unlink(path)) /* something else has the name: others have what was cached */
        fd = disk_open_fd(path, O_RDWR | O_CREAT);
    if (fd < 0)
        fd = fail(fd, "cannot open %s: %s", path, strerror(-fd));
    free(path);
    return fd;
}

static int allocate(struct block_cache *c, uint64_t bytes)
{
    c->capacity = (uint32_t)min_u64(bytes / GLIDE_BLOCK, UINT32_MAX / 2);
    uint32_t buckets = 16;
    while (buckets < c->capacity)
        buckets *= 2;
    c->bucket_mask = buckets - 1;
    c->slots = calloc(c->capacity, sizeof(*c->slots));
    c->buckets = calloc(buckets, sizeof(*c->buckets));
    return c->slots && c->buckets ? 0 : fail(-ENOMEM, "no memory for a block cache of %u slots", c->capacity);
}

/* The files are ours: bring them to their size, and load what they say. */
static int own_files(struct block_cache *c)
{
    struct stat st;

    if (fstat(c->fd, &st))
        return fail(-errno, "cannot stat the block cache");
    /* A smaller cache than before gives the excess back. */
    if ((uint64_t)st.st_size > cache_offset(c->capacity) && ftruncate(c->fd, (off_t)cache_offset(c->capacity)))
        return fail(-errno, "cannot shrink the block cache");
    if (posix_fallocate(c->fd, 0, PREALLOCATED * GLIDE_BLOCK))
        return fail(-ENOSPC, "no space for the block cache: free at least %u bytes in block_cache_dir",
                    PREALLOCATED * GLIDE_BLOCK);
    index_load(c, (uint64_t)st.st_size);
    return 0;
}

int cache_open(struct block_cache *c, const char *dir, uint64_t bytes, bool standby)
{
    struct stat st;

    memset(c, 0, sizeof(*c));
    c->fd = c->index_fd = -1;
    if (bytes < PREALLOCATED * GLIDE_BLOCK)
        return fail(-EINVAL, "the block cache needs at least %u bytes", PREALLOCATED * GLIDE_BLOCK);
    pthread_mutex_init(&c->lock, NULL);
    pthread_cond_init(&c->changed, NULL);
    c->given = standby;
    int err = allocate(c, bytes);
    if (!err && (c->fd = open_file(dir, "blocks.data")) < 0)
        err = c->fd;
    if (!err && (c->index_fd = open_file(dir, "blocks.index")) < 0)
        err = c->index_fd;
    if (!err && !standby)
        err = own_files(c);
    else if (!err && !fstat(c->fd, &st))
        index_load(c, (uint64_t)st.st_size);
    if (err)
        cache_close(c);
    return err;
}

void cache_close(struct block_cache *c)
{
    if (c->fd >= 0)
        close(c->fd);
    if (c->index_fd >= 0)
        close(c->index_fd);
    cache_free_fresh(c);
    free(c->slots);
    free(c->buckets);
    pthread_cond_destroy(&c->changed);
    pthread_mutex_destroy(&c->lock);
}

/* ---- handoff ---------------------------------------------------------------------------------- */

int cache_give(struct block_cache *c)
{
    pthread_mutex_lock(&c->lock);
    c->given = true;
    while (c->writers)
        pthread_cond_wait(&c->changed, &c->lock);
    pthread_mutex_unlock(&c->lock);
    return 0;
}

int cache_take(struct block_cache *c)
{
    int err = 0;

    pthread_mutex_lock(&c->lock);
    if (c->given)
        err = own_files(c);
    c->given = err != 0;
    pthread_cond_broadcast(&c->changed);
    pthread_mutex_unlock(&c->lock);
    return err;
}

void cache_shutdown(struct block_cache *c)
{
    pthread_mutex_lock(&c->lock);
    c->closed = true;
    pthread_cond_broadcast(&c->changed);
    pthread_mutex_unlock(&c->lock);
}

/* ---- look up, insert, drop -------------------------------------------------------------------- */

static void describe(struct block_cache *c, struct cache_slot *s, struct glide_slot *out)
{
    out->slot = (uint32_t)(s - c->slots);
    out->generation = generation_of(atomic_load(&s->word));
    out->verified = s->verified;
    memcpy(out->hash, s->hash, 16);
}

/* Under lock: used slots change generation only under lock too, so pinning the current one succeeds. */
static void pin_current(struct block_cache *c, struct cache_slot *s, struct glide_slot *out)
{
    atomic_fetch_add(&s->word, 1);
    atomic_store_explicit(&s->referenced, 1, memory_order_relaxed);
    describe(c, s, out);
}

int cache_lookup(struct block_cache *c, const uint8_t *keys, uint32_t count, struct glide_slot *out)
{
    int found = 0;

    pthread_mutex_lock(&c->lock);
    for (uint32_t i = 0; i < count; i++) {
        struct cache_slot *s = find(c, keys + (size_t)i * 16);
        if (s) {
            pin_current(c, s, &out[i]);
            found++;
        } else {
            out[i].slot = GLIDE_NO_SLOT;
        }
    }
    c->hits += (uint64_t)found;
    c->misses += count - (uint64_t)found;
    pthread_mutex_unlock(&c->lock);
    return found;
}

/* Take a slot out of use if nobody pins it; it then has a new generation and one pin, the caller's. */
static bool claim(struct block_cache *c, struct cache_slot *s)
{
    uint64_t word = atomic_load(&s->word);

    if (pins_of(word))
        return false;
    if (!atomic_compare_exchange_strong(&s->word, &word, ((uint64_t)(generation_of(word) + 1) << 32) | 1))
        return false;
    if (s->used) {
        unlink_slot(c, s);
        c->evictions++;
    }
    cache_detach_fresh(s);
    return true;
}

/* The cache stops before the logs do, which guests wait for. */
static bool may_grow(const struct block_cache *c)
{
    if (c->touched >= c->capacity || c->touched < PREALLOCATED)
        return c->touched < c->capacity;
    return now_ns() >= c->full_until_ns && space_has(c->fd, GLIDE_BLOCK, 2, NULL);
}

static struct cache_slot *claim_any(struct block_cache *c)
{
    if (may_grow(c) && claim(c, &c->slots[c->touched]))
        return &c->slots[c->touched++];
    for (uint64_t tries = 0; tries < 2 * (uint64_t)c->touched; tries++) {
        struct cache_slot *s = &c->slots[c->hand];
        c->hand = (c->hand + 1) % c->touched;
        if (atomic_exchange_explicit(&s->referenced, 0, memory_order_relaxed))
            continue;
        if (claim(c, s))
            return s;
    }
    return NULL;
}

static int write_block(struct block_cache *c, uint32_t slot, const void *data)
{
    int err = disk_injected(DISK_CACHE_WRITE);

    if (err)
        return err;
    for (uint64_t done = 0; done < GLIDE_BLOCK;) {
        ssize_t n = pwrite(c->fd, (const char *)data + done, GLIDE_BLOCK - done, (off_t)(cache_offset(slot) + done));
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return n ? -errno : -EIO;
        done += (uint64_t)n;
    }
    return 0;
}

/* Under lock. 0 = *out is the key's slot; 1 = *claimed is free for it; -EAGAIN. */
static int find_or_claim(struct block_cache *c, const uint8_t *key, struct glide_slot *out, struct cache_slot **claimed)
{
    struct cache_slot *s = find(c, key);

    if (s && !s->verified) { /* our data is known good: replace what is not */
        *claimed = s;
        return claim(c, s) ? 1 : -EAGAIN;
    }
    if (s) {
        pin_current(c, s, out);
        return 0;
    }
    *claimed = claim_any(c);
    return *claimed ? 1 : -EAGAIN;
}

/* Under lock: the claimed slot has the data; enter it unless another thread was first. */
static void publish(struct block_cache *c, struct cache_slot *s, const uint8_t *key, const uint8_t *hash,
                    struct fresh *fresh, struct glide_slot *out)
{
    struct cache_slot *other = find(c, key);

    if (other && other->verified) {
        free(fresh);
        cache_unpin(c, (uint32_t)(s - c->slots));
        pin_current(c, other, out);
        return;
    }
    if (other) {
        unlink_slot(c, other);
        atomic_fetch_add(&other->word, (uint64_t)1 << 32);
    }
    memcpy(s->key, key, 16);
    memcpy(s->hash, hash, 16);
    s->verified = 1;
    atomic_store_explicit(&s->referenced, 0, memory_order_relaxed);
    link_slot(c, s);
    cache_set_fresh(c, s, fresh);
    index_write(c, (uint32_t)(s - c->slots));
    describe(c, s, out);
}

/* Under lock: the claimed slot could not be written. A full disk stops growth for a while; slots that have
 * their space already serve on. */
static void write_failed(struct block_cache *c, uint32_t slot, int err)
{
    cache_unpin(c, slot);
    if (!disk_full(err)) {
        cache_failed(c, err);
        return;
    }
    c->full_until_ns = now_ns() + FULL_RETRY_NS;
    if (slot >= PREALLOCATED && slot + 1 == c->touched)
        c->touched--;
    if (c->hand >= c->touched)
        c->hand = 0;
}

/* Wait until the files are ours, then as find_or_claim. The error of a disk that failed a moment ago, too. */
static int claim_for(struct block_cache *c, const uint8_t *key, struct glide_slot *out, struct cache_slot **claimed)
{
    pthread_mutex_lock(&c->lock);
    while (c->given && !c->closed)
        pthread_cond_wait(&c->changed, &c->lock);
    int got = c->closed                                ? -ESHUTDOWN
              : c->sick && now_ns() < c->sick_until_ns ? c->sick
                                                       : find_or_claim(c, key, out, claimed);
    c->writers += got > 0;
    pthread_mutex_unlock(&c->lock);
    return got;
}

int cache_insert(struct block_cache *c, const uint8_t *key, const uint8_t *hash, const void *data,
                 struct glide_slot *out)
{
    struct fresh *fresh = cache_fresh(data);
    int err = fresh ? -EAGAIN : -ENOMEM;

    for (int attempt = 0; fresh && attempt < 64; attempt++) {
        struct cache_slot *s = NULL;
        int got = claim_for(c, key, out, &s);
        if (got <= 0) {
            free(fresh);
            return got;
        }
        err = write_block(c, (uint32_t)(s - c->slots), data);
        pthread_mutex_lock(&c->lock);
        if (--c->writers == 0)
            pthread_cond_broadcast(&c->changed);
        if (!err)
            publish(c, s, key, hash, fresh, out);
        else
            write_failed(c, (uint32_t)(s - c->slots), err);
        pthread_mutex_unlock(&c->lock);
        if (!err)
            return 0;
        if (!disk_full(err))
            break;
    }
    free(fresh);
    return fail(err, "cannot write the block cache: %s", strerror(-err));
}

uint64_t cache_evict_all(struct block_cache *c)
{
    uint64_t evicted = 0;

    pthread_mutex_lock(&c->lock);
    for (uint32_t i = 0; i < c->touched; i++) {
        struct cache_slot *s = &c->slots[i];
        if (s->used && claim(c, s)) {
            index_write(c, i);
            cache_unpin(c, i);
            evicted++;
        }
    }
    pthread_mutex_unlock(&c->lock);
    return evicted;
}
