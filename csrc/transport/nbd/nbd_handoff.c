/*
 * Connections that move to another process with their volume.
 *
 * NBD is a stream of bytes, and so is what moves: replies that are not sent yet, and what the new process shall
 * receive first. That is every request without an answer, written out again as the client sent it, then what was
 * received behind them. A write that waits only for its sync or commit goes as a FLUSH with its cookie.
 */
#include "transport/nbd/nbd_conn.h"
#include "volume/volume.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* ---- the old process --------------------------------------------------------------------------- */

/* Payload of a request that must be received again. */
static uint64_t payload_bytes(const struct nbd_conn *c, const struct nbd_req *r)
{
    if (r->io.op != GLIDE_WRITE || io_logged(&r->io))
        return 0;
    return r == c->filling ? c->filled : r->io.length;
}

static uint8_t *put(uint8_t *at, const void *data, uint64_t length)
{
    if (length)
        memcpy(at, data, length);
    return at + length;
}

static uint64_t in_bytes(const struct nbd_conn *c)
{
    uint64_t bytes = c->rest_length * (c->rest != NULL) + c->head_length;

    list_each(at, &c->requests) {
        const struct nbd_req *r = container_of(at, struct nbd_req, all);
        if (!r->answered)
            bytes += nbd_request_bytes(c) + payload_bytes(c, r);
    }
    return bytes;
}

static uint64_t out_bytes(const struct nbd_conn *c)
{
    uint64_t bytes = 0;

    list_each(at, &c->replies)
        bytes += container_of(container_of(at, struct io_req, link), struct nbd_req, io)->reply_bytes;
    return bytes - c->sent;
}

struct handoff_call {
    struct volume *v;
    struct glide_nbd_state *states;
    uint32_t max;
    const struct glide_nbd_state *state;
    uint8_t *in, *out;
};

static struct glide_nbd_handshake handshake_of(const struct nbd_conn *c)
{
    struct glide_nbd_handshake out = {.modes = c->modes, .snapshots = c->snapshots};

    for (uint32_t i = 0; i < c->snapshots; i++)
        out.changed[i] = c->changed[i].snapshot;
    return out;
}

static int list_conns(struct worker *w, void *arg)
{
    struct handoff_call *h = arg;
    uint32_t n = 0;

    (void)w;
    if (!h->v->frozen)
        return fail(-EINVAL, "the volume is not frozen");
    transports_each(t, h->v) {
        const struct nbd_conn *c = nbd_conn_of(t);
        if (!c || c->broken)
            continue;
        if (n < h->max)
            h->states[n] = (struct glide_nbd_state){.conn_id = c->id,
                                                    .in_bytes = in_bytes(c),
                                                    .out_bytes = out_bytes(c),
                                                    .skip = c->skip + c->skip_after_rest,
                                                    .fd = c->fd,
                                                    .handshake = handshake_of(c)};
        n++;
    }
    return (int)n;
}

int glide_nbd_frozen(glide_volume *volume, struct glide_nbd_state *out, uint32_t max)
{
    return worker_call(volume->worker, list_conns, &(struct handoff_call){.v = volume, .states = out, .max = max});
}

static void write_in(const struct nbd_conn *c, uint8_t *at)
{
    list_each(e, &c->requests) {
        const struct nbd_req *r = container_of(e, struct nbd_req, all);
        if (r->answered)
            continue;
        nbd_encode(r, at);
        at = put(at + nbd_request_bytes(c), r->io.buf, payload_bytes(c, r));
    }
    at = put(at, c->rest, c->rest ? c->rest_length : 0);
    put(at, c->head, c->head_length);
}

/* What is left of `data` when *skip bytes in front of it and of what follows are left out. */
static uint8_t *put_after(uint8_t *at, const uint8_t *data, uint64_t length, uint64_t *skip)
{
    uint64_t cut = min_u64(*skip, length);

    *skip -= cut;
    return cut < length ? put(at, data + cut, length - cut) : at;
}

static void write_out(const struct nbd_conn *c, uint8_t *at)
{
    uint64_t skip = c->sent;

    list_each(e, &c->replies) {
        const struct nbd_req *r = container_of(container_of(e, struct io_req, link), struct nbd_req, io);
        for (uint32_t i = 0; i < r->part_count; i++) {
            const struct nbd_part *p = nbd_part(r, i);
            at = put_after(at, p->head, p->head_length, &skip);
            at = put_after(at, p->data, p->length, &skip);
        }
    }
}

static int export_conn(struct worker *w, void *arg)
{
    struct handoff_call *h = arg;

    (void)w;
    transports_each(t, h->v) {
        const struct nbd_conn *c = nbd_conn_of(t);
        if (!c || c->id != h->state->conn_id)
            continue;
        if (in_bytes(c) != h->state->in_bytes || out_bytes(c) != h->state->out_bytes)
            return fail(-EAGAIN, "connection %llu has changed", (unsigned long long)c->id);
        write_in(c, h->in);
        write_out(c, h->out);
        return 0;
    }
    return fail(-ENOENT, "connection %llu is gone", (unsigned long long)h->state->conn_id);
}

int glide_nbd_export(glide_volume *volume, const struct glide_nbd_state *state, void *in, void *out)
{
    return worker_call(volume->worker, export_conn,
                       &(struct handoff_call){.v = volume, .state = state, .in = in, .out = out});
}

/* ---- the new process ------------------------------------------------------------------------------ */

struct adopt {
    struct nbd_conn *conn;
    struct nbd_req *replies; /* what is still to be sent, or NULL */
};

static int adopt(struct worker *w, void *arg)
{
    struct adopt *a = arg;
    struct nbd_conn *c = a->conn;
    int err = c->volume->frozen ? nbd_enter(w, c) : fail(-EINVAL, "the volume is not frozen");

    if (err)
        return err;
    if (a->replies) {
        c->held++;
        nbd_memory_add(c, NBD_REPLIES, a->replies->charged);
        list_append(&c->requests, &a->replies->all);
        list_append(&c->replies, &a->replies->io.link);
    }
    return 0; /* nbd_unfreeze() begins */
}

static uint8_t *copy(const void *data, uint64_t length)
{
    uint8_t *out = malloc(length ? length : 1);

    return out ? put(out, data, length) - length : NULL;
}

static struct nbd_req *raw_reply(struct nbd_conn *c, const void *data, uint64_t length)
{
    struct nbd_req *r = calloc(1, sizeof(*r));

    if (!r || !(r->buf = copy(data, length))) {
        free(r);
        return NULL;
    }
    r->conn = c;
    r->io.volume = c->volume;
    r->answered = true;
    r->part_count = 1;
    r->first.data = r->buf;
    r->first.length = r->reply_bytes = r->size = r->charged = length;
    list_init(&r->all);
    list_init(&r->io.link);
    return r;
}

int glide_nbd_adopt(glide_volume *volume, int fd, const struct glide_nbd_state *state, const void *in, const void *out)
{
    struct nbd_conn *c = nbd_conn_new(volume, fd, state->conn_id, &state->handshake);
    struct adopt a = {.conn = c};
    int err = c ? 0 : -ENOMEM;

    if (!err && state->in_bytes) {
        uint8_t *rest = copy(in, state->in_bytes);
        if (rest)
            nbd_keep_rest(c, rest, state->in_bytes);
        err = rest ? 0 : -ENOMEM;
    }
    if (!err && state->out_bytes) {
        a.replies = raw_reply(c, out, state->out_bytes);
        err = a.replies ? 0 : -ENOMEM;
    }
    if (!err) {
        c->skip = c->rest ? 0 : state->skip;
        c->skip_after_rest = state->skip - c->skip;
        err = worker_call(volume->worker, adopt, &a);
    }
    if (!err)
        return 0;
    if (a.replies)
        free(a.replies->buf);
    free(a.replies);
    if (c)
        nbd_conn_discard(c);
    return err;
}
