/*
 * The core without Python, under many threads, for ThreadSanitizer and
 * AddressSanitizer. usage: stress DIR SECONDS [SEED]
 *
 * Each volume has client threads that own disjoint stripes of it and check every
 * sector they read against the generation they wrote last; besides, everything
 * that Python does at run time goes on at once: faults are answered (from a
 * base that never changes), segments sealed, gathered, "committed" (the base
 * keeps what was gathered) and retired, slots evicted, statistics read, NBD
 * clients and a guest on vhost-user come and go, volumes are closed and opened
 * again. Two of the volumes have shadow verify on.
 */
#include "base/disk.h"
#include "glide_core_internal.h"
#include "stress_common.h"
#include "stress_nbd.h"
#include "stress_upload.h"
#include "stress_vhost.h"
#include "stress_volume.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define END_SECONDS 100 /* for all to end once the time is over */

static struct volume_state states[VOLUMES];
static atomic_bool stop;
static atomic_int clients_left; /* the uploaders go on until it is 0 */
static atomic_ullong operations, visits;

/* ---- what Python does -------------------------------------------------------------------- */

static const uint8_t zeros[GLIDE_BLOCK];

/* What of the first chunk, which is all there is, is zeros; of the page, if all of it is. */
static void answer_holes(struct volume_state *s, uint64_t stamp)
{
    struct glide_holes holes[2] = {{.kind = GLIDE_HOLES_CHUNK}, {.kind = GLIDE_HOLES_ERROR}};
    bool all = true;

    memset(holes[0].zeros, 0xff, sizeof(holes[0].zeros));
    pthread_mutex_lock(&s->base_lock);
    for (uint64_t block = 0; block < SECTORS / GLIDE_BLOCK_SECTORS; block++) {
        bool zero = !memcmp(s->base[block], zeros, GLIDE_BLOCK);
        holes[0].zeros[block / 64] &= ~((uint64_t)!zero << block % 64);
        all = all && zero;
    }
    pthread_mutex_unlock(&s->base_lock);
    if (all)
        holes[0].kind = GLIDE_HOLES_PAGE;
    MUST(glide_volume_install_holes(s->volume, stamp, holes, 2));
}

/* Windows that are short, too old, or errors. */
static void answer_changed(struct volume_state *s, const struct glide_fault *fault)
{
    uint64_t first = fault->block * GLIDE_BLOCK_SECTORS, edges[] = {first + 1, first + 9, first + 40};
    struct glide_volume_info info = {0};
    struct glide_changed c = {.ticket = fault->ticket, .err = fault->stamp % 5 ? 0 : 2};

    MUST(glide_volume_info_get(s->volume, &info));
    c.first = first;
    c.end = c.err ? first + 64 : first + (fault->block % 3 ? 64 : 4096);
    c.last_segment = info.committed_seq;
    MUST(glide_volume_install_changed(s->volume, &c, edges, 3));
}

static void answer(struct volume_state *s, const struct glide_fault *fault)
{
    static __thread uint8_t copy[GLIDE_BLOCK];
    struct glide_fill f = {.data = copy};

    if (fault->ticket) {
        answer_changed(s, fault);
        return;
    }

    if (fault->chunks || fault->block % 4 == 0)
        answer_holes(s, fault->stamp);
    if (fault->chunks)
        return;

    for (uint64_t block = fault->block; block < fault->block + fault->count; block++) {
        struct glide_install i = {.block = block, .count = 1, .kind = GLIDE_INSTALL_ZERO};
        struct glide_slot slot;
        pthread_mutex_lock(&s->base_lock);
        memcpy(copy, s->base[block], GLIDE_BLOCK);
        pthread_mutex_unlock(&s->base_lock);
        if (memcmp(copy, zeros, GLIDE_BLOCK)) {
            stress_key(f.key, copy);
            if (!glide_cache_lookup(engine, f.key, 1, &slot)) {
                int got;
                f.block = block;
                memcpy(f.hash, f.key, 16);
                while ((got = glide_volume_fill(s->volume, fault->stamp, &f, 1, block % 7 == 0)) == -EAGAIN)
                    usleep(100);
                MUST(got);
                continue;
            }
            i.kind = GLIDE_INSTALL_SLOT;
            i.slot = slot.slot;
            i.generation = slot.generation;
        }
        MUST(glide_volume_install(s->volume, fault->stamp, &i, 1));
    }
}

static void *fault_thread(void *arg)
{
    struct glide_fault fault;
    int got;

    (void)arg;
    while ((got = glide_faults_next(engine, 8, 100, &fault)) != -ESHUTDOWN) {
        if (!got)
            continue;
        struct volume_state *s = &states[fault.volume % VOLUMES];
        pthread_rwlock_rdlock(&s->open);
        if (s->cookie == fault.volume)
            answer(s, &fault);
        pthread_rwlock_unlock(&s->open);
    }
    return NULL;
}

static void *shadow_thread(void *arg)
{
    struct glide_shadow_item item;
    uint64_t seed = 55;
    int got;

    (void)arg;
    while ((got = glide_shadow_next(engine, 100, &item)) != -ESHUTDOWN) {
        if (!got)
            continue;
        struct volume_state *s = &states[item.volume % VOLUMES];
        pthread_rwlock_rdlock(&s->open);
        if (s->cookie == item.volume)
            MUST(stress_shadow_answer(&s->shadow, s->volume, &item, stress_draw(&seed) % 16 == 0));
        pthread_rwlock_unlock(&s->open);
    }
    return NULL;
}

static void *event_thread(void *arg)
{
    struct glide_event events[16];

    (void)arg;
    while (glide_events_next(engine, 100, events, 16) != -ESHUTDOWN)
        ;
    return NULL;
}

/* Seal, gather into the base, commit, retire: the uploader. */
static void upload(struct volume_state *s)
{
    const struct glide_extent *extents;
    glide_gather *g;
    uint64_t seq;

    MUST(glide_volume_seal(s->volume, &seq));
    if (seq <= s->committed)
        return;
    MUST(glide_volume_sync(s->volume));
    MUST(glide_gather_open(s->volume, s->log_dir, s->id, s->id, s->committed + 1, seq, s->committed, &g));
    pthread_mutex_lock(&s->base_lock);
    uint64_t n = glide_gather_extents(g, &extents);
    for (uint64_t i = 0; i < n; i++)
        memset(s->base[extents[i].block], 0, extents[i].count * GLIDE_BLOCK);
    upload_packs(s->base, sizeof(s->base), g);
    pthread_mutex_unlock(&s->base_lock);
    glide_gather_close(g);
    s->committed = seq;
    MUST(glide_volume_committed(s->volume, seq));
    for (uint64_t each = s->retired + 1; each <= seq; each++)
        MUST(glide_volume_thin(s->volume, each));
    if (seq % 3)
        return;
    MUST(glide_volume_retire(s->volume, seq));
    s->retired = seq;
}

/* Requests under way may need the uploader or the fault thread to end: let both go on until all have. */
static void reopen(struct volume_state *s)
{
    atomic_store(&s->pause, true);
    while (pthread_rwlock_trywrlock(&s->open)) {
        pthread_rwlock_rdlock(&s->open);
        upload(s);
        pthread_rwlock_unlock(&s->open);
        usleep(1000);
    }
    close_volume(s);
    s->cookie += VOLUMES;
    open_volume(s);
    pthread_rwlock_unlock(&s->open);
    atomic_store(&s->pause, false);
}

static void enter(struct volume_state *s)
{
    while (atomic_load(&s->pause))
        usleep(100);
    pthread_rwlock_rdlock(&s->open);
}

/* A handoff that is called off. */
static void stand_still(struct volume_state *s)
{
    struct glide_nbd_state conns[4];
    struct glide_cutover position;

    MUST(glide_volume_freeze(s->volume, &position));
    MUST(glide_cache_give(engine));
    int n = glide_nbd_frozen(s->volume, conns, 4);
    for (int i = 0; i < n && i < 4; i++) {
        void *in = malloc(conns[i].in_bytes + 1), *out = malloc(conns[i].out_bytes + 1);
        int err = glide_nbd_export(s->volume, &conns[i], in, out);
        if (err != -EAGAIN && err != -ENOENT)
            MUST(err);
        free(in);
        free(out);
    }
    usleep(500);
    MUST(glide_cache_take(engine));
    MUST(glide_volume_unfreeze(s->volume));
}

static void *upload_thread(void *arg)
{
    struct volume_state *s = arg;
    uint64_t seed = 77 + s->cookie;
    struct glide_volume_stats stats;
    struct glide_volume_info info;
    struct glide_engine_stats all;

    while (atomic_load(&clients_left)) {
        usleep(stress_draw(&seed) % 20000);
        pthread_rwlock_rdlock(&s->open);
        upload(s);
        if (stress_draw(&seed) % 8 == 0)
            stand_still(s);
        MUST(glide_volumes_info_get(&s->volume, 1, &info) - 1);
        glide_volumes_stats_get(&s->volume, 1, &stats);
        glide_engine_stats_get(engine, &all);
        pthread_rwlock_unlock(&s->open);
        if (stress_draw(&seed) % 16 == 0)
            glide_cache_evict_all(engine);
        if (s == &states[0] && stress_draw(&seed) % 4 == 0) { /* one thread; now and then the cache's disk fails */
            if (stress_draw(&seed) % 16 == 0)
                MUST(glide_disk_inject(DISK_CACHE_SYNC, EIO, 0, 1));
            glide_cache_sync(engine);
        }
        if (stress_draw(&seed) % 32 == 0)
            reopen(s);
    }
    return NULL;
}

/* ---- clients ---------------------------------------------------------------------------------- */

struct client {
    struct volume_state *s;
    uint32_t index;
    uint64_t seed;
    uint8_t buf[8 * GLIDE_SECTOR];
};

static void write_some(struct client *c, uint64_t sector, uint32_t count)
{
    struct volume_state *s = c->s;

    for (uint32_t i = 0; i < count; i++)
        stress_fill(c->buf + i * GLIDE_SECTOR, sector + i, s->written[sector + i] + 1);
    if (stress_draw(&c->seed) % 4 == 0) { /* in halves of sectors: read-modify-write */
        uint64_t half = GLIDE_SECTOR / 2, at = sector * GLIDE_SECTOR, length = (uint64_t)count * GLIDE_SECTOR;
        MUST(glide_volume_io(s->volume, GLIDE_WRITE, 0, at, half, c->buf));
        MUST(glide_volume_io(s->volume, GLIDE_WRITE, 0, at + half, length - half, c->buf + half));
    } else {
        int flags = stress_draw(&c->seed) % 8 ? 0 : GLIDE_FUA;
        MUST(glide_volume_io(s->volume, GLIDE_WRITE, flags, sector * GLIDE_SECTOR, (uint64_t)count * GLIDE_SECTOR,
                             c->buf));
    }
    for (uint32_t i = 0; i < count; i++)
        s->written[sector + i]++;
}

static void read_some(struct client *c, uint64_t sector, uint32_t count)
{
    MUST(glide_volume_io(c->s->volume, GLIDE_READ, 0, sector * GLIDE_SECTOR, (uint64_t)count * GLIDE_SECTOR, c->buf));
    for (uint32_t i = 0; i < count; i++)
        stress_check(c->buf + i * GLIDE_SECTOR, sector + i, c->s->written[sector + i]);
}

static void zero_some(struct client *c, uint64_t sector, uint32_t count)
{
    MUST(glide_volume_io(c->s->volume, GLIDE_ZERO, 0, sector * GLIDE_SECTOR, (uint64_t)count * GLIDE_SECTOR, NULL));
    for (uint32_t i = 0; i < count; i++) {
        uint8_t zeros[GLIDE_SECTOR] = {0};
        c->s->written[sector + i] = 0;
        stress_check(zeros, sector + i, 0);
    }
}

/* Each client owns every STRIPES-th group of 8 sectors. */
static void *client_thread(void *arg)
{
    struct client *c = arg;

    while (!atomic_load(&stop)) {
        uint64_t groups = SECTORS / 8 / STRIPES;
        uint64_t sector = ((stress_draw(&c->seed) % groups) * STRIPES + c->index) * 8 + stress_draw(&c->seed) % 4;
        uint32_t count = 1 + stress_draw(&c->seed) % 4, what = stress_draw(&c->seed) % 16;
        enter(c->s);
        if (what < 7)
            write_some(c, sector, count);
        else if (what < 14)
            read_some(c, sector, count);
        else if (what == 14)
            zero_some(c, sector, count);
        else
            MUST(glide_volume_io(c->s->volume, GLIDE_FLUSH, 0, 0, 0, NULL));
        pthread_rwlock_unlock(&c->s->open);
        atomic_fetch_add(&operations, 1);
    }
    atomic_fetch_sub(&clients_left, 1);
    return NULL;
}

/* ---- NBD clients ---------------------------------------------------------------------------- */

static void *nbd_thread(void *arg)
{
    struct volume_state *s = arg;
    uint64_t seed = 99 + s->id[0], id = 1; /* the cookie changes */

    while (!atomic_load(&stop)) {
        enter(s);
        if (id % 2)
            MUST(stress_nbd_plain(s->volume, SECTORS, id, &seed));
        else
            MUST(stress_nbd_sparse(s->volume, SECTORS, id, &seed));
        id++;
        pthread_rwlock_unlock(&s->open);
    }
    atomic_fetch_sub(&clients_left, 1);
    return NULL;
}

static void *vhost_thread(void *arg)
{
    struct volume_state *s = arg;
    struct stress_guest g = {.written = s->written, .first = CLIENTS, .step = STRIPES, .seed = 33 + s->id[0]};

    g.positions = SECTORS / 8 / STRIPES;
    stress_guest_begin(&g);
    while (!atomic_load(&stop)) {
        enter(s);
        glide_vhost *device = stress_guest_visit(&g, s->volume);
        atomic_fetch_add(&visits, 1);
        bool early = stress_draw(&g.seed) % 2; /* else the volume may be closed before it */
        if (early)
            MUST(glide_vhost_close(device));
        pthread_rwlock_unlock(&s->open);
        if (!early)
            MUST(glide_vhost_close(device));
    }
    stress_guest_end(&g);
    atomic_fetch_sub(&clients_left, 1);
    return NULL;
}

/* ---- main ----------------------------------------------------------------------------------------------- */

static void start(struct volume_state *s, int index, const char *dir)
{
    pthread_rwlock_init(&s->open, NULL);
    pthread_mutex_init(&s->base_lock, NULL);
    s->cookie = (uint64_t)index + VOLUMES;
    memset(s->id, index + 1, 16);
    snprintf(s->log_dir, sizeof(s->log_dir), "%s/log%d", dir, index);
    open_volume(s);
}

int main(int argc, char **argv)
{
    pthread_t threads[3 + VOLUMES * (CLIENTS + 3)];
    static struct client clients[VOLUMES][CLIENTS];
    int n = 0;

    if (argc < 3) {
        fprintf(stderr, "usage: stress DIR SECONDS [SEED]\n");
        return 2;
    }
    uint64_t seed = argc > 3 ? strtoull(argv[3], NULL, 10) * 2 + 1 : 0x5eed;
    struct glide_engine_config config = {.workers = 3,
                                         .nbd_memory = 64 << 20,
                                         .segment_sectors = 32,
                                         .log_limit = 3 << 20,
                                         .map_budget = 1 << 20,
                                         .cache_bytes = 12 * GLIDE_BLOCK,
                                         .busy_poll_us = 50,
                                         .cache_dir = argv[1]};
    directory = argv[1];
    stress_check_hash();
    MUST(glide_engine_open(&config, &engine));
    for (int i = 0; i < VOLUMES; i++)
        start(&states[i], i, argv[1]);
    atomic_store(&clients_left, VOLUMES * (CLIENTS + 2));
    pthread_create(&threads[n++], NULL, fault_thread, NULL);
    pthread_create(&threads[n++], NULL, event_thread, NULL);
    pthread_create(&threads[n++], NULL, shadow_thread, NULL);
    for (int i = 0; i < VOLUMES; i++) {
        pthread_create(&threads[n++], NULL, upload_thread, &states[i]);
        pthread_create(&threads[n++], NULL, nbd_thread, &states[i]);
        pthread_create(&threads[n++], NULL, vhost_thread, &states[i]);
        for (uint32_t k = 0; k < CLIENTS; k++) {
            clients[i][k] = (struct client){.s = &states[i], .index = k, .seed = seed + (uint64_t)i * 100 + k + 1};
            pthread_create(&threads[n++], NULL, client_thread, &clients[i][k]);
        }
    }
    sleep((unsigned)atoi(argv[2]));
    atomic_store(&stop, true);
    alarm(END_SECONDS); /* what hangs shall not hang for ever */
    for (int i = 3; i < n; i++)
        pthread_join(threads[i], NULL);
    for (int i = 0; i < VOLUMES; i++)
        end_volume(&states[i]);
    glide_engine_shutdown(engine);
    for (int i = 0; i < 3; i++)
        pthread_join(threads[i], NULL);
    for (int i = 0; i < VOLUMES; i++)
        free(states[i].shadow.base);
    glide_engine_close(engine);
    printf("stress: %llu operations, %llu visits over vhost-user, %llu sectors compared with a second source, no "
           "difference\n",
           (unsigned long long)atomic_load(&operations), (unsigned long long)atomic_load(&visits),
           (unsigned long long)atomic_load(&compared));
    return 0;
}
