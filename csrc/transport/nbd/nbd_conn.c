/*
 * The life of a connection: attach, freeze, end. One struct per connection, owned by the worker of its volume.
 *
 * It is freed when it was ended, has no request in flight, nothing to send, and no poll armed. A client
 * that takes no reply, or leaves a payload unfinished, for as long as the engine's configuration says is cut off: what
 * it holds is others' memory.
 */
#include "transport/nbd/nbd_conn.h"

#include "volume/fault.h"
#include "volume/volume.h"

#include <linux/sockios.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

static void on_cancelled(struct ring_op *op, int res, uint32_t flags);

/* ---- memory ------------------------------------------------------------------------------------ */

struct nbd_conn *nbd_conn_new(struct volume *v, int fd, uint64_t id, const struct glide_nbd_handshake *handshake)
{
    struct nbd_conn *c = calloc(1, sizeof(*c));

    if (!c) {
        close(fd);
        return NULL;
    }
    c->volume = v;
    c->fd = fd;
    c->id = id;
    c->modes = handshake->modes;
    c->snapshots = (uint32_t)min_u64(handshake->snapshots, GLIDE_NBD_SNAPSHOTS);
    for (uint32_t i = 0; i < c->snapshots; i++)
        c->changed[i].snapshot = handshake->changed[i];
    c->cancel_op.complete = on_cancelled;
    struct list *lists[] = {&c->requests, &c->replies, &c->send_task.link, &c->detach_calls, &c->resume_task.link};
    for (size_t i = 0; i < ARRAY_LEN(lists); i++)
        list_init(lists[i]);
    nbd_socket_init(c);
    return c;
}

void nbd_conn_discard(struct nbd_conn *c)
{
    if (c->socket_bytes)
        nbd_memory_socket_closed(c->volume->engine->nbd, c->socket_bytes);
    if (c->rest)
        nbd_memory_give(c, NBD_PIPELINE, c->rest_length);
    free(c->rest);
    close(c->fd);
    free(c);
}

/* ---- end ------------------------------------------------------------------------------------- */

static void conn_free(struct nbd_conn *c)
{
    struct volume *v = c->volume;
    uint64_t id = c->id, error = (uint64_t)c->error;
    struct list calls;

    list_init(&calls);
    list_splice(&calls, &c->detach_calls);
    transport_leave(v, &c->transport);
    list_remove(&c->send_task.link);
    list_remove(&c->resume_task.link);
    if (c->filling)
        nbd_req_free(c->filling);
    for (uint32_t i = 0; i < c->snapshots; i++)
        changed_end(v, &c->changed[i]);
    nbd_conn_discard(c);
    event_post(v->engine, v->cookie, GLIDE_EV_CONN_CLOSED, id, error);
    for (struct list *e; (e = list_pop(&calls));)
        call_done(container_of(e, struct call, link), 0);
    volume_idle_check(v);
}

static void cancel_poll(struct nbd_conn *c, struct ring_op *op)
{
    struct io_uring_sqe *sqe = worker_sqe(c->worker, &c->cancel_op);

    io_uring_prep_cancel(sqe, op, 0);
    io_uring_sqe_set_data(sqe, &c->cancel_op);
    c->cancels++;
}

static void on_cancelled(struct ring_op *op, int res, uint32_t flags)
{
    struct nbd_conn *c = container_of(op, struct nbd_conn, cancel_op);

    (void)res;
    (void)flags;
    c->cancels--;
    nbd_advance(c);
}

void nbd_end(struct nbd_conn *c, int error, bool broken)
{
    if (!c->ended)
        c->error = error;
    c->ended = true;
    c->broken |= broken;
    if (c->filling) { /* its payload will never be complete */
        c->inflight--;
        nbd_req_free(c->filling);
        c->filling = NULL;
    }
    if (broken)
        shutdown(c->fd, SHUT_RDWR);
}

void nbd_give_up(struct nbd_conn *c, int error)
{
    nbd_end(c, error, true);
    io_cancel(c->volume, c, ESHUTDOWN);
    worker_want_tick(c->worker);
}

/* We end the connection: what waits for the store or for space fails now; the peer gets the replies it takes. That of a
 * frozen volume is another process's by now: its socket is closed here, not shut down. */
static void leave(struct nbd_conn *c)
{
    c->leaving = true;
    if (c->volume->frozen) {
        c->ended = c->broken = true;
        nbd_end(c, ESHUTDOWN, false);
    } else {
        /* Nothing to wait for where it does not read. The kernel asks again for what has no answer: an error would be
         * one, and its guests'. */
        nbd_end(c, ESHUTDOWN, c->send_polling || c->modes & GLIDE_NBD_KERNEL);
    }
    io_cancel(c->volume, c, ESHUTDOWN);
    worker_at_end(c->worker, ROUND_REPLY, &c->send_task); /* replies first, then nbd_advance() */
}

static void drop_replies(struct nbd_conn *c)
{
    for (struct list *e; (e = list_pop(&c->replies));) {
        struct nbd_req *r = container_of(container_of(e, struct io_req, link), struct nbd_req, io);
        nbd_req_free(r);
    }
    c->sent = 0;
}

void nbd_advance(struct nbd_conn *c)
{
    if (c->broken)
        drop_replies(c);
    if (!c->ended || c->inflight || !list_empty(&c->replies))
        return;
    if (!c->cancels && c->polling)
        cancel_poll(c, &c->poll_op);
    if (!c->cancels && c->send_polling)
        cancel_poll(c, &c->send_op);
    if (!c->cancels && !c->polling && !c->send_polling)
        conn_free(c); /* else the completions come back here */
}

/* Send what can be sent; from then on nothing is received or sent. */
static void freeze(struct transport *t) { nbd_send_replies(nbd_conn_of(t)); }

static void unfreeze(struct transport *t)
{
    struct nbd_conn *c = nbd_conn_of(t);

    if (!c->ended && !c->polling)
        nbd_arm_poll(c);
    if (!c->ended)
        nbd_receive_some(c);
    c->send_ticks = c->fill_ticks = 0; /* nothing was sent or received meanwhile */
    worker_at_end(c->worker, ROUND_REPLY, &c->send_task);
    worker_want_tick(c->worker);
}

/* ---- time ---------------------------------------------------------------------------------------------- */

/* The socket becomes writable only when most of its buffer is empty: a slow reader shows in what is left there. */
static void look_at_queue(struct nbd_conn *c)
{
    int queued = 0;

    if (ioctl(c->fd, SIOCOUTQ, &queued))
        return;
    if (queued < c->queued)
        c->send_ticks = 0;
    c->queued = queued;
}

/* One more tick without what is due. Counted, not measured: time in which this process did not run is not the peer's.
 */
static bool is_stalled(struct nbd_conn *c)
{
    uint32_t limit = c->volume->engine->config.nbd_stall_ms / WORKER_TICK_MS;

    if (!limit || c->ended)
        return false;
    if (c->send_polling)
        look_at_queue(c);
    bool sending = c->send_polling && ++c->send_ticks > limit;
    bool filling = c->filling && !nbd_too_busy(c) && ++c->fill_ticks > limit;
    return sending || filling;
}

/* Cut connections that have stalled for too long, go on with those that got memory. */
static bool tick(struct transport *t)
{
    struct nbd_conn *c = nbd_conn_of(t);

    if (c->ended && c->modes & GLIDE_NBD_KERNEL) { /* what came back from a read meanwhile may wait again */
        io_cancel(c->volume, c, ESHUTDOWN);
        nbd_advance(c);
        return true;
    }
    if (is_stalled(c)) {
        nbd_give_up(c, ETIME);
        nbd_advance(c);
        return false;
    }
    nbd_resume_later(c);
    return c->send_polling || c->filling || c->wanted;
}

/* ---- attach, detach ---------------------------------------------------------------------------------- */

int nbd_enter(struct worker *w, struct nbd_conn *c)
{
    struct volume *v = c->volume;

    if (v->closing || v->failed)
        return v->closing ? -ESHUTDOWN : -v->failed;
    if (!w->scratch && !(w->scratch = malloc(NBD_RECEIVE_BYTES)))
        return -ENOMEM;
    c->worker = w;
    transport_enter(v, &c->transport, &NBD_OPS);
    return 0;
}

static int do_attach(struct worker *w, void *arg)
{
    struct nbd_conn *c = arg;
    int err = nbd_enter(w, c);

    if (!err && !c->volume->frozen) /* else unfreeze() begins */
        nbd_arm_poll(c);
    return err;
}

int glide_nbd_attach(glide_volume *volume, int fd, uint64_t conn_id, const struct glide_nbd_handshake *handshake)
{
    struct nbd_conn *c = nbd_conn_new(volume, fd, conn_id, handshake);
    int err = c ? worker_call(volume->worker, do_attach, c) : -ENOMEM;

    if (!err)
        return 0;
    if (c)
        nbd_conn_discard(c);
    return fail(err, "the export does not take connections: %s", strerror(-err));
}

static void end(struct transport *t) { leave(nbd_conn_of(t)); }

/* It counts until it has left. */
static bool is_idle(const struct transport *t)
{
    (void)t;
    return false;
}

const struct transport_ops NBD_OPS = {
    .tick = tick, .freeze = freeze, .unfreeze = unfreeze, .close = end, .idle = is_idle};

struct detach {
    struct volume *volume;
    uint64_t id;
};

static void start_detach(struct call *call, struct worker *w)
{
    struct detach *a = call->arg;

    (void)w;
    transports_each(t, a->volume) {
        struct nbd_conn *c = nbd_conn_of(t);
        if (!c || c->id != a->id)
            continue;
        list_append(&c->detach_calls, &call->link);
        leave(c);
        return;
    }
    call_done(call, 0); /* gone already */
}

int glide_nbd_detach(glide_volume *volume, uint64_t conn_id)
{
    struct detach a = {volume, conn_id};
    struct call call;

    return call_run(volume->worker, &call, start_detach, &a);
}
