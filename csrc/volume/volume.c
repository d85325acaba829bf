/*
 * Volumes: open and close, and the calls that Python makes on them. Each call
 * runs on the volume's worker as one step, so it sees and leaves the volume
 * between two requests.
 */
#include "volume/volume.h"

#include "volume/fault.h"

#include <stdlib.h>
#include <string.h>

/* ---- for the request code ---------------------------------------------------------------- */

void volume_want_flush(struct volume *v) { worker_at_end(v->worker, ROUND_APPEND, &v->flush_task); }

void volume_count_memory(struct volume *v)
{
    uint64_t now = log_map_table_bytes(&v->map) + block_map_bytes(&v->base) + v->faults.bytes + v->changed_bytes;

    if (now != v->counted_bytes) {
        atomic_fetch_add(&v->engine->table_bytes, now - v->counted_bytes); /* wraps the right way */
        v->counted_bytes = now;
    }
}

static struct volume *volume_of(const struct member *m) { return container_of(m, struct volume, member); }

static bool is_idle(const struct member *m)
{
    struct volume *v = volume_of(m);
    bool idle = !v->inflight;

    transports_each(t, v)
        idle = idle && t->ops->idle(t);
    return idle;
}

void volume_idle_check(struct volume *v)
{
    worker_stop_check(v->worker);
    if (v->inflight || v->client_count)
        return;
    for (struct list *e; (e = list_pop(&v->idle_calls));)
        call_done(container_of(e, struct call, link), 0);
}

void volume_request_done(struct volume *v)
{
    v->inflight--;
    if (v->closing)
        volume_idle_check(v);
}

void transport_enter(struct volume *v, struct transport *t, const struct transport_ops *ops)
{
    t->ops = ops;
    list_append(&v->transports, &t->link);
    v->client_count += ops->close != NULL;
}

void transport_leave(struct volume *v, struct transport *t)
{
    list_remove(&t->link);
    v->client_count -= t->ops->close != NULL;
}

struct transport *transport_find(const struct volume *v, const struct transport_ops *ops)
{
    transports_each(t, v)
        if (t->ops == ops)
            return t;
    return NULL;
}

/* Writers that have waited longer than the option allows. */
static void expire_writers(struct volume *v, uint64_t now)
{
    uint64_t limit = (uint64_t)v->engine->config.log_full_timeout_ms * 1000000u;

    for (struct list *at = v->batch.next, *next; limit && at != &v->batch; at = next) {
        struct io_req *req = container_of(at, struct io_req, link);
        next = at->next;
        if (elapsed_ns(now, req->start_ns) > limit) {
            list_remove(at);
            io_finish(req, EIO);
        }
    }
}

/* Timeouts, retries. */
static bool tick(struct member *m)
{
    struct volume *v = volume_of(m);
    uint64_t now = now_ns(), limit = (uint64_t)v->engine->config.read_timeout_ms * 1000000u;

    if (v->frozen)
        return v->blocked || v->waiting;
    if (v->blocked) {
        expire_writers(v, now);
        volume_want_flush(v);
    }
    if (limit && v->waiting)
        fault_expire(v, now, limit);
    bool held = v->filter && v->filter->ops->tick(v, now);
    transports_each(t, v)
        held |= t->ops->tick && t->ops->tick(t);
    return v->blocked || v->waiting || held;
}

static void soon(struct member *m)
{
    struct volume *v = volume_of(m);

    if (v->paced && !v->frozen)
        volume_want_flush(v);
}

/* ---- open, close ---------------------------------------------------------------------------- */

static struct worker *least_loaded(struct engine *e)
{
    struct worker *best = &e->workers[0];

    for (unsigned i = 1; i < e->worker_count; i++) {
        if (atomic_load(&e->workers[i].volume_count) < atomic_load(&best->volume_count))
            best = &e->workers[i];
    }
    atomic_fetch_add(&best->volume_count, 1);
    return best;
}

static void enter(struct task *task, struct worker *w)
{
    struct volume *v = container_of(task, struct volume, enter_task);

    list_append(&w->members, &v->member.link);
    volume_count_memory(v);
}

static void leave(struct member *m)
{
    struct volume *v = volume_of(m);

    transports_each(t, v)
        if (t->ops->left_behind)
            t->ops->left_behind(t);
    list_remove(&m->link);
    list_remove(&v->flush_task.link);
}

static int leave_worker(struct worker *w, void *arg)
{
    struct volume *v = arg;

    (void)w;
    leave(&v->member);
    return 0;
}

static void flush_at_end(struct task *task, struct worker *w)
{
    (void)w;
    io_flush(container_of(task, struct volume, flush_task));
}

static void volume_free(struct volume *v)
{
    log_map_destroy(&v->map);
    block_map_destroy(&v->base);
    fault_table_destroy(v);
    if (v->filter)
        v->filter->ops->free(v);
    volume_count_memory(v);
    log_close(&v->log, !v->frozen);
    pthread_mutex_destroy(&v->retire_lock);
    free(v);
}

static struct volume *volume_new(struct engine *e, const struct glide_volume_config *c)
{
    struct volume *v = calloc(1, sizeof(*v));

    if (!v)
        return NULL;
    v->engine = e;
    v->cookie = c->cookie;
    v->read_only = c->read_only;
    v->flush_store = c->flush_store;
    v->committed_seq = v->forgotten_seq = c->committed_seq;
    v->frozen = c->standby;
    atomic_init(&v->size, c->size);
    atomic_init(&v->stamp, 1);
    struct list *lists[] = {&v->member.link, &v->flush_task.link, &v->batch,      &v->transports,  &v->idle_calls,
                            &v->sync.next,   &v->sync.current,    &v->sync.store, &v->freeze_calls};
    for (size_t i = 0; i < ARRAY_LEN(lists); i++)
        list_init(lists[i]);
    pthread_mutex_init(&v->retire_lock, NULL);
    log_map_init(&v->map, &e->leaves);
    block_map_init(&v->base, max_u64(e->config.map_budget / 4, 65536));
    table_init(&v->faults);
    return v;
}

static void end_requests(struct volume *v)
{
    v->closing = true;
    transports_each(t, v)
        if (t->ops->close)
            t->ops->close(t);
    io_fail_parked(v, ESHUTDOWN);
}

/* Without a word to guests if it is frozen; nothing begins any more. */
static void let_go(struct member *m)
{
    struct volume *v = volume_of(m);

    transports_each(t, v)
        if (t->ops->let_go)
            t->ops->let_go(t);
    end_requests(v);
}

static const struct member_ops MEMBER_OPS = {
    .tick = tick, .soon = soon, .let_go = let_go, .idle = is_idle, .leave = leave};

int volume_open(struct engine *engine, const struct glide_volume_config *config,
                int (*prepare)(struct volume *v, const struct glide_volume_config *config), struct volume **out,
                struct glide_recovery *recovery)
{
    *out = NULL;
    if (!config->size || config->size % SECTOR || config->size > (uint64_t)1 << 60)
        return fail(-EINVAL, "a volume's size is a multiple of %u bytes up to 2^60, not %llu", SECTOR,
                    (unsigned long long)config->size);
    struct volume *v = volume_new(engine, config);
    if (!v)
        return -ENOMEM;
    int err = log_open(&v->log, &engine->logs, config->log_dir, config->volume_id, config->log_id);
    if (!err)
        err = volume_recover(v, config->committed_seq, config->always_verify, recovery);
    if (!err)
        err = prepare(v, config);
    if (err) {
        volume_free(v);
        return err;
    }
    v->event_dirty = v->log.count > 0;
    v->worker = least_loaded(engine);
    v->enter_task.run = enter;
    v->flush_task.run = flush_at_end;
    v->member.ops = &MEMBER_OPS;
    err = engine_enter(engine, v);
    if (err) {
        atomic_fetch_sub(&v->worker->volume_count, 1);
        volume_free(v);
        return err;
    }
    if (!worker_post(v->worker, &v->enter_task)) { /* nobody waits: whatever comes later is behind it */
        engine_leave(engine, v);
        atomic_fetch_sub(&v->worker->volume_count, 1);
        volume_free(v);
        return fail(-ESHUTDOWN, "the engine's workers have ended");
    }
    *out = v;
    return 0;
}

static void start_close(struct call *call, struct worker *w)
{
    struct volume *v = call->arg;

    (void)w;
    end_requests(v);
    list_append(&v->idle_calls, &call->link);
    volume_idle_check(v);
}

static int check_free(struct worker *w, void *arg)
{
    struct volume *v = arg;

    (void)w;
    transports_each(t, v)
        if (!t->ops->close)
            return fail(-EBUSY, "stop or release the volume's device first");
    return 0;
}

int glide_volume_close(glide_volume *v)
{
    struct call call;
    int err = worker_call(v->worker, check_free, v);

    if (err == -EBUSY)
        return err;
    engine_leave(v->engine, v);
    /* Where the worker has ended these say that they cannot: the volume is out of it already. */
    call_run(v->worker, &call, start_close, v);
    worker_call(v->worker, leave_worker, v);
    fault_forget(v->engine, v->cookie);
    atomic_fetch_sub(&v->worker->volume_count, 1);
    struct engine *e = v->engine;
    volume_free(v);
    engine_space_freed(e);
    return 0;
}

/* ---- log ---------------------------------------------------------------------------------------- */

struct volume_call {
    struct volume *v;
    uint64_t value;
};

static int do_seal(struct worker *w, void *arg)
{
    struct volume_call *c = arg;

    (void)w;
    if (c->v->frozen)
        return fail(-EBUSY, "the volume is being handed over");
    log_seal(&c->v->log);
    c->value = log_sealed_seq(&c->v->log);
    return 0;
}

int glide_volume_seal(glide_volume *volume, uint64_t *seq)
{
    struct volume_call c = {.v = volume};
    int err = worker_call(volume->worker, do_seal, &c);

    *seq = c.value;
    return err;
}

static int do_committed(struct worker *w, void *arg)
{
    struct volume_call *c = arg;
    struct volume *v = c->v;

    (void)w;
    v->committed_seq = max_u64(v->committed_seq, c->value);
    retire_failed(v);
    bool dirty = v->log.count && v->log.segments[v->log.count - 1]->seq > v->committed_seq;
    if (!dirty)
        v->event_dirty = false;
    sync_committed(v);
    return 0;
}

int glide_volume_committed(glide_volume *volume, uint64_t seq)
{
    return worker_call(volume->worker, do_committed, &(struct volume_call){.v = volume, .value = seq});
}

static int do_fail(struct worker *w, void *arg)
{
    struct volume_call *c = arg;

    (void)w;
    c->v->failed = (int)c->value;
    io_fail_parked(c->v, c->v->failed);
    return 0;
}

int glide_volume_fail(glide_volume *volume, int err)
{
    if (err <= 0)
        return fail(-EINVAL, "an errno is positive");
    return worker_call(volume->worker, do_fail, &(struct volume_call){.v = volume, .value = (uint64_t)err});
}

/* ---- synchronous I/O ------------------------------------------------------------------------------------ */

struct sync_io {
    struct call call;
    struct io_req req;
    uint64_t old_size; /* resize: restored when it fails; 0 = not a resize */
};

static void sync_io_done(struct io_req *req, int err)
{
    struct sync_io *io = container_of(req, struct sync_io, req);

    if (err && io->old_size)
        atomic_store(&req->volume->size, io->old_size);
    call_done(&io->call, -err);
}

static void start_sync_io(struct call *call, struct worker *w)
{
    (void)w;
    io_submit(&container_of(call, struct sync_io, call)->req);
}

int glide_volume_io(glide_volume *volume, int op, int flags, uint64_t offset, uint64_t length, void *buf)
{
    struct sync_io io = {.req = {.volume = volume,
                                 .buf = buf,
                                 .offset = offset,
                                 .length = op == GLIDE_FLUSH ? 0 : length,
                                 .op = (uint8_t)op,
                                 .flags = (uint8_t)(flags & (GLIDE_FUA | IO_LOCAL | IO_INTERNAL)),
                                 .done = sync_io_done}};

    if (op < 0 || op >= GLIDE_OPS)
        return -EINVAL;
    return call_run(volume->worker, &io.call, start_sync_io, NULL);
}

int glide_volume_sync(glide_volume *volume)
{
    return glide_volume_io(volume, GLIDE_FLUSH, IO_LOCAL | IO_INTERNAL, 0, 0, NULL);
}

/* Requests that came before are in the log or ahead in the batch; from here on the end is the new one, so
 * none comes after the ZERO. An unaligned write that is reading finds its sector changed, reads again, fails. */
static void start_shrink(struct call *call, struct worker *w)
{
    struct sync_io *io = container_of(call, struct sync_io, call);
    struct volume *v = io->req.volume;
    uint64_t size = io->req.offset, inflight = v->inflight;

    (void)w;
    io_submit(&io->req); /* may be the end of io, if it is refused */
    if (v->inflight > inflight)
        atomic_store(&v->size, size);
}

static int do_grow(struct worker *w, void *arg)
{
    struct volume_call *c = arg;

    (void)w;
    if (c->v->filter)
        c->v->filter->ops->grown(c->v, c->value);
    atomic_store(&c->v->size, c->value);
    return 0;
}

int glide_volume_resize(glide_volume *volume, uint64_t size)
{
    uint64_t old = atomic_load(&volume->size);

    if (!size || size % SECTOR || size > (uint64_t)1 << 60)
        return fail(-EINVAL, "a volume's size is a multiple of %u bytes up to 2^60, not %llu", SECTOR,
                    (unsigned long long)size);
    if (size >= old)
        return worker_call(volume->worker, do_grow, &(struct volume_call){.v = volume, .value = size});
    /* What is cut off is zeroed: a later grow must not bring it back. */
    struct sync_io io = {.req = {.volume = volume,
                                 .offset = size,
                                 .length = old - size,
                                 .op = GLIDE_ZERO,
                                 .flags = IO_INTERNAL | IO_LOCAL | GLIDE_FUA, /* the new size will be durable too */
                                 .done = sync_io_done},
                         .old_size = old};
    return call_run(volume->worker, &io.call, start_shrink, NULL);
}
