/*
 * Tasks and their threads. glide_carry cuts what is wanted into tasks on the thread of the caller; from then on a task
 * belongs to one of the carrier's workers, which takes its ranges (http.c, or a read of a file through the ring), and
 * once the last is here lands it. Landing is deferred behind the completions of a round, and what the round wants
 * received is submitted first: the kernel fills one buffer while another is hashed.
 *
 * A task that fails says so and is forgotten: retries, and what the failure means, are Python's.
 */
#include "carry/carrier.h"
#include "carry/tls.h"

#include "base/disk.h"
#include "volume/fault.h"

#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <unistd.h>

#define MAX_THREADS 4u
#define SMALL_BUFFER (160u << 10) /* a block, its neighbours' gap, and the head of an answer */
#define KEPT_BYTES (24u << 20)    /* of buffers, by each thread */
#define HTTP_HEAD 8192u

struct carrier {
    struct engine *engine;
    pthread_mutex_t lock; /* guards `started` and the start of the threads */
    struct tls_pool tls;
    unsigned started, count;
    struct carrier_thread threads[MAX_THREADS];
};

/* ---- buffers ------------------------------------------------------------------------------------- */

/* Large memory that was touched before is worth keeping: new pages cost more than what is done with them. */
uint8_t *buffer_take(struct carrier_thread *t, uint32_t bytes, uint32_t *room)
{
    list_each(at, &t->buffers) {
        struct idle_buffer *b = container_of(at, struct idle_buffer, link);
        if (b->room < bytes || b->room / 4 > max_u64(bytes, SMALL_BUFFER))
            continue;
        list_remove(&b->link);
        t->buffer_bytes -= b->room;
        *room = b->room;
        return (uint8_t *)b;
    }
    *room = (uint32_t)max_u64(bytes, SMALL_BUFFER);
    return malloc(*room);
}

static void buffer_give(struct carrier_thread *t, uint8_t *buffer, uint32_t room)
{
    struct idle_buffer *b = (struct idle_buffer *)(void *)buffer;

    if (!buffer || t->buffer_bytes + room > KEPT_BYTES) {
        free(buffer);
        return;
    }
    b->room = room;
    list_prepend(&t->buffers, &b->link);
    t->buffer_bytes += room;
}

/* ---- the end of a task ------------------------------------------------------------------------------ */

void task_free(struct carry_task *task)
{
    for (uint32_t i = 0; task->gets && i < task->get_count; i++) {
        free(task->gets[i].text);
        free(task->gets[i].server);
        free(task->gets[i].ca);
    }
    free(task->gets);
    free(task->plans);
    free(task->parts);
    free(task);
}

static void task_end(struct task *task, struct worker *w)
{
    struct carry_task *t = container_of(task, struct carry_task, task);
    struct carrier_thread *thread = t->thread;

    if (!t->result.err && !thread->leaving) {
        if (io_uring_sq_ready(&w->ring))
            io_uring_submit(&w->ring);
        t->result.err = land(t);
    }
    for (uint32_t i = 0; i < t->get_count; i++)
        buffer_give(thread, t->gets[i].buffer, t->gets[i].room);
    atomic_fetch_sub(&thread->load, t->get_count);
    if (!thread->leaving && carried_post(thread->engine, &t->result)) { /* not now: there is no memory */
        atomic_fetch_add(&thread->load, t->get_count);
        for (uint32_t i = 0; i < t->get_count; i++)
            t->gets[i].buffer = NULL;
        t->result.err = -ENOMEM;
        worker_defer(w, task);
        return;
    }
    task_free(t);
    worker_stop_check(w);
}

void get_done(struct get *get, int err)
{
    struct carry_task *task = get->task;

    if (err && !task->result.err)
        task->result.err = err;
    task->result.gets += !err;
    task->result.bytes += err ? 0 : get->length;
    if (--task->gets_left)
        return;
    task->result.ns = elapsed_ns(now_ns(), task->began_ns);
    task->task.run = task_end;
    worker_defer(&task->thread->worker, &task->task);
}

/* ---- files ------------------------------------------------------------------------------------------- */

struct file_read {
    struct ring_op op;
    struct get *get;
    int fd;
};

static void on_read(struct ring_op *op, int res, uint32_t flags)
{
    struct file_read *r = container_of(op, struct file_read, op);
    struct get *get = r->get;

    (void)flags;
    close(r->fd);
    free(r);
    get->data = get->buffer;
    get_done(get, res < 0 ? res : res == (int)get->length ? 0 : -ENODATA);
}

static void file_start(struct carrier_thread *t, struct get *get)
{
    struct file_read *r = malloc(sizeof(*r));
    int fd = r ? disk_open_fd(get->text, O_RDONLY | O_NOFOLLOW) : -ENOMEM;

    if (fd < 0) {
        get_done(get, fd);
        free(r);
        return;
    }
    *r = (struct file_read){.op = {on_read}, .get = get, .fd = fd};
    struct io_uring_sqe *sqe = worker_sqe(&t->worker, &r->op);
    io_uring_prep_read(sqe, fd, get->buffer, get->length, get->offset);
    io_uring_sqe_set_data(sqe, &r->op);
}

/* ---- the beginning of a task --------------------------------------------------------------------------- */

static void task_start(struct task *task, struct worker *w)
{
    struct carry_task *t = container_of(task, struct carry_task, task);
    struct carrier_thread *thread = container_of(w, struct carrier_thread, worker);
    uint32_t count = t->get_count; /* the last may end the task */

    for (uint32_t i = 0; i < count; i++) {
        struct get *get = &t->gets[i];
        get->buffer = buffer_take(thread, get->length + (get->kind == GLIDE_SOURCE_FILE ? 0 : HTTP_HEAD), &get->room);
        if (thread->leaving || !get->buffer)
            get_done(get, thread->leaving ? -ESHUTDOWN : -ENOMEM);
        else if (get->kind == GLIDE_SOURCE_FILE)
            file_start(thread, get);
        else
            http_start(thread, get);
    }
}

int task_post(struct carrier *c, struct carry_task *task)
{
    struct carrier_thread *best = &c->threads[0];

    for (unsigned i = 1; i < c->count; i++)
        if (atomic_load(&c->threads[i].load) < atomic_load(&best->load))
            best = &c->threads[i];
    task->thread = best;
    task->task.run = task_start;
    atomic_fetch_add(&best->load, task->get_count);
    if (worker_post(&best->worker, &task->task))
        return 0;
    task_free(task);
    return -ESHUTDOWN;
}

/* ---- threads -------------------------------------------------------------------------------------------- */

static struct carrier_thread *thread_of(const struct member *m)
{
    return container_of(m, struct carrier_thread, member);
}

static bool tick(struct member *m)
{
    struct carrier_thread *t = thread_of(m);

    http_look(t, now_ns());
    return !list_empty(&t->active) || !list_empty(&t->idle);
}

static void let_go(struct member *m)
{
    struct carrier_thread *t = thread_of(m);

    t->leaving = true;
    http_look(t, UINT64_MAX);
}

static void soon(struct member *m) { (void)m; }

static bool is_idle(const struct member *m) { return !atomic_load(&thread_of(m)->load); }

static void leave(struct member *m)
{
    struct carrier_thread *t = thread_of(m);

    http_close_idle(t);
    for (struct list *e; (e = list_pop(&t->buffers));)
        free(container_of(e, struct idle_buffer, link));
    land_free(t);
    free(t->scratch);
    list_remove(&m->link);
}

static const struct member_ops MEMBER_OPS = {
    .tick = tick, .soon = soon, .let_go = let_go, .idle = is_idle, .leave = leave};

static void enter(struct task *task, struct worker *w)
{
    struct carrier_thread *t = container_of(task, struct carrier_thread, enter_task);

    prctl(PR_SET_NAME, "glide-carry", 0, 0, 0);
    list_append(&w->members, &t->member.link);
}

static int thread_start(struct carrier *c, struct carrier_thread *t, unsigned index)
{
    t->engine = c->engine;
    t->scratch = malloc(2 * GLIDE_BLOCK);
    if (!t->scratch)
        return -ENOMEM;
    list_init(&t->active);
    list_init(&t->idle);
    list_init(&t->queued);
    list_init(&t->buffers);
    list_init(&t->member.link);
    t->member.ops = &MEMBER_OPS;
    int err = worker_start(&t->worker, c->engine, index, 0);
    if (err) {
        free(t->scratch);
        return err;
    }
    t->enter_task.run = enter;
    worker_post(&t->worker, &t->enter_task);
    return 0;
}

int carrier_start(struct carrier *c)
{
    cpu_set_t set;
    unsigned want = sched_getaffinity(0, sizeof(set), &set) ? 1 : (unsigned)CPU_COUNT(&set);
    int err = 0;

    pthread_mutex_lock(&c->lock);
    for (; !c->count && !err && c->started < (want < MAX_THREADS ? want : MAX_THREADS); c->started += !err)
        err = thread_start(c, &c->threads[c->started], c->started);
    if (!c->count && c->started) { /* fewer than wanted are enough */
        c->count = c->started;
        err = 0;
    }
    pthread_mutex_unlock(&c->lock);
    return err;
}

int carrier_open(struct engine *e, struct carrier **out)
{
    struct carrier *c = calloc(1, sizeof(*c));

    *out = c;
    if (!c)
        return -ENOMEM;
    c->engine = e;
    pthread_mutex_init(&c->lock, NULL);
    tls_pool_init(&c->tls);
    return 0;
}

struct tls_pool *carrier_tls(struct carrier *c) { return &c->tls; }

void carrier_close(struct carrier *c)
{
    if (!c)
        return;
    for (unsigned i = 0; i < c->started; i++)
        worker_stop(&c->threads[i].worker);
    for (unsigned i = 0; i < c->started; i++) {
        worker_join(&c->threads[i].worker);
        worker_destroy(&c->threads[i].worker);
    }
    tls_pool_free(&c->tls);
    pthread_mutex_destroy(&c->lock);
    free(c);
}
