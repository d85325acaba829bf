/* A volume of the stress program: what is known of it, its begin and its end. */
#ifndef STRESS_VOLUME_H
#define STRESS_VOLUME_H

#include "stress_common.h"
#include "stress_shadow.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>

#define VOLUMES 3
#define CLIENTS 3
#define STRIPES (CLIENTS + 1) /* the last is that of the guest on vhost-user */
#define BLOCKS 24
#define SECTORS (BLOCKS * GLIDE_BLOCK_SECTORS)

struct volume_state {
    glide_volume *volume;
    pthread_rwlock_t open; /* read: use `volume`; write: replace it */
    atomic_bool pause;     /* clients keep away: the volume is to be replaced */
    uint64_t cookie;
    char log_dir[512];
    uint8_t id[16];
    uint64_t committed, retired;
    pthread_mutex_t base_lock;         /* guards base */
    uint8_t base[BLOCKS][GLIDE_BLOCK]; /* what "the store" holds */
    uint64_t written[SECTORS];         /* generation of each sector; a sector has one writer */
    struct stress_shadow shadow;       /* of every other volume */
};

static glide_engine *engine;
static const char *directory;
static atomic_ullong compared; /* by shadow verify, in sectors */

static void open_volume(struct volume_state *s)
{
    struct glide_volume_config config = {.cookie = s->cookie,
                                         .log_dir = s->log_dir,
                                         .size = (uint64_t)SECTORS * GLIDE_SECTOR,
                                         .committed_seq = s->committed,
                                         .always_verify = 1};
    struct glide_recovery recovery;

    memcpy(config.volume_id, s->id, 16);
    memcpy(config.log_id, s->id, 16);
    if (s->id[0] % 2 == 0) {
        MUST(glide_volume_open(engine, &config, &s->volume, &recovery));
        return;
    }
    MUST(stress_shadow_begin(&s->shadow, directory, s->log_dir, s->id, s->committed, s->base, BLOCKS));
    config.shadow = &s->shadow.config;
    MUST(glide_volume_open(engine, &config, &s->volume, &recovery));
    close(s->shadow.config.fd);
}

static void close_volume(struct volume_state *s)
{
    struct glide_volume_stats stats;

    MUST(glide_volume_stats_get(s->volume, &stats));
    atomic_fetch_add(&compared, stats.shadow_compared);
    MUST(glide_volume_close(s->volume));
}

/* For good: whoever still has something for it to answer must not find it. */
static void end_volume(struct volume_state *s)
{
    pthread_rwlock_wrlock(&s->open);
    close_volume(s);
    s->cookie = UINT64_MAX;
    pthread_rwlock_unlock(&s->open);
}

#endif
