/*
 * A worker: one thread, one io_uring, many volumes. Everything that belongs to
 * a volume, its connection or its queue is touched by its worker only; other
 * threads send tasks. A worker never waits for anything but its ring.
 */
#ifndef GLIDE_WORKER_H
#define GLIDE_WORKER_H

#include "util.h"

#include <liburing.h>
#include <pthread.h>
#include <stdatomic.h>

#define WORKER_TICK_MS 100u

struct engine;
struct worker;

/* What an SQE's user_data points to. */
struct ring_op {
    void (*complete)(struct ring_op *op, int res, uint32_t flags);
};

/* Work for a worker's thread. */
struct task {
    struct list link;
    void (*run)(struct task *task, struct worker *w);
};

struct worker {
    struct engine *engine;
    unsigned index;
    pthread_t thread;
    struct io_uring ring;
    pthread_mutex_t lock; /* guards inbox and ended */
    struct list inbox;    /* tasks from other threads */
    bool ended;           /* it takes no more of them */
    atomic_bool sleeping; /* the worker waits for its ring: wake it by wake_fd */
    int wake_fd;          /* eventfd, read through the ring */
    struct ring_op wake_op;
    uint64_t wake_value;
    struct task stop_task;
    bool leaving; /* it stops when nothing of its volumes is in flight */
    bool stop;
    uint64_t busy_poll_ns;        /* a wait as short as twice this makes the next one begin with polling; 0 = never */
    bool waits_short;             /* the last one was */
    struct list ready;            /* tasks of this thread for the next round */
    struct list batches;          /* volumes with writes to append at the end of the round (io.c) */
    struct list senders;          /* connections with replies to send at the end of the round (nbd_conn.c) */
    struct list volumes;          /* all volumes of this worker */
    struct ublk_device *released; /* devices that it served: open until the thread has ended (ublk_device.c) */
    struct __kernel_timespec tick;
    struct ring_op tick_op;
    bool ticking;
    uint8_t *scratch;              /* one receive buffer's worth: see nbd_conn.c */
    struct append_scratch *append; /* see write_log.c */
    atomic_uint volume_count;      /* for placement; any thread */
    int started;                   /* result of the thread's set-up, under lock */
    pthread_cond_t started_cond;
};

int worker_start(struct worker *w, struct engine *engine, unsigned index, uint64_t busy_poll_ns);
/* Tell the thread to end. Volumes that are left are let go: see glide_engine_end_workers. */
void worker_stop(struct worker *w);
/* Wait until it has, and free what it had. Posting goes on to be refused. */
void worker_join(struct worker *w);
/* Nobody posts any more. */
void worker_destroy(struct worker *w);

/* ---- any thread ---- */
/* False: the worker has ended, and the task stays the caller's. */
bool worker_post(struct worker *w, struct task *task);
/* Run fn(w, arg) on the worker, wait, return its result. -ESHUTDOWN: it has ended. */
int worker_call(struct worker *w, int (*fn)(struct worker *w, void *arg), void *arg);

/*
 * The same for work that cannot finish at once: `start` runs on the worker and later somebody on the worker
 * calls call_done(). The struct lives on the caller's stack.
 */
struct call {
    struct task task;
    void (*start)(struct call *call, struct worker *w);
    void *arg;
    struct list link; /* for whoever keeps calls waiting */
    int result;
    bool done;
    char error[256]; /* what fail() said on the worker, for the caller's glide_error() */
    pthread_mutex_t lock;
    pthread_cond_t cond;
};
int call_run(struct worker *w, struct call *call, void (*start)(struct call *, struct worker *), void *arg);
void call_done(struct call *call, int result);

/* ---- the worker's own thread ---- */
/* A free SQE; submits when the ring is full. Never NULL. */
struct io_uring_sqe *worker_sqe(struct worker *w, struct ring_op *op);
/* Run the task in the next round. */
void worker_defer(struct worker *w, struct task *task);
/* Something of a volume has ended: is it the last that a worker which is to stop waits for? */
void worker_stop_check(struct worker *w);
/* Call volume_tick() of every volume in about 100 ms, once. */
void worker_want_tick(struct worker *w);

#endif
