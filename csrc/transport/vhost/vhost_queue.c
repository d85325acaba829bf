/*
 * Queues of a device: their begin and end, and how the driver and they wake each other.
 *
 * The driver's kicks come through an eventfd that a multishot poll watches. Nobody reads it: each kick is an edge, and
 * whoever polls it anew, as another process after a handoff, finds it readable and looks at the ring. Calls to the
 * driver are written through the ring at the end of a round. A front-end could make such a write wait (its eventfd may
 * be one that blocks): then it is the kernel's thread that waits, never the worker.
 */
#include "transport/vhost/vhost.h"

#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <unistd.h>

#define BATCH 128u /* requests begun of one queue before others get their turn */

/* ---- calls to the driver --------------------------------------------------------------------------- */

static const uint64_t one = 1;

static void call_driver(struct vhost_ring *r)
{
    if (r->calling) {
        r->call_again = true;
        return;
    }
    if (r->call < 0 || r->device->ended)
        return;
    struct io_uring_sqe *sqe = worker_sqe(r->device->worker, &r->call_op);
    io_uring_prep_write(sqe, r->call, &one, sizeof(one), 0);
    io_uring_sqe_set_data(sqe, &r->call_op);
    r->calling = true;
}

static void close_fd(int *fd)
{
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

static void use_call(struct vhost_ring *r, int fd)
{
    if (r->calling) { /* the descriptor that it names must stay */
        close_fd(&r->call_next);
        r->call_next = fd < 0 ? -2 : fd;
        return;
    }
    close_fd(&r->call);
    r->call = fd;
}

static void on_called(struct ring_op *op, int res, uint32_t flags)
{
    struct vhost_ring *r = container_of(op, struct vhost_ring, call_op);
    int next = r->call_next;

    (void)res; /* a full eventfd has been told, and whoever gave us a bad one goes without */
    (void)flags;
    r->calling = false;
    r->call_next = -1;
    if (next != -1)
        use_call(r, next < 0 ? -1 : next);
    if (r->call_again) {
        r->call_again = false;
        call_driver(r);
    }
    vhost_end_later(r->device);
}

void vhost_tell(struct vhost_device *d)
{
    for (uint32_t i = 0; i < GLIDE_VHOST_QUEUES; i++) {
        struct vhost_ring *r = &d->rings[i];
        if (!r->started || !r->news)
            continue;
        r->news = false;
        if (vhost_ring_wants_call(r))
            call_driver(r);
    }
}

/* ---- serving -------------------------------------------------------------------------------------------- */

static bool runs(const struct vhost_ring *r)
{
    const struct vhost_device *d = r->device;

    return r->started && (r->enabled || r->draining) && !d->ended && !atomic_load(&d->broken) && !d->volume->frozen;
}

static void serve_ring(struct vhost_ring *r)
{
    uint32_t begun = 0;
    uint16_t head;

    while (runs(r)) {
        vhost_ring_quiet(r);
        while (begun < BATCH && runs(r) && vhost_ring_peek(r, &head)) {
            if (vhost_begin(r, head))
                return; /* it has ended, or goes on when it has memory */
            begun++;
        }
        if (!runs(r) || r->draining)
            return;
        if (begun == BATCH) {
            vhost_serve_later(r->device);
            return;
        }
        if (!vhost_ring_listen(r))
            return;
    }
}

void vhost_serve(struct vhost_device *d)
{
    d->starved = false;
    for (uint32_t i = 0; i < GLIDE_VHOST_QUEUES && !d->starved; i++)
        serve_ring(&d->rings[i]);
    vhost_end_later(d);
}

static void arm(struct vhost_ring *r)
{
    struct io_uring_sqe *sqe = worker_sqe(r->device->worker, &r->kick_op);

    io_uring_prep_poll_multishot(sqe, r->kick, POLLIN);
    io_uring_sqe_set_data(sqe, &r->kick_op);
    r->polling = true;
}

static void on_kick(struct ring_op *op, int res, uint32_t flags)
{
    struct vhost_ring *r = container_of(op, struct vhost_ring, kick_op);
    struct vhost_device *d = r->device;

    if (!(flags & IORING_CQE_F_MORE))
        r->polling = false;
    if (res < 0 && res != -ECANCELED && res != -EAGAIN)
        vhost_broken(d, "queue %u: its kicks cannot be waited for: error %d", r->index, -res);
    serve_ring(r);
    if (!r->polling && r->started && !r->draining && !d->ended && !atomic_load(&d->broken))
        arm(r);
    vhost_end_later(d);
}

static void cancel(struct vhost_ring *r, struct ring_op *op)
{
    struct io_uring_sqe *sqe = worker_sqe(r->device->worker, &r->cancel_op);

    io_uring_prep_cancel(sqe, op, 0);
    io_uring_sqe_set_data(sqe, &r->cancel_op);
    r->cancels++;
}

static void on_cancelled(struct ring_op *op, int res, uint32_t flags)
{
    struct vhost_ring *r = container_of(op, struct vhost_ring, cancel_op);

    (void)res;
    (void)flags;
    r->cancels--;
    vhost_end_later(r->device);
}

/* Ask again until it is so: what is not yet begun in the kernel cannot be cancelled. */
static bool disarmed(struct vhost_ring *r)
{
    if (r->cancels)
        return false;
    if (r->polling)
        cancel(r, &r->kick_op);
    if (r->calling)
        cancel(r, &r->call_op);
    return !r->cancels;
}

/* ---- begin ------------------------------------------------------------------------------------------------ */

struct ring_call {
    struct vhost_device *d;
    struct vhost_ring *r;
    struct glide_vhost_ring at;
    struct vhost_req **busy;
    uint16_t *again;
    int kick, call;
    int value;
};

static struct vhost_record *record_of(const struct vhost_device *d, uint32_t index)
{
    uint64_t each = glide_vhost_inflight_bytes(d->record_depth);

    return (struct vhost_record *)(void *)(d->record.base + d->record_offset + index * each);
}

static int do_start(struct worker *w, void *arg)
{
    struct ring_call *c = arg;
    struct vhost_ring *r = c->r;
    struct vhost_device *d = c->d;

    (void)w;
    if (r->started)
        return fail(-EBUSY, "queue %u runs already", r->index);
    if (r->index >= d->record_queues || c->at.num > d->record_depth)
        return fail(-EINVAL, "queue %u of %u entries has no place in the record of requests in flight", r->index,
                    c->at.num);
    r->at = c->at;
    r->num = c->at.num;
    r->record = record_of(d, r->index);
    r->again = c->again;
    int err = vhost_ring_map(r);
    if (!err)
        err = vhost_ring_recover(r);
    if (err) {
        r->again = NULL; /* the caller's still */
        r->again_count = 0;
        return err;
    }
    r->busy = c->busy;
    r->kick = c->kick;
    r->call = c->call;
    r->enabled = c->at.enabled != 0;
    r->started = true;
    r->draining = r->ever_signalled = r->news = r->call_again = false;
    arm(r);
    call_driver(r); /* who served before may have died with an answer that the driver was not told of */
    vhost_serve_later(d);
    return 0;
}

static int duplicate(int fd) { return fd < 0 ? -1 : fcntl(fd, F_DUPFD_CLOEXEC, 0); }

int glide_vhost_ring_start(glide_vhost *d, uint32_t index, const struct glide_vhost_ring *at)
{
    if (index >= GLIDE_VHOST_QUEUES || !at->num || at->num > GLIDE_VHOST_DEPTH || at->num & (at->num - 1) ||
        at->base > UINT16_MAX || at->kick < 0)
        return fail(-EINVAL, "queue %u cannot have %u entries from %u on", index, at->num, at->base);
    struct ring_call c = {.d = d, .r = &d->rings[index], .at = *at};
    c.busy = calloc(at->num, sizeof(*c.busy));
    c.again = calloc(at->num, sizeof(*c.again));
    c.kick = duplicate(at->kick);
    c.call = duplicate(at->call);
    int err = !c.busy || !c.again ? -ENOMEM : c.kick < 0 || (at->call >= 0 && c.call < 0) ? -EMFILE : 0;
    if (!err)
        err = vhost_call(d, do_start, &c);
    if (!err)
        return 0;
    close_fd(&c.kick);
    close_fd(&c.call);
    free(c.busy);
    free(c.again);
    return err;
}

void vhost_queues_init(struct vhost_device *d)
{
    for (uint32_t i = 0; i < GLIDE_VHOST_QUEUES; i++) {
        struct vhost_ring *r = &d->rings[i];
        r->device = d;
        r->index = i;
        r->kick = r->call = r->call_next = -1;
        r->kick_op.complete = on_kick;
        r->call_op.complete = on_called;
        r->cancel_op.complete = on_cancelled;
    }
}

/* ---- changes while it runs ----------------------------------------------------------------------------------- */

void vhost_queues_map(struct vhost_device *d)
{
    for (uint32_t i = 0; i < GLIDE_VHOST_QUEUES; i++)
        if (d->rings[i].started && vhost_ring_map(&d->rings[i]))
            vhost_broken(d, "%s", glide_error());
}

static int do_call_fd(struct worker *w, void *arg)
{
    struct ring_call *c = arg;

    (void)w;
    if (!c->r->started)
        return fail(-EINVAL, "queue %u does not run", c->r->index);
    use_call(c->r, c->call);
    call_driver(c->r);
    return 0;
}

int glide_vhost_ring_call(glide_vhost *d, uint32_t index, int fd)
{
    if (index >= GLIDE_VHOST_QUEUES)
        return -EINVAL;
    struct ring_call c = {.d = d, .r = &d->rings[index], .call = duplicate(fd)};
    int err = fd >= 0 && c.call < 0 ? -EMFILE : vhost_call(d, do_call_fd, &c);
    if (err)
        close_fd(&c.call);
    return err;
}

static int do_enable(struct worker *w, void *arg)
{
    struct ring_call *c = arg;

    (void)w;
    c->r->enabled = c->value != 0;
    vhost_serve_later(c->d);
    return 0;
}

int glide_vhost_ring_enable(glide_vhost *d, uint32_t index, int enabled)
{
    if (index >= GLIDE_VHOST_QUEUES)
        return -EINVAL;
    return vhost_call(d, do_enable, &(struct ring_call){.d = d, .r = &d->rings[index], .value = enabled});
}

/* ---- the end ----------------------------------------------------------------------------------------------------- */

static bool answered(const struct vhost_ring *r) { return !r->count && r->again_at == r->again_count; }

static void forget(struct vhost_ring *r)
{
    close_fd(&r->kick);
    close_fd(&r->call);
    close_fd(&r->call_next);
    r->call_next = -1;
    free(r->busy);
    free(r->again);
    r->busy = NULL;
    r->again = NULL;
    r->again_count = r->again_at = 0;
    r->started = r->draining = false;
}

void vhost_queues_check(struct vhost_device *d)
{
    for (uint32_t i = 0; i < GLIDE_VHOST_QUEUES; i++) {
        struct vhost_ring *r = &d->rings[i];
        struct call *call = r->stopping;
        bool over = d->ended || atomic_load(&d->broken);
        if (!call || (!over && (!answered(r) || !disarmed(r))))
            continue;
        r->stopping = NULL;
        int next = r->next_available;
        if (!over)
            forget(r);
        call_done(call, over ? -ESHUTDOWN : next);
    }
}

struct stop_call {
    struct call call;
    struct vhost_ring *r;
    bool wait;
};

static void start_stop(struct call *call, struct worker *w)
{
    struct stop_call *c = container_of(call, struct stop_call, call);
    struct vhost_ring *r = c->r;
    struct vhost_device *d = r->device;

    (void)w;
    if (atomic_load(&d->left) || d->ended || atomic_load(&d->broken) || !r->started || r->stopping) {
        call_done(call, !r->started || r->stopping ? -EINVAL : -ESHUTDOWN);
        return;
    }
    r->draining = true;
    vhost_serve_later(d);
    if (!c->wait && !answered(r)) {
        call_done(call, -EAGAIN);
        return;
    }
    r->stopping = call;
    vhost_end_later(d);
}

int glide_vhost_ring_stop(glide_vhost *d, uint32_t index, int wait)
{
    if (index >= GLIDE_VHOST_QUEUES)
        return -EINVAL;
    struct stop_call c = {.r = &d->rings[index], .wait = wait != 0};
    return call_run(d->worker, &c.call, start_stop, NULL);
}

void vhost_queues_end(struct vhost_device *d)
{
    for (uint32_t i = 0; i < GLIDE_VHOST_QUEUES; i++)
        disarmed(&d->rings[i]);
}

bool vhost_queues_idle(const struct vhost_device *d)
{
    for (uint32_t i = 0; i < GLIDE_VHOST_QUEUES; i++)
        if (d->rings[i].polling || d->rings[i].calling || d->rings[i].cancels)
            return false;
    return true;
}

void vhost_queues_free(struct vhost_device *d)
{
    for (uint32_t i = 0; i < GLIDE_VHOST_QUEUES; i++)
        forget(&d->rings[i]);
}
