/*
 * The socket of a connection: receiving, sending, and when to stop doing either.
 *
 * Receiving goes through the worker's one receive buffer, so an idle connection costs its struct and nothing else.
 * What is complete in the buffer is carried out in place: a batch of small writes goes from there to the log in one
 * vector. Only the header bytes of an incomplete request, or a payload under way (in its own memory, received
 * straight into it), stay with the connection.
 *
 * A multishot poll says when to receive; it fires again only for new data, so receiving goes on until the socket is
 * drained, or stops for back-pressure with `readable` set. A short receive means drained, except that the client may
 * have closed behind it: one event can stand for both.
 *
 * A client that asks for more than its share of the memory for replies, or sends
 * more than its share of payloads, is not read from: its next request waits in
 * `rest` (nbd_memory.h). It goes on as its own replies go, or with a tick.
 */
#include "transport/nbd/nbd_conn.h"

#include "volume/volume.h"

#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>

#define SEND_VECTORS 512
#define ROUNDS 4 /* buffers received from one connection before others get their turn */
#define SOCKET_BUFFER (4 << 20)

/* ---- receive ------------------------------------------------------------------------------------ */

void nbd_keep_rest(struct nbd_conn *c, uint8_t *rest, uint64_t length)
{
    c->rest = rest;
    c->rest_length = length;
    nbd_memory_add(c, NBD_PIPELINE, length);
}

/* Carry out bytes that are in memory for the moment only; keeps what is not used. False: the connection ends. */
static bool consume(struct nbd_conn *c, const uint8_t *data, uint64_t length)
{
    uint64_t skip = min_u64(c->skip, length);

    c->skip -= skip;
    c->wanted = 0;
    int64_t used = nbd_parse(c, data + skip, length - skip);
    io_flush(c->volume); /* after this no request refers to `data` */
    if (used < 0) {
        nbd_end(c, EPROTO, true);
        return false;
    }
    data += skip + (uint64_t)used;
    length -= skip + (uint64_t)used;
    if (length < nbd_request_bytes(c)) {
        c->head_length = (uint32_t)length;
        memcpy(c->head, data, length);
        return !c->ended;
    }
    c->head_length = 0;
    uint8_t *rest = malloc(length);
    if (!rest) {
        nbd_end(c, ENOMEM, true);
        return false;
    }
    memcpy(rest, data, length);
    nbd_keep_rest(c, rest, length);
    return !c->ended;
}

/* Go on with what was received before. */
static void consume_rest(struct nbd_conn *c)
{
    uint8_t *rest = c->rest;

    c->rest = NULL;
    nbd_memory_give(c, NBD_PIPELINE, c->rest_length);
    if (consume(c, rest, c->rest_length) && !c->rest) {
        c->skip += c->skip_after_rest;
        c->skip_after_rest = 0;
    }
    free(rest);
}

/* The stream is over. The kernel will ask for the same over another one. */
static void lost(struct nbd_conn *c, int error, bool broken)
{
    if (c->modes & GLIDE_NBD_KERNEL)
        nbd_give_up(c, error);
    else
        nbd_end(c, error, broken);
}

/* One receive. False: drained, ended, or wait. */
static bool receive(struct nbd_conn *c)
{
    uint8_t *buf = c->worker->scratch;
    struct iovec iov[2];
    struct msghdr message = {.msg_iov = iov};
    uint64_t missing = c->filling ? c->filling->io.length - c->filled : 0, asked = missing;
    uint64_t window = nbd_memory_window(c, NBD_RECEIVE_BYTES) - c->head_length;

    if (c->filling)
        iov[message.msg_iovlen++] = (struct iovec){c->filling->buf + c->filled, missing};
    memcpy(buf, c->head, c->head_length); /* a header's beginning stays in front of its rest */
    iov[message.msg_iovlen++] = (struct iovec){buf + c->head_length, window};
    asked += window;
    ssize_t n = recvmsg(c->fd, &message, MSG_DONTWAIT);
    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return errno == EINTR;
    if (n <= 0) {
        lost(c, n ? errno : 0, n < 0); /* a client may close its half and still read */
        return false;
    }
    uint64_t got = (uint64_t)n, direct = min_u64(got, missing);
    c->filled += direct;
    c->fill_ticks = 0;
    if (c->filling && c->filled == c->filling->io.length)
        nbd_filled(c);
    bool more = true;
    if (got > direct || c->head_length)
        more = consume(c, buf, c->head_length + got - direct);
    else
        io_flush(c->volume);
    return more && (got == asked || c->hangup);
}

void nbd_resume_later(struct nbd_conn *c)
{
    if (c->readable && !c->ended && !nbd_too_busy(c) && list_empty(&c->resume_task.link))
        worker_defer(c->worker, &c->resume_task);
}

void nbd_receive_some(struct nbd_conn *c)
{
    c->readable = false;
    for (int i = 0; !c->ended; i++) {
        if (c->rest && !nbd_too_busy(c))
            consume_rest(c);
        if (nbd_too_busy(c) || c->rest || i == ROUNDS) {
            c->readable = true;
            nbd_resume_later(c);
            if (c->wanted)
                worker_want_tick(c->worker); /* memory that others give back */
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
    nbd_receive_some(c);
    nbd_advance(c);
}

void nbd_arm_poll(struct nbd_conn *c)
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
    if (c->hangup && c->modes & GLIDE_NBD_KERNEL)
        nbd_give_up(c, 0); /* at once, however much is in front of the end of the stream */
    else if (res >= 0 || res == -EAGAIN)
        nbd_receive_some(c);
    else if (res != -ECANCELED)
        lost(c, -res, true);
    if (!c->ended && !c->polling)
        nbd_arm_poll(c);
    nbd_advance(c);
}

/* ---- send ---------------------------------------------------------------------------------------- */

static struct nbd_req *reply_at(struct list *e)
{
    return container_of(container_of(e, struct io_req, link), struct nbd_req, io);
}

/* What is left of `data` when *skip bytes in front of it and of what follows were sent. Returns the vectors it takes.
 */
static int add_vector(struct iovec *iov, const uint8_t *data, uint64_t length, uint64_t *skip)
{
    uint64_t cut = min_u64(*skip, length);

    *skip -= cut;
    if (cut == length)
        return 0;
    *iov = (struct iovec){(void *)(uintptr_t)(data + cut), length - cut};
    return 1;
}

static int build(struct nbd_conn *c, struct iovec *iov)
{
    uint64_t skip = c->sent;
    int n = 0;

    list_each(at, &c->replies) {
        struct nbd_req *r = reply_at(at);
        for (uint32_t i = 0; i < r->part_count && n + 2 <= SEND_VECTORS; i++) {
            const struct nbd_part *p = nbd_part(r, i);
            n += add_vector(&iov[n], p->head, p->head_length, &skip);
            n += add_vector(&iov[n], p->data, p->length, &skip);
        }
        if (n + 2 > SEND_VECTORS)
            break;
    }
    return n;
}

static void sent_bytes(struct nbd_conn *c, uint64_t n)
{
    c->sent += n;
    c->send_ticks = 0;
    while (!list_empty(&c->replies)) {
        struct nbd_req *r = reply_at(c->replies.next);
        if (c->sent < r->reply_bytes)
            break;
        c->sent -= r->reply_bytes;
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
    worker_want_tick(c->worker); /* see tick in nbd_conn.c */
}

void nbd_send_replies(struct nbd_conn *c)
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
            lost(c, errno, true);
    }
}

static void on_writable(struct ring_op *op, int res, uint32_t flags)
{
    struct nbd_conn *c = container_of(op, struct nbd_conn, send_op);

    (void)res;
    (void)flags;
    c->send_polling = false;
    if (!c->volume->frozen)
        nbd_send_replies(c);
    nbd_resume_later(c);
    nbd_advance(c);
}

void nbd_reply(struct nbd_req *r)
{
    struct nbd_conn *c = r->conn;

    c->inflight--;
    r->answered = true;
    list_append(&c->replies, &r->io.link);
    worker_at_end(c->worker, ROUND_REPLY, &c->send_task);
}

static void send_at_end(struct task *task, struct worker *w)
{
    struct nbd_conn *c = container_of(task, struct nbd_conn, send_task);

    (void)w;
    if (!c->volume->frozen)
        nbd_send_replies(c);
    nbd_resume_later(c);
    nbd_advance(c);
}

void nbd_socket_init(struct nbd_conn *c)
{
    struct nbd_memory *m = c->volume->engine->nbd;
    int bytes = SOCKET_BUFFER;

    c->poll_op.complete = on_poll;
    c->send_op.complete = on_writable;
    c->resume_task.run = resume;
    c->send_task.run = send_at_end;
    if (!nbd_memory_socket(m, 2 * SOCKET_BUFFER)) /* the kernel counts twice what it is asked for */
        return;
    c->socket_bytes = 2 * SOCKET_BUFFER;
    if (setsockopt(c->fd, SOL_SOCKET, SO_SNDBUFFORCE, &bytes, sizeof(bytes)))
        setsockopt(c->fd, SOL_SOCKET, SO_SNDBUF, &bytes, sizeof(bytes)); /* what the system allows */
}
