/*
 * The loop of a worker. A round: run tasks, finish what the round collected
 * (appends, syncs, replies), submit, wait, complete.
 *
 * Wake-ups: a poster puts its task into the inbox and writes the eventfd only if
 * the worker said that it sleeps. The worker says so before its last look at the
 * inbox, so one of the two sees the other.
 *
 * Polling: a client that works with one request at a time sends the next one
 * sooner than a thread can fall asleep and wake up again. So after a short wait
 * the worker looks at the ring for a while before it sleeps; a long wait ends that.
 */
#include "loop/worker.h"

#include "glide_core_internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <unistd.h>

#define RING_ENTRIES 1024
#define CQ_ENTRIES 16384
#define POLL_LOOPS 16 /* looks at the ring between two at the clock */

/* ---- posting ---------------------------------------------------------------------------- */

bool worker_post(struct worker *w, struct task *task)
{
    uint64_t one = 1;

    pthread_mutex_lock(&w->lock);
    bool ended = w->ended;
    if (!ended)
        list_append(&w->inbox, &task->link);
    pthread_mutex_unlock(&w->lock);
    if (!ended && atomic_exchange(&w->sleeping, false)) {
        while (write(w->wake_fd, &one, sizeof(one)) < 0 && errno == EINTR)
            ;
    }
    return !ended;
}

static void run_call(struct task *task, struct worker *w)
{
    struct call *call = container_of(task, struct call, task);

    call->start(call, w);
}

int call_run(struct worker *w, struct call *call, void (*start)(struct call *, struct worker *), void *arg)
{
    call->task.run = run_call;
    call->start = start;
    call->arg = arg;
    call->result = 0;
    call->done = false;
    call->error[0] = 0;
    list_init(&call->link);
    pthread_mutex_init(&call->lock, NULL);
    pthread_cond_init(&call->cond, NULL);
    if (worker_post(w, &call->task)) {
        pthread_mutex_lock(&call->lock);
        while (!call->done)
            pthread_cond_wait(&call->cond, &call->lock);
        pthread_mutex_unlock(&call->lock);
    } else {
        call->result = -ESHUTDOWN;
        snprintf(call->error, sizeof(call->error), "the volume was handed over");
    }
    pthread_cond_destroy(&call->cond);
    pthread_mutex_destroy(&call->lock);
    if (call->result < 0)
        fail(call->result, "%s", call->error);
    return call->result;
}

void call_done(struct call *call, int result)
{
    pthread_mutex_lock(&call->lock);
    call->result = result;
    call->done = true;
    pthread_cond_signal(&call->cond);
    pthread_mutex_unlock(&call->lock); /* the caller may free `call` from here on */
}

struct simple_call {
    struct call call;
    int (*fn)(struct worker *w, void *arg);
    void *arg;
};

static void start_simple(struct call *call, struct worker *w)
{
    struct simple_call *s = container_of(call, struct simple_call, call);

    fail(0, "%s", ""); /* what an earlier call said */
    int result = s->fn(w, s->arg);
    if (result < 0)
        snprintf(call->error, sizeof(call->error), "%s", glide_error());
    call_done(call, result);
}

int worker_call(struct worker *w, int (*fn)(struct worker *, void *), void *arg)
{
    struct simple_call s = {.fn = fn, .arg = arg};

    return call_run(w, &s.call, start_simple, NULL);
}

/* ---- the ring ------------------------------------------------------------------------------ */

struct io_uring_sqe *worker_sqe(struct worker *w, struct ring_op *op)
{
    struct io_uring_sqe *sqe;

    while (!(sqe = io_uring_get_sqe(&w->ring)))
        io_uring_submit(&w->ring);
    io_uring_prep_nop(sqe); /* all fields set, whatever the caller prepares next */
    io_uring_sqe_set_data(sqe, op);
    return sqe;
}

void worker_submit(struct worker *w) { io_uring_submit(&w->ring); }

static void arm_wake(struct worker *w)
{
    struct io_uring_sqe *sqe = worker_sqe(w, &w->wake_op);

    io_uring_prep_read(sqe, w->wake_fd, &w->wake_value, sizeof(w->wake_value), 0);
    io_uring_sqe_set_data(sqe, &w->wake_op);
}

static void on_wake(struct ring_op *op, int res, uint32_t flags)
{
    (void)res;
    (void)flags;
    arm_wake(container_of(op, struct worker, wake_op));
}

static void on_tick(struct ring_op *op, int res, uint32_t flags)
{
    struct worker *w = container_of(op, struct worker, tick_op);
    bool again = false;

    (void)res;
    (void)flags;
    w->ticking = false;
    for (struct list *at = w->members.next, *next; at != &w->members; at = next) {
        struct member *m = container_of(at, struct member, link);
        next = at->next;
        again |= m->ops->tick(m);
    }
    if (again)
        worker_want_tick(w);
}

void worker_want_tick(struct worker *w)
{
    if (w->ticking)
        return;
    w->ticking = true;
    w->tick = (struct __kernel_timespec){.tv_nsec = WORKER_TICK_MS * 1000000};
    struct io_uring_sqe *sqe = worker_sqe(w, &w->tick_op);
    io_uring_prep_timeout(sqe, &w->tick, 0, 0);
    io_uring_sqe_set_data(sqe, &w->tick_op);
}

static void on_soon(struct ring_op *op, int res, uint32_t flags)
{
    struct worker *w = container_of(op, struct worker, soon_op);

    (void)res;
    (void)flags;
    w->soon_set = false;
    list_each(at, &w->members) {
        struct member *m = container_of(at, struct member, link);
        m->ops->soon(m);
    }
}

void worker_want_soon(struct worker *w)
{
    if (w->soon_set)
        return;
    w->soon_set = true;
    w->soon = (struct __kernel_timespec){.tv_nsec = WORKER_SOON_MS * 1000000};
    struct io_uring_sqe *sqe = worker_sqe(w, &w->soon_op);
    io_uring_prep_timeout(sqe, &w->soon, 0, 0);
    io_uring_sqe_set_data(sqe, &w->soon_op);
}

void worker_defer(struct worker *w, struct task *task) { list_append(&w->ready, &task->link); }

void worker_at_end(struct worker *w, enum round_phase phase, struct task *task)
{
    if (list_empty(&task->link))
        list_append(&w->at_end[phase], &task->link);
}

/* ---- the loop ---------------------------------------------------------------------------------- */

static void run_tasks(struct worker *w)
{
    struct list tasks;

    list_init(&tasks);
    list_splice(&tasks, &w->ready);
    pthread_mutex_lock(&w->lock);
    list_splice(&tasks, &w->inbox);
    pthread_mutex_unlock(&w->lock);
    for (struct list *e; (e = list_pop(&tasks));) {
        struct task *task = container_of(e, struct task, link);
        task->run(task, w);
    }
}

static void end_round(struct worker *w)
{
    for (int phase = 0; phase < ROUND_PHASES; phase++) {
        for (struct list *e; (e = list_pop(&w->at_end[phase]));) {
            struct task *task = container_of(e, struct task, link);
            task->run(task, w);
        }
    }
}

/* True: something is to be done at once. */
static bool announce_sleep(struct worker *w)
{
    atomic_store(&w->sleeping, true);
    pthread_mutex_lock(&w->lock);
    bool busy = !list_empty(&w->inbox) || !list_empty(&w->ready);
    pthread_mutex_unlock(&w->lock);
    if (busy)
        atomic_store(&w->sleeping, false);
    return busy;
}

/* After announce_sleep(): poll until something happened (true) or the time is over. */
static bool busy_poll(struct worker *w, uint64_t since)
{
    io_uring_submit(&w->ring);
    do {
        for (int i = 0; i < POLL_LOOPS; i++) {
            if (io_uring_cq_ready(&w->ring) || !atomic_load(&w->sleeping) ||
                (__atomic_load_n(w->ring.sq.kflags, __ATOMIC_RELAXED) & IORING_SQ_TASKRUN))
                return true;
            cpu_relax();
        }
    } while (elapsed_ns(now_ns(), since) < w->busy_poll_ns);
    return false;
}

/* Submit, and wait for a completion or a task. */
static void wait_for_work(struct worker *w)
{
    uint64_t since = now_ns();

    if (w->waits_short && busy_poll(w, since))
        io_uring_get_events(&w->ring);
    else
        io_uring_submit_and_wait(&w->ring, 1);
    w->waits_short = w->busy_poll_ns && elapsed_ns(now_ns(), since) < 2 * w->busy_poll_ns;
}

static void complete_all(struct worker *w)
{
    struct io_uring_cqe *cqe;
    unsigned head, seen = 0;

    io_uring_for_each_cqe(&w->ring, head, cqe)
    {
        struct ring_op *op = io_uring_cqe_get_data(cqe);
        int res = cqe->res;
        uint32_t flags = cqe->flags;
        seen++;
        if (op)
            op->complete(op, res, flags);
    }
    io_uring_cq_advance(&w->ring, seen);
}

/* What was posted in time is answered still; on members that are closing nothing begins. */
static void refuse_tasks(struct worker *w)
{
    pthread_mutex_lock(&w->lock);
    w->ended = true;
    pthread_mutex_unlock(&w->lock);
    do
        run_tasks(w);
    while (!list_empty(&w->inbox) || !list_empty(&w->ready));
}

/* Nothing of them is in flight, so whoever closes them does not need this thread. */
static void members_leave(struct worker *w)
{
    while (!list_empty(&w->members)) {
        struct member *m = container_of(w->members.next, struct member, link);
        m->ops->leave(m);
    }
}

static int set_up(struct worker *w)
{
    struct io_uring_params p = {.flags = IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN | IORING_SETUP_CQSIZE |
                                         IORING_SETUP_COOP_TASKRUN | IORING_SETUP_TASKRUN_FLAG,
                                .cq_entries = CQ_ENTRIES};
    int err = io_uring_queue_init_params(RING_ENTRIES, &w->ring, &p);

    if (err)
        return err;
    io_uring_register_ring_fd(&w->ring); /* saves a table look-up per call; not essential */
    prctl(PR_SET_NAME, "glide-worker", 0, 0, 0);
    arm_wake(w);
    return 0;
}

static void *worker_main(void *arg)
{
    struct worker *w = arg;
    int err = set_up(w);

    pthread_mutex_lock(&w->lock);
    w->started = err ? err : 1;
    pthread_cond_signal(&w->started_cond);
    pthread_mutex_unlock(&w->lock);
    if (err)
        return NULL;
    while (!w->stop) {
        run_tasks(w);
        end_round(w);
        if (w->stop)
            break;
        if (announce_sleep(w))
            io_uring_submit_and_get_events(&w->ring);
        else
            wait_for_work(w);
        atomic_store(&w->sleeping, false);
        complete_all(w);
        end_round(w);
    }
    refuse_tasks(w);
    members_leave(w);
    return NULL; /* with the ring open: see worker_join */
}

/* ---- start, stop ---------------------------------------------------------------------------------- */

int worker_start(struct worker *w, struct engine *engine, unsigned index, uint64_t busy_poll_ns)
{
    memset(w, 0, sizeof(*w));
    w->engine = engine;
    w->index = index;
    w->busy_poll_ns = busy_poll_ns;
    list_init(&w->inbox);
    list_init(&w->ready);
    for (int phase = 0; phase < ROUND_PHASES; phase++)
        list_init(&w->at_end[phase]);
    list_init(&w->members);
    list_init(&w->leftovers);
    w->wake_op.complete = on_wake;
    w->tick_op.complete = on_tick;
    w->soon_op.complete = on_soon;
    pthread_mutex_init(&w->lock, NULL);
    pthread_cond_init(&w->started_cond, NULL);
    w->wake_fd = eventfd(0, EFD_CLOEXEC);
    int err = w->wake_fd < 0 ? -errno : 0;
    if (!err)
        err = -pthread_create(&w->thread, NULL, worker_main, w);
    if (!err) {
        pthread_mutex_lock(&w->lock);
        while (!w->started)
            pthread_cond_wait(&w->started_cond, &w->lock);
        err = w->started < 0 ? w->started : 0;
        pthread_mutex_unlock(&w->lock);
        if (err)
            pthread_join(w->thread, NULL);
    }
    if (err) {
        if (w->wake_fd >= 0)
            close(w->wake_fd);
        return fail(err, "cannot start an io_uring worker: %s (needs Linux 6.1 and kernel.io_uring_disabled = 0)",
                    strerror(-err));
    }
    return 0;
}

static void start_stop(struct task *task, struct worker *w)
{
    (void)task;
    w->leaving = true;
    list_each(at, &w->members) {
        struct member *m = container_of(at, struct member, link);
        m->ops->let_go(m);
    }
    worker_stop_check(w);
}

void worker_stop_check(struct worker *w)
{
    if (!w->leaving)
        return;
    list_each(at, &w->members) {
        const struct member *m = container_of(at, struct member, link);
        if (!m->ops->idle(m))
            return;
    }
    w->stop = true;
}

void worker_stop(struct worker *w)
{
    w->stop_task.run = start_stop;
    worker_post(w, &w->stop_task);
}

void worker_join(struct worker *w)
{
    pthread_join(w->thread, NULL);
    /* Not sooner: the driver of ublk expects that what cancels its commands and the thread that gave them do not run
     * at once. Up to Linux 6.14 requests of guests are lost to it else, and the device never is QUIESCED. */
    io_uring_queue_exit(&w->ring);
    close(w->wake_fd);
    free(w->append);
    free(w->scratch);
    for (struct list *e; (e = list_pop(&w->leftovers));) {
        struct leftover *l = container_of(e, struct leftover, link);
        l->free(l);
    }
}

void worker_destroy(struct worker *w)
{
    pthread_cond_destroy(&w->started_cond);
    pthread_mutex_destroy(&w->lock);
}
