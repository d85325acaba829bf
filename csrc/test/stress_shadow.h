/*
 * Shadow verify for stress.c: every other volume is opened with a second source, which begins with what its
 * log holds and is filled from a copy of the base as of the open. Any difference ends the test.
 */
#ifndef STRESS_SHADOW_H
#define STRESS_SHADOW_H

#include "../glide_core_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define STRESS_KNOWN 4096

struct stress_shadow {
    struct glide_shadow_config config;
    struct glide_sectors known[STRESS_KNOWN];
    uint8_t (*base)[GLIDE_BLOCK]; /* as of the open */
};

static void stress_known(struct stress_shadow *x, uint64_t sector, uint64_t count)
{
    if (x->config.known_count == STRESS_KNOWN)
        abort();
    x->known[x->config.known_count++] = (struct glide_sectors){sector, count};
}

/* What one block of the log has: `data` holds the sectors of the mask, packed. */
static void stress_replay(struct stress_shadow *x, const struct glide_entry *e, const uint8_t *data)
{
    for (uint64_t i = 0; i < GLIDE_BLOCK_SECTORS; i++) {
        uint64_t sector = e->block * GLIDE_BLOCK_SECTORS + i;
        if (!((e->mask | e->zero_mask) >> i & 1))
            continue;
        stress_known(x, sector, 1);
        if (!(e->mask >> i & 1))
            continue;
        if (pwrite(x->config.fd, data, GLIDE_SECTOR, (off_t)(sector * GLIDE_SECTOR)) != GLIDE_SECTOR)
            abort();
        data += GLIDE_SECTOR;
    }
}

/* Begin a second source with the log beyond `committed`, over `blocks` blocks of base. Close config.fd after the open.
 */
static int stress_shadow_begin(struct stress_shadow *x, const char *dir, const char *log_dir, const uint8_t *id,
                               uint64_t committed, const void *base, uint64_t blocks)
{
    static __thread uint8_t data[GLIDE_BLOCK];
    const struct glide_entry *entries;
    const struct glide_extent *extents;
    glide_gather *g;
    int err = glide_gather_open(NULL, log_dir, id, id, committed + 1, UINT64_MAX, committed, &g);

    if (err)
        return err;
    x->base = realloc(x->base, blocks * GLIDE_BLOCK);
    memcpy(x->base, base, blocks * GLIDE_BLOCK);
    x->config = (struct glide_shadow_config){.fd = open(dir, O_TMPFILE | O_RDWR, 0600), .known = x->known};
    uint64_t n = glide_gather_extents(g, &extents);
    for (uint64_t i = 0; i < n; i++)
        stress_known(x, extents[i].block * GLIDE_BLOCK_SECTORS, extents[i].count * GLIDE_BLOCK_SECTORS);
    n = glide_gather_entries(g, &entries);
    for (uint64_t i = 0; i < n && !err; i++) {
        err = glide_gather_fill(g, i, 1, data, sizeof(data));
        if (!err)
            stress_replay(x, &entries[i], data);
    }
    glide_gather_close(g);
    return err ? err : x->config.fd < 0 ? -errno : 0;
}

/* Answer an item of the volume; now and then that the base cannot be had. */
static int stress_shadow_answer(const struct stress_shadow *x, glide_volume *volume,
                                const struct glide_shadow_item *item, bool absent)
{
    if (item->kind == GLIDE_SHADOW_FILL)
        return glide_shadow_fill(volume, item->block, item->count, absent ? NULL : x->base[item->block]);
    fprintf(stderr, "shadow: kind %u, sector %llu+%llu, source %u, segment %llu index %u, slot %u, errno %d\n",
            item->kind, (unsigned long long)item->sector, (unsigned long long)item->count, item->source,
            (unsigned long long)item->segment, item->index, item->slot, item->err);
    abort();
}

#endif
