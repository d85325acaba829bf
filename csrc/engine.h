/*
 * The engine: what the volumes of a host share. Lock order: none nests, each
 * lock guards one thing.
 */
#ifndef GLIDE_ENGINE_H
#define GLIDE_ENGINE_H

#include "block_cache.h"
#include "log_map.h"
#include "nbd_memory.h"
#include "worker.h"

/* A queue from workers to Python threads. */
struct outbox {
    pthread_mutex_t lock;
    pthread_cond_t cond;
    struct list items;
    uint64_t count;
    uint64_t wakes; /* outbox_wake was called so often */
    bool closed;
};

struct engine {
    struct glide_engine_config config;
    struct block_cache cache;
    struct leaf_pool leaves;
    _Atomic uint64_t log_bytes;   /* allocated by all logs */
    _Atomic uint64_t table_bytes; /* map memory besides leaves; each volume adds its changes */
    struct nbd_memory nbd;
    struct outbox faults;  /* of struct fault (fault.c) */
    struct outbox events;  /* of struct event (fault.c) */
    struct outbox shadows; /* of struct shadow_item (shadow.c) */
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
/* The worker that serves the device ends. */
void ublk_leave_behind(struct ublk_device *d);
/* Close the devices that the worker, which has ended, served to its end. */
void ublk_free_released(struct worker *w);

#endif
