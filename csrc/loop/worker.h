/*
 * A worker: one thread, one io_uring, many members, which are volumes (this layer knows only member_ops). Everything
 * that belongs to a volume, its connection or its queue is touched by its worker only; other threads send tasks. A
 * worker never waits for anything but its ring.
 */
#ifndef GLIDE_WORKER_H
#define GLIDE_WORKER_H

#include "base/util.h"

#include <liburing.h>
#include <pthread.h>
#include <stdatomic.h>

#define WORKER_TICK_MS 100u
#define WORKER_SOON_MS 2u

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

/* What a worker calls on its members, all on its thread. */
struct member;
struct member_ops {
    /* 10 times a second while something waits. True: again. */
    bool (*tick)(struct member *m);
    /* WORKER_SOON_MS after somebody asked for it. */
    void (*soon)(struct member *m);
    /* The worker is to stop: end what is under way. */
    void (*let_go)(struct member *m);
    /* Nothing of it is in flight. */
    bool (*idle)(const struct member *m);
    /* The worker ends, and all are idle: unlink it. */
    void (*leave)(struct member *m);
};
struct member {
    struct list link;
    const struct member_ops *ops;
};

/* The end of a round: appends first, whose replies are sent in the same round. */
enum round_phase { ROUND_APPEND, ROUND_REPLY, ROUND_PHASES };

/* What cannot be freed before the thread has ended. */
struct leftover {
    struct list link;
    void (*free)(struct leftover *l);
};

struct worker {
    struct engine *engine; /* for tasks: nothing here looks into it */
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
    uint64_t busy_poll_ns; /* a wait as short as twice this makes the next one begin with polling; 0 = never */
    bool waits_short;      /* the last one was */
    struct list ready;     /* tasks of this thread for the next round */
    struct list at_end[ROUND_PHASES]; /* tasks for the end of this one */
    struct list members;
    struct list leftovers;
    struct __kernel_timespec tick;
    struct ring_op tick_op;
    bool ticking;
    struct __kernel_timespec soon;
    struct ring_op soon_op;
    bool soon_set;
    /* Work space for the layers above, malloc'ed by them: */
    uint8_t *scratch;              /* one receive buffer's worth (nbd_conn.c) */
    struct append_scratch *append; /* of write_log.c, from the engine's start on */
    atomic_uint volume_count;      /* for placement; any thread */
    int started;                   /* result of the thread's set-up, under lock */
    pthread_cond_t started_cond;
};

int worker_start(struct worker *w, struct engine *engine, unsigned index, uint64_t busy_poll_ns);
/* Tell the thread to end. Members that are left are let go: see glide_engine_end_workers. */
void worker_stop(struct worker *w);
/* Wait until the thread has ended, and free what it had, leftovers too. Posts are still refused. */
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
/* Give the kernel what is queued, instead of at the end of the round. */
void worker_submit(struct worker *w);
/* Run the task in the next round. */
void worker_defer(struct worker *w, struct task *task);
/* Run the task at the end of this round; it may be there already. */
void worker_at_end(struct worker *w, enum round_phase phase, struct task *task);
/* Something of a member has ended: let a worker that is to stop see whether that was all. */
void worker_stop_check(struct worker *w);
/* Let every member tick in about 100 ms, once. */
void worker_want_tick(struct worker *w);
/* The same for `soon`. */
void worker_want_soon(struct worker *w);

#endif
