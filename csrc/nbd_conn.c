/*
 * State: one struct per connection, owned by the worker of its volume.
 *
 * Receiving goes through the worker's one receive buffer, so an idle connection
 * costs its struct and nothing else. What is complete in the buffer is carried
 * out in place: a batch of small writes goes from there to the log in one
 * vector. Of an incomplete request only the header bytes, or a payload under
 * way (in its own memory, received straight into it), stay with the connection.
 *
 * A multishot poll says when to receive; it fires again only for new data, so
 * receiving goes on until the socket is drained, or stops for back-pressure with
 * `readable` set. A short receive means drained, except that the client may have
 * closed behind it: one event can tell of both. A connection is freed when it was ended, has no request in
 * flight, nothing to send, and no poll armed.
 */
#include "nbd_conn.h"

#include "fault.h"
#include "volume.h"

#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#define RECEIVE_BYTES (1u << 20)
#define SEND_VECTORS 512
#define ROUNDS 4 /* buffers received from one connection before others get their turn */
#define SOCKET_BUFFER (4 << 20)

static void advance(struct nbd_conn *c);

/* ---- end ------------------------------------------------------------------------------------- */

static void conn_free(struct nbd_conn *c)
{
    struct volume *v = c->volume;

    list_remove(&c->link);
    list_remove(&c->send_link);
    list_remove(&c->resume_task.link);
    close(c->fd);
    v->conn_count--;
    event_post(v->engine, v->cookie, GLIDE_EV_CONN_CLOSED, c->id, (uint64_t)c->error);
    for (struct list *e; (e = list_pop(&c->detach_calls));)
        call_done(container_of(e, struct call, link), 0);
    if (c->filling)
        nbd_req_free(c->filling);
    free(c->rest);
    free(c);
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
    advance(c);
}

static void end(struct nbd_conn *c, int error, bool broken)
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

/* We end the connection: what waits for the store or for space fails now; the peer gets the replies it takes. */
static void leave(struct nbd_conn *c)
{
    c->leaving = true;
    if (c->volume->frozen) {
        c->ended = c->broken = true;
        end(c, ESHUTDOWN, false);
    } else {
        end(c, ESHUTDOWN, c->send_polling); /* it does not read: nothing to wait for */
    }
    io_cancel(c->volume, c, ESHUTDOWN);
    if (list_empty(&c->send_link)) /* replies first, then advance() */
        list_append(&c->worker->senders, &c->send_link);
}

static void drop_replies(struct nbd_conn *c)
{
    for (struct list *e; (e = list_pop(&c->replies));) {
        struct nbd_req *r = container_of(container_of(e, struct io_req, link), struct nbd_req, io);
        nbd_req_free(r);
    }
    c->sent = 0;
}

/* What can be done now that something ended. May free the connection. */
static void advance(struct nbd_conn *c)
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

/* ---- receive ------------------------------------------------------------------------------------ */

/* Carry out bytes that are in memory for the moment only; keeps what is not used. False: the connection ends. */
static bool consume(struct nbd_conn *c, const uint8_t *data, uint64_t length)
{
    uint64_t skip = min_u64(c->skip, length);

    c->skip -= skip;
    int64_t used = nbd_parse(c, data + skip, length - skip);
    io_flush(c->volume); /* after this no request refers to `data` */
    if (used < 0) {
        end(c, EPROTO, true);
        return false;
    }
    data += skip + (uint64_t)used;
    length -= skip + (uint64_t)used;
    if (length < NBD_REQUEST_BYTES) {
        c->head_length = (uint32_t)length;
        memcpy(c->head, data, length);
        return !c->ended;
    }
    c->head_length = 0;
    c->rest = malloc(length);
    if (!c->rest) {
        end(c, ENOMEM, true);
        return false;
    }
    memcpy(c->rest, data, length);
    c->rest_length = length;
    return !c->ended;
}

/* Go on with what was received before. */
static void consume_rest(struct nbd_conn *c)
{
    uint8_t *rest = c->rest;

    c->rest = NULL;
    if (consume(c, rest, c->rest_length) && !c->rest) {
        c->skip += c->skip_after_rest;
        c->skip_after_rest = 0;
    }
    free(rest);
}

/* One receive. False: drained, ended, or wait. */
static bool receive(struct nbd_conn *c)
{
    uint8_t *buf = c->worker->scratch;
    struct iovec iov[2];
    struct msghdr message = {.msg_iov = iov};
    uint64_t missing = c->filling ? c->filling->io.length - c->filled : 0, asked = missing;

    if (c->filling)
        iov[message.msg_iovlen++] = (struct iovec){c->filling->buf + c->filled, missing};
    memcpy(buf, c->head, c->head_length); /* a header's beginning stays in front of its rest */
    iov[message.msg_iovlen++] = (struct iovec){buf + c->head_length, RECEIVE_BYTES - c->head_length};
    asked += RECEIVE_BYTES - c->head_length;
    ssize_t n = recvmsg(c->fd, &message, MSG_DONTWAIT);
    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return errno == EINTR;
    if (n <= 0) {
        end(c, n ? errno : 0, n < 0); /* a client may close its half and still read */
        return false;
    }
    uint64_t got = (uint64_t)n, direct = min_u64(got, missing);
    c->filled += direct;
    if (c->filling && c->filled == c->filling->io.length)
        nbd_filled(c);
    bool more = true;
    if (got > direct || c->head_length)
        more = consume(c, buf, c->head_length + got - direct);
    else
        io_flush(c->volume);
    return more && (got == asked || c->hangup);
}

static void resume(struct task *task, struct worker *w);

static void receive_some(struct nbd_conn *c)
{
    c->readable = false;
    for (int i = 0; !c->ended; i++) {
        if (c->rest && !nbd_too_busy(c))
            consume_rest(c);
        if (nbd_too_busy(c) || c->rest || i == ROUNDS) {
            c->readable = true;
            if (!nbd_too_busy(c) && list_empty(&c->resume_task.link))
                worker_defer(c->worker, &c->resume_task);
            break;
        }
        if (!receive(c) && !c->rest)
            break;
    }
}

static void resume(struct task *task, struct worker *w)
{
    struct nbd_conn *c = container_of(task, struct nbd_conn, resume_task);

    (void)w;
    if (c->volume->frozen)
        return; /* nbd_unfreeze receives */
    receive_some(c);
    advance(c);
}

static void arm_poll(struct nbd_conn *c)
{
    struct io_uring_sqe *sqe = worker_sqe(c->worker, &c->poll_op);

    io_uring_prep_poll_multishot(sqe, c->fd, POLLIN | POLLRDHUP);
    io_uring_sqe_set_data(sqe, &c->poll_op);
    c->polling = true;
}

static void on_poll(struct ring_op *op, int res, uint32_t flags)
{
    struct nbd_conn *c = container_of(op, struct nbd_conn, poll_op);

    if (!(flags & IORING_CQE_F_MORE))
        c->polling = false;
    if (res >= 0)
        c->hangup |= (res & (POLLRDHUP | POLLHUP | POLLERR)) != 0;
    if (c->volume->frozen && !c->ended)
        return; /* nbd_unfreeze receives */
    if (res >= 0 || res == -EAGAIN)
        receive_some(c);
    else if (res != -ECANCELED)
        end(c, -res, true);
    if (!c->ended && !c->polling)
        arm_poll(c);
    advance(c);
}

/* ---- send ---------------------------------------------------------------------------------------- */

static struct nbd_req *reply_at(struct list *e)
{
    return container_of(container_of(e, struct io_req, link), struct nbd_req, io);
}

static int build(struct nbd_conn *c, struct iovec *iov)
{
    uint64_t skip = c->sent;
    int n = 0;

    list_each(at, &c->replies) {
        struct nbd_req *r = reply_at(at);
        if (n + 2 > SEND_VECTORS)
            break;
        struct iovec parts[2] = {{r->reply, NBD_REPLY_BYTES}, {r->buf, r->data_length}};
        for (int i = r->raw; i < 2; i++) {
            uint64_t cut = min_u64(skip, parts[i].iov_len);
            skip -= cut;
            if (parts[i].iov_len > cut)
                iov[n++] = (struct iovec){(char *)parts[i].iov_base + cut, parts[i].iov_len - cut};
        }
    }
    return n;
}

static void sent_bytes(struct nbd_conn *c, uint64_t n)
{
    c->sent += n;
    while (!list_empty(&c->replies)) {
        struct nbd_req *r = reply_at(c->replies.next);
        if (c->sent < nbd_reply_bytes(r))
            break;
        c->sent -= nbd_reply_bytes(r);
        list_remove(&r->io.link);
        nbd_req_free(r);
    }
}

static void arm_send_poll(struct nbd_conn *c)
{
    struct io_uring_sqe *sqe = worker_sqe(c->worker, &c->send_op);

    io_uring_prep_poll_add(sqe, c->fd, POLLOUT);
    io_uring_sqe_set_data(sqe, &c->send_op);
    c->send_polling = true;
}

static void send_replies(struct nbd_conn *c)
{
    struct iovec iov[SEND_VECTORS];

    while (!c->broken && !c->send_polling && !list_empty(&c->replies)) {
        struct msghdr message = {.msg_iov = iov, .msg_iovlen = (size_t)build(c, iov)};
        ssize_t n = sendmsg(c->fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (n >= 0)
            sent_bytes(c, (uint64_t)n);
        else if (errno == EAGAIN && !c->leaving)
            arm_send_poll(c);
        else if (errno != EINTR)
            end(c, errno, true);
    }
}

/* Replies went: is there room for more requests? */
static void resume_later(struct nbd_conn *c)
{
    if (c->readable && !c->ended && !nbd_too_busy(c) && list_empty(&c->resume_task.link))
        worker_defer(c->worker, &c->resume_task);
}

static void on_writable(struct ring_op *op, int res, uint32_t flags)
{
    struct nbd_conn *c = container_of(op, struct nbd_conn, send_op);

    (void)res;
    (void)flags;
    c->send_polling = false;
    if (!c->volume->frozen)
        send_replies(c);
    resume_later(c);
    advance(c);
}

void nbd_reply(struct nbd_req *r)
{
    struct nbd_conn *c = r->conn;

    c->inflight--;
    r->answered = true;
    list_append(&c->replies, &r->io.link);
    if (list_empty(&c->send_link))
        list_append(&c->worker->senders, &c->send_link);
}

void nbd_send_all(struct worker *w)
{
    for (struct list *e; (e = list_pop(&w->senders));) {
        struct nbd_conn *c = container_of(e, struct nbd_conn, send_link);
        if (!c->volume->frozen)
            send_replies(c);
        resume_later(c);
        advance(c);
    }
}

void nbd_freeze(struct volume *v)
{
    list_each(at, &v->conns)
        send_replies(container_of(at, struct nbd_conn, link));
}

void nbd_unfreeze(struct volume *v)
{
    for (struct list *at = v->conns.next, *next; at != &v->conns; at = next) {
        struct nbd_conn *c = container_of(at, struct nbd_conn, link);
        next = at->next;
        if (!c->ended && !c->polling)
            arm_poll(c);
        if (!c->ended)
            receive_some(c);
        if (list_empty(&c->send_link)) /* replies, then advance() */
            list_append(&c->worker->senders, &c->send_link);
    }
}

/* ---- attach, detach ---------------------------------------------------------------------------------- */

int nbd_enter(struct worker *w, struct nbd_conn *c)
{
    struct volume *v = c->volume;

    if (v->closing || v->failed)
        return v->closing ? -ESHUTDOWN : -v->failed;
    if (!w->scratch && !(w->scratch = malloc(RECEIVE_BYTES)))
        return -ENOMEM;
    c->worker = w;
    list_append(&v->conns, &c->link);
    v->conn_count++;
    return 0;
}

struct nbd_conn *nbd_conn_new(struct volume *v, int fd, uint64_t id, bool read_only)
{
    struct nbd_conn *c = calloc(1, sizeof(*c));
    int bytes = SOCKET_BUFFER;

    if (!c)
        return NULL;
    c->volume = v;
    c->fd = fd;
    c->id = id;
    c->read_only = read_only;
    c->poll_op.complete = on_poll;
    c->send_op.complete = on_writable;
    c->cancel_op.complete = on_cancelled;
    c->resume_task.run = resume;
    struct list *lists[] = {&c->link, &c->send_link, &c->requests, &c->replies, &c->detach_calls, &c->resume_task.link};
    for (size_t i = 0; i < ARRAY_LEN(lists); i++)
        list_init(lists[i]);
    if (setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &bytes, sizeof(bytes)))
        setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &bytes, sizeof(bytes)); /* what the system allows */
    return c;
}

struct attach {
    struct nbd_conn *conn;
    struct volume *volume;
    const uint8_t *early;
    uint32_t early_length;
    uint64_t id;
};

static int do_attach(struct worker *w, void *arg)
{
    struct attach *a = arg;
    struct nbd_conn *c = a->conn;
    bool frozen = c->volume->frozen; /* then nbd_unfreeze() begins */
    if (frozen && a->early_length) {
        if (!(c->rest = malloc(a->early_length)))
            return -ENOMEM;
        memcpy(c->rest, a->early, a->early_length);
        c->rest_length = a->early_length;
    }
    int err = nbd_enter(w, c);
    if (err || frozen)
        return err;
    arm_poll(c);
    if (a->early_length) {
        memcpy(w->scratch, a->early, a->early_length);
        consume(c, w->scratch, a->early_length);
        advance(c);
    }
    return 0;
}

int glide_nbd_attach(glide_volume *volume, int fd, uint64_t conn_id, int read_only, const void *early,
                     uint32_t early_length, glide_conn **out)
{
    struct nbd_conn *c = early_length > RECEIVE_BYTES ? NULL : nbd_conn_new(volume, fd, conn_id, read_only);
    struct attach a = {c, volume, early, early_length, conn_id};

    *out = NULL;
    if (!c) {
        close(fd);
        return early_length > RECEIVE_BYTES ? -EINVAL : -ENOMEM;
    }
    int err = worker_call(volume->worker, do_attach, &a);
    if (err) {
        close(fd);
        free(c->rest);
        free(c);
        return fail(err, "the export does not take connections: %s", strerror(-err));
    }
    *out = c;
    return 0;
}

void nbd_close_all(struct volume *v)
{
    for (struct list *at = v->conns.next, *next; at != &v->conns; at = next) {
        struct nbd_conn *c = container_of(at, struct nbd_conn, link);
        next = at->next;
        leave(c);
    }
}

static void start_detach(struct call *call, struct worker *w)
{
    struct attach *a = call->arg;

    (void)w;
    list_each(at, &a->volume->conns) {
        struct nbd_conn *c = container_of(at, struct nbd_conn, link);
        if (c->id != a->id)
            continue;
        list_append(&c->detach_calls, &call->link);
        leave(c);
        return;
    }
    call_done(call, 0); /* gone already */
}

int glide_nbd_detach(glide_volume *volume, uint64_t conn_id)
{
    struct attach a = {.volume = volume, .id = conn_id};
    struct call call;

    return call_run(volume->worker, &call, start_detach, &a);
}
