/*
 * The one exchange that a range needs: GET, 206 with exactly the range that was asked for, Content-Length, keep-alive.
 * Whatever else comes fails the get, and the connection goes: store/s3 asks again, and knows what it means. So nothing
 * here interprets an error, a redirect or a page of a proxy.
 *
 * A connection belongs to one thread. It is `active` while its operation is in the ring, and `idle` while it is kept,
 * with no operation at all: that the server closed it meanwhile shows at its next use, and then the request is sent
 * once more over a new one. An answer is received in two operations: what there is first, head and perhaps more, and
 * the rest at once (MSG_WAITALL), straight to where it stays. Over TLS it is as many as its records come in: the ring
 * says when there is something to read, and OpenSSL reads it.
 */
#include "carry/carrier.h"
#include "carry/tls.h"

#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <unistd.h>

#define MAX_HEAD 8192u
#define MOST_CONNECTIONS 256u     /* of a thread; more gets wait for one */
#define IDLE_NS 15000000000u      /* a server keeps a connection for longer than that, mostly */
#define PACE_NS_PER_KIB 10000000u /* what may take longer than the timeout: 100 KiB in a second */

struct conn {
    struct ring_op op;
    struct list link; /* of active or idle */
    struct carrier_thread *thread;
    struct get *get; /* or NULL while idle */
    int fd;
    struct tls *tls; /* NULL: plain */
    bool used, connecting, shaking, cancelled;
    uint32_t have, need; /* bytes of head and body; need is 0 until the head is here */
    uint64_t until_ns;   /* active: when to give up; idle: when to close */
    struct sockaddr_storage address;
    uint32_t address_length;
    char *server, *ca; /* of TLS, as in struct glide_source; NULL without */
};

static void on_event(struct ring_op *op, int res, uint32_t flags);

/* The memory of one that has no socket. */
static void conn_drop(struct conn *c)
{
    free(c->server);
    free(c->ca);
    free(c);
}

static void conn_free(struct conn *c)
{
    c->thread->connections--;
    list_remove(&c->link);
    tls_free(c->tls);
    close(c->fd);
    conn_drop(c);
}

static void start_queued(struct carrier_thread *t);

static void conn_fail(struct conn *c, int err)
{
    struct carrier_thread *t = c->thread;
    struct get *get = c->get;

    conn_free(c);
    get_done(get, err);
    start_queued(t);
}

/* ---- the head of an answer ------------------------------------------------------------------------- */

/* The value of a header, without its white space; NULL: it is not there. */
static const char *header(const char *head, const char *end, const char *name, size_t *length)
{
    size_t n = strlen(name);

    for (const char *at = head; (at = memchr(at, '\n', (size_t)(end - at)));) {
        at++;
        if ((size_t)(end - at) <= n || strncasecmp(at, name, n) || at[n] != ':')
            continue;
        const char *stop = memchr(at, '\r', (size_t)(end - at));
        for (at += n + 1; at < stop && (*at == ' ' || *at == '\t'); at++)
            ;
        while (stop > at && (stop[-1] == ' ' || stop[-1] == '\t'))
            stop--;
        *length = (size_t)(stop - at);
        return at;
    }
    return NULL;
}

static bool is_value(const char *head, const char *end, const char *name, const char *wanted)
{
    size_t length;
    const char *value = header(head, end, name, &length);

    return value && length == strlen(wanted) && !strncasecmp(value, wanted, length);
}

/* Whether a head, up to its empty line, is that of the answer to `get`, and the connection may be used again. */
static bool is_good(const struct get *get, const char *head, const char *end, bool *keep)
{
    char length[24], range[64];
    size_t n;

    if (end - head < 16 || strncmp(head, "HTTP/1.", 7) || strncmp(head + 8, " 206", 4))
        return false;
    int wanted = snprintf(range, sizeof(range), "bytes %llu-%llu/", (unsigned long long)get->offset,
                          (unsigned long long)(get->offset + get->length - 1));
    const char *value = header(head, end, "content-range", &n);
    if (!value || n <= (size_t)wanted || strncasecmp(value, range, (size_t)wanted))
        return false;
    snprintf(length, sizeof(length), "%u", get->length);
    *keep = head[7] == '1' && !is_value(head, end, "connection", "close");
    return is_value(head, end, "content-length", length) && !header(head, end, "transfer-encoding", &n) &&
           !header(head, end, "content-encoding", &n);
}

/* ---- an exchange ------------------------------------------------------------------------------------ */

static void wait_until(struct conn *c, uint64_t ms, uint32_t bytes)
{
    c->until_ns = now_ns() + ms * 1000000u + (uint64_t)(bytes >> 10) * PACE_NS_PER_KIB;
    worker_want_tick(&c->thread->worker);
}

/* The head as a whole has one time limit, and the rest another. */
static void wait_more(struct conn *c)
{
    if (!c->have || c->need)
        wait_until(c, c->get->timeout_ms, c->need ? c->need - c->have : 0);
}

static void received(struct conn *c);
static void ended(struct conn *c, int err);

static void wait_ready(struct conn *c, int want)
{
    struct io_uring_sqe *sqe = worker_sqe(&c->thread->worker, &c->op);

    io_uring_prep_poll_add(sqe, c->fd, want == TLS_WRITE ? POLLOUT : POLLIN);
    io_uring_sqe_set_data(sqe, &c->op);
}

/* Read what there is; where more is missing, wait for it. */
static void receive_tls(struct conn *c)
{
    uint32_t room = c->need ? c->need : c->get->room, before = c->have;
    int n = 1;

    while (c->have < room && (c->need || c->have == before) &&
           (n = tls_read(c->tls, c->get->buffer + c->have, room - c->have)) > 0)
        c->have += (uint32_t)n;
    if (n == TLS_READ || n == TLS_WRITE)
        wait_ready(c, n);
    else if (n > 0)
        received(c);
    else
        ended(c, n ? n : -ECONNRESET);
}

static void receive(struct conn *c)
{
    if (c->tls) {
        wait_more(c);
        receive_tls(c);
        return;
    }
    struct io_uring_sqe *sqe = worker_sqe(&c->thread->worker, &c->op);
    uint32_t left = (c->need ? c->need : c->get->room) - c->have;

    io_uring_prep_recv(sqe, c->fd, c->get->buffer + c->have, left, c->need ? MSG_WAITALL : 0);
    io_uring_sqe_set_data(sqe, &c->op);
    wait_more(c);
}

static int send_request(struct conn *c)
{
    size_t length = strlen(c->get->text);

    c->have = c->need = 0;
    if (c->tls)
        return tls_write(c->tls, c->get->text, length);
    ssize_t n = send(c->fd, c->get->text, length, MSG_NOSIGNAL | MSG_DONTWAIT);
    return n == (ssize_t)length ? 0 : n < 0 ? -errno : -EIO;
}

static void conn_begin(struct carrier_thread *t, struct get *get)
{
    struct conn *c = calloc(1, sizeof(*c));
    int one = 1;

    if (!c) {
        get_done(get, -ENOMEM);
        return;
    }
    list_init(&c->link);
    c->op.complete = on_event;
    c->thread = t;
    c->get = get;
    c->address = get->address;
    c->address_length = get->address_length;
    if (get->server && (!(c->server = strdup(get->server)) || !(c->ca = strdup(get->ca)))) {
        conn_drop(c);
        get_done(get, -ENOMEM);
        return;
    }
    c->fd = socket(get->address.ss_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (c->fd < 0) {
        conn_drop(c);
        get_done(get, -EMFILE);
        return;
    }
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
    list_append(&t->active, &c->link);
    t->connections++;
    c->connecting = true;
    struct io_uring_sqe *sqe = worker_sqe(&t->worker, &c->op);
    io_uring_prep_connect(sqe, c->fd, (struct sockaddr *)&c->address, c->address_length);
    io_uring_sqe_set_data(sqe, &c->op);
    wait_until(c, c->get->connect_ms, 0);
}

/* What was sent over a kept connection found it closed: once more, over a new one. The others are as dead. */
static void begin_anew(struct conn *c)
{
    struct carrier_thread *t = c->thread;
    struct get *get = c->get;

    conn_free(c);
    http_close_idle(t);
    conn_begin(t, get);
}

/* Whether nothing came over a kept connection: neither its end nor bytes that nobody asked for. */
static bool is_quiet(const struct conn *c)
{
    char byte;

    return !(c->tls && tls_pending(c->tls)) && recv(c->fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT) < 0 &&
           (errno == EAGAIN || errno == EWOULDBLOCK);
}

/* Whether a kept connection goes to where a get wants to. */
static bool leads_to(const struct conn *c, const struct get *get)
{
    if (c->address_length != get->address_length || memcmp(&c->address, &get->address, get->address_length))
        return false;
    return get->server ? c->server && !strcmp(c->server, get->server) && !strcmp(c->ca, get->ca) : !c->server;
}

void http_start(struct carrier_thread *t, struct get *get)
{
    struct list *next;

    for (struct list *at = t->idle.next; at != &t->idle; at = next) {
        struct conn *c = container_of(at, struct conn, link);
        next = at->next;
        if (!is_quiet(c)) {
            conn_free(c);
            continue;
        }
        if (!leads_to(c, get))
            continue;
        list_remove(&c->link);
        list_append(&t->active, &c->link);
        c->get = get;
        if (send_request(c))
            begin_anew(c);
        else
            receive(c);
        return;
    }
    if (t->connections >= MOST_CONNECTIONS && !list_empty(&t->idle)) /* they lead elsewhere */
        conn_free(container_of(t->idle.prev, struct conn, link));
    if (t->connections < MOST_CONNECTIONS)
        conn_begin(t, get);
    else
        list_append(&t->queued, &get->link);
}

static void start_queued(struct carrier_thread *t)
{
    if (!list_empty(&t->queued) && (!list_empty(&t->idle) || t->connections < MOST_CONNECTIONS))
        http_start(t, container_of(list_pop(&t->queued), struct get, link));
}

static void finish(struct conn *c, bool keep)
{
    struct carrier_thread *t = c->thread;
    struct get *get = c->get;

    get->data = get->buffer + (c->need - get->length);
    if (keep) {
        c->get = NULL;
        c->used = true;
        c->until_ns = now_ns() + IDLE_NS;
        list_remove(&c->link);
        list_prepend(&c->thread->idle, &c->link);
        worker_want_tick(&c->thread->worker);
    } else {
        conn_free(c);
    }
    get_done(get, 0);
    start_queued(t);
}

/* More of the answer came. */
static void received(struct conn *c)
{
    const char *head = (const char *)c->get->buffer;
    bool keep = true;

    if (!c->need) {
        const char *end = memmem(head, c->have < MAX_HEAD ? c->have : MAX_HEAD, "\r\n\r\n", 4);
        if (!end && c->have < MAX_HEAD) {
            receive(c);
            return;
        }
        if (!end || !is_good(c->get, head, end + 2, &keep)) {
            conn_fail(c, -EPROTO);
            return;
        }
        c->need = (uint32_t)(end + 4 - head) + c->get->length;
        c->used = keep;
    }
    if (c->have < c->need)
        receive(c);
    else
        finish(c, c->used && c->have == c->need);
}

/* Nothing more comes over the connection. */
static void ended(struct conn *c, int err)
{
    bool stale = c->used && !c->have && !c->connecting && !c->cancelled;

    if (stale && (err == -ECONNRESET || err == -EPIPE))
        begin_anew(c);
    else
        conn_fail(c, err);
}

/* The connection is there, and who answers is believed. */
static void exchange(struct conn *c)
{
    int err = send_request(c);

    if (err)
        ended(c, err);
    else
        receive(c);
}

static void shake(struct conn *c)
{
    int err = tls_shake(c->tls);

    if (err == TLS_READ || err == TLS_WRITE) {
        wait_ready(c, err);
        return;
    }
    c->shaking = false;
    if (err)
        conn_fail(c, err);
    else
        exchange(c);
}

static void connected(struct conn *c)
{
    c->connecting = false;
    if (!c->server) {
        exchange(c);
        return;
    }
    fcntl(c->fd, F_SETFL, O_NONBLOCK);
    c->tls = tls_new(carrier_tls(c->thread->engine->carrier), c->fd, c->server, c->ca);
    if (!c->tls) {
        conn_fail(c, -ENOMEM);
        return;
    }
    c->shaking = true;
    wait_until(c, c->get->connect_ms, 0);
    shake(c);
}

static void on_event(struct ring_op *op, int res, uint32_t flags)
{
    struct conn *c = container_of(op, struct conn, op);

    (void)flags;
    if (c->cancelled)
        res = -ETIMEDOUT;
    if (c->connecting && !res) {
        connected(c);
    } else if (c->connecting || res <= 0) {
        ended(c, res ? res : -ECONNRESET);
    } else if (c->shaking) {
        shake(c);
    } else if (c->tls) {
        receive_tls(c);
    } else {
        c->have += (uint32_t)res;
        received(c);
    }
}

/* ---- time ------------------------------------------------------------------------------------------- */

void http_look(struct carrier_thread *t, uint64_t now)
{
    struct list *next;

    while (now == UINT64_MAX && !list_empty(&t->queued))
        get_done(container_of(list_pop(&t->queued), struct get, link), -ESHUTDOWN);

    list_each(at, &t->active) {
        struct conn *c = container_of(at, struct conn, link);
        if (c->cancelled || now < c->until_ns)
            continue;
        c->cancelled = true;
        struct io_uring_sqe *sqe = worker_sqe(&t->worker, NULL);
        io_uring_prep_cancel(sqe, &c->op, 0);
        io_uring_sqe_set_data(sqe, NULL);
    }
    for (struct list *at = t->idle.next; at != &t->idle; at = next) {
        struct conn *c = container_of(at, struct conn, link);
        next = at->next;
        if (now >= c->until_ns)
            conn_free(c);
    }
}

void http_close_idle(struct carrier_thread *t)
{
    while (!list_empty(&t->idle))
        conn_free(container_of(t->idle.next, struct conn, link));
}
