/*
 * Ranges of packs on their way from files and HTTP servers to buffers, and what is made of them there. Threads: a few
 * workers of the carrier's own, started by the first task; a task belongs to one of them. glide_carry is the only way
 * in, carried_post the only way out.
 */
#ifndef GLIDE_CARRIER_H
#define GLIDE_CARRIER_H

#include "volume/engine.h"

#include <sys/socket.h>

/* One range of one pack. */
struct get {
    struct list link; /* of queued, while there is no connection for it */
    struct carry_task *task;
    uint32_t kind, timeout_ms, connect_ms; /* of its source */
    uint64_t offset;
    uint32_t length;
    uint8_t *buffer; /* `room` bytes, of the carrier_thread's store of them */
    uint32_t room;
    const uint8_t *data; /* the range, once it is here */
    char *text;          /* the request, or the path of the file */
    struct sockaddr_storage address;
    uint32_t address_length;
    char *server, *ca; /* of TLS, else NULL */
};

/* Blocks that share ranges. */
struct carry_task {
    struct task task; /* of the worker that does it */
    struct carrier_thread *thread;
    struct glide_carried result;
    uint64_t volume, stamp, leave, began_ns;
    uint32_t get_count, gets_left;
    struct get *gets;
    uint32_t plan_count;
    struct glide_block_plan *plans; /* `first` is of `parts` here */
    uint32_t part_count;
    struct glide_part *parts; /* `pack` is the number of its get */
};

struct idle_buffer {
    struct list link;
    uint32_t room;
};

struct carrier_thread {
    struct worker worker;
    struct member member;
    struct task enter_task;
    struct engine *engine;
    atomic_uint load;   /* gets that are under way */
    struct list active; /* struct conn: waiting for something */
    struct list idle;   /* struct conn: kept, the last used first */
    struct list queued; /* struct get: for a connection, the oldest first */
    uint32_t connections;
    struct list buffers; /* struct idle_buffer */
    uint64_t buffer_bytes;
    bool leaving;
    uint8_t *scratch;   /* of land.c: two blocks */
    void *decompressor; /* of land.c: ZSTD_DCtx */
};

struct tls_pool;

int carrier_open(struct engine *e, struct carrier **out);
/* Ends what is under way; nothing is posted afterwards. */
void carrier_close(struct carrier *c);
/* Start the threads, if that was not done. Any thread. */
int carrier_start(struct carrier *c);
/* Begin a task: its arrays are malloc'ed, and the carrier's from here on. Any thread. */
int task_post(struct carrier *c, struct carry_task *task);
void task_free(struct carry_task *task);
struct tls_pool *carrier_tls(struct carrier *c);

/* ---- on the thread of the task ---- */
/* carrier.c: the range is in get->data, or err. Frees the task once it was the last. */
void get_done(struct get *get, int err);
uint8_t *buffer_take(struct carrier_thread *t, uint32_t bytes, uint32_t *room);
/* http.c: fetch over a kept or new connection; get_done follows, perhaps at once. */
void http_start(struct carrier_thread *t, struct get *get);
/* Cancel what waits for too long (now = UINT64_MAX: everything), and close connections that nobody used lately. */
void http_look(struct carrier_thread *t, uint64_t now);
/* Close kept connections. */
void http_close_idle(struct carrier_thread *t);
/* land.c: assemble, verify, cache and answer the blocks of a task whose ranges are here. 0, or why not all were. */
int land(struct carry_task *task);
void land_free(struct carrier_thread *t);

#endif
