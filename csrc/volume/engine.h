/*
 * The engine: what the volumes of a host share. Locks do not nest, and each guards one thing.
 */
#ifndef GLIDE_ENGINE_H
#define GLIDE_ENGINE_H

#include "base/table.h"
#include "cache/block_cache.h"
#include "log/log_map.h"
#include "log/write_log.h"
#include "loop/outbox.h"
#include "loop/worker.h"

struct nbd_memory;
struct carrier;
struct volume;

struct engine {
    struct glide_engine_config config;
    struct block_cache cache;
    struct leaf_pool leaves;
    struct log_budget logs;
    _Atomic uint64_t table_bytes;   /* map memory besides leaves; each volume adds its changes */
    _Atomic uint64_t window_bytes;  /* of those, windows that are kept: io_changed.c */
    struct nbd_memory *nbd;         /* of all NBD connections */
    struct outbox faults;           /* of struct fault (fault.c) */
    struct list carried;            /* of struct carried (news.c), under faults.lock */
    _Atomic uint64_t fault_order;   /* of the last fault that was posted */
    bool poked;                     /* the thread in glide_news_next has something to do; under faults.lock */
    struct carrier *carrier;        /* of carry/, which makes it */
    pthread_mutex_t open_lock;      /* guards open_volumes; held while an answer is posted */
    struct table open_volumes;      /* cookie -> struct volume: for answers from threads that do not keep it open */
    struct glide_volume_stats gone; /* the sums of those that left; under open_lock */
    struct outbox events;           /* of struct event (fault.c) */
    struct outbox shadows;          /* of struct shadow_item (shadow.c) */
    unsigned worker_count;
    bool workers_ended;
    struct worker *workers;
};

/* Bytes of map memory in use. Any thread. */
uint64_t engine_map_bytes(struct engine *e);
/* Log space or map memory was freed: let writers that wait look again. Any thread. */
void engine_space_freed(struct engine *e);
/* Somebody waits for log space: spares of all volumes go. Any thread. */
void engine_space_wanted(struct engine *e);

/* Answers to the volume of a cookie may be posted from now on, and until engine_leave returns. -ENOMEM. */
int engine_enter(struct engine *e, struct volume *v);
void engine_leave(struct engine *e, struct volume *v);

#endif
