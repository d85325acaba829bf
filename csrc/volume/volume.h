/*
 * A volume, in the C core: its write log, its maps, its requests.
 *
 * One worker owns a volume: every field without an atomic type is touched by
 * that thread only. This replaces the stripe words, pins and closed-segment
 * protocol that a volume shared by threads would need: between two rounds of
 * the worker a volume is always consistent.
 */
#ifndef GLIDE_VOLUME_H
#define GLIDE_VOLUME_H

#include "cache/block_map.h"
#include "volume/engine.h"
#include "volume/io.h"
#include "log/log_map.h"
#include "volume/filter.h"
#include "volume/stats.h"
#include "volume/transport.h"
#include "log/write_log.h"

/* One sync of the log at a time; see sync.c. */
struct sync_state {
    struct list next;     /* requests that the next sync will serve */
    struct list current;  /* those the running one serves */
    struct list store;    /* flush = "store": they wait for a commit */
    uint32_t outstanding; /* fsyncs in flight */
    uint64_t pos;         /* everything below is covered by the running sync */
    int err;
    bool running;
};

struct volume {
    struct engine *engine;
    struct worker *worker;
    struct member member; /* of the worker */
    struct task enter_task;
    struct task flush_task; /* io_flush at the end of the round */
    uint64_t cookie;
    _Atomic uint64_t size;  /* bytes */
    _Atomic uint64_t stamp; /* bumped by retire: installs resolved before it do not land */
    bool read_only, flush_store, closing;
    bool frozen;           /* freeze.c: nothing begins */
    int failed;            /* positive errno: all I/O fails with it */
    struct filter *filter; /* or NULL */

    struct write_log log;
    uint64_t committed_seq;
    uint64_t forgotten_seq;          /* of segments up to here the map may lack entries: see changed.h */
    uint64_t tickets, changed_bytes; /* changed.c: of contexts, and memory for their windows */
    struct log_map map;
    struct block_map base;
    const uint8_t *lent; /* while waiters of `lent_block` look again: its data, which the cache could not take */
    uint64_t lent_block;
    uint64_t counted_bytes; /* of map memory in engine->table_bytes */

    struct list batch;         /* WRITEs and ZEROs to append, in order; those that wait for space stay here */
    bool blocked;              /* the head of `batch` waits for space */
    bool paced;                /* it waits for its turn, as the logs fill too fast */
    uint64_t blocked_event_ns; /* when Python last heard of it */
    bool event_dirty;          /* GLIDE_EV_FIRST_DIRTY was sent */
    struct sync_state sync;
    struct table faults; /* block -> struct waiting (fault.c) */
    uint64_t waiting;    /* pieces of requests in it */
    bool answers_missed; /* some came while the volume was frozen: all waiters look again */

    struct list transports;
    uint32_t client_count;       /* transports that a close ends, and waits for */
    uint64_t inflight;           /* requests submitted and not done */
    struct list idle_calls;      /* struct call: wait until inflight is 0 */
    uint64_t reading;            /* reads of files in flight */
    struct list freeze_calls;    /* struct call: wait until that is 0 */
    pthread_mutex_t retire_lock; /* held by the one thread that retires or thins; taken before no other */
    struct stats stats;
};

/* glide_volume_open; `prepare` is called when the log is replayed and nobody is served yet. */
int volume_open(struct engine *e, const struct glide_volume_config *config,
                int (*prepare)(struct volume *v, const struct glide_volume_config *config), struct volume **out,
                struct glide_recovery *recovery);

/* At the end of the round: io_flush(v). */
void volume_want_flush(struct volume *v);
/* Publish changes of map memory to the engine's account. */
void volume_count_memory(struct volume *v);
/* Let a close that waits go on when nothing is in flight. */
void volume_idle_check(struct volume *v);
/* A request ended; wakes whoever waits until none is in flight. */
void volume_request_done(struct volume *v);

/* A read of a file ended; wakes whoever waits until none is in flight. */
void volume_read_done(struct volume *v);

/* retire.c: reads of committed segments whose sync failed go to the store from now on. */
void retire_failed(struct volume *v);

/* recover.c: replay the log directory. In standby nothing in it is changed, and segments that the store has are
 * replayed too. */
int volume_recover(struct volume *v, uint64_t committed_seq, bool always_verify, struct glide_recovery *out);
/* Replay what was appended since then. */
int volume_recover_tail(struct volume *v, struct glide_recovery *out);

#endif
