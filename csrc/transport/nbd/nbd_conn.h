/*
 * The transmission phase of an NBD connection, on the worker of its volume.
 * The handshake is Python's (glidefs/transport/nbd/server.py); the protocol is the
 * "NBD protocol" document of the NetworkBlockDevice project.
 *
 * nbd_socket.c receives and sends, nbd_request.c knows the bytes of a request, nbd_reply.c those of a reply,
 * nbd_memory.c limits their memory, nbd_conn.c begins and ends.
 */
#ifndef GLIDE_NBD_CONN_H
#define GLIDE_NBD_CONN_H

#include "volume/changed.h"
#include "volume/io.h"
#include "volume/volume.h"
#include "transport/nbd/nbd_memory.h"
#include "loop/worker.h"

#define NBD_REQUEST_BYTES 28u
#define NBD_EXTENDED_BYTES 32u     /* of a request with an extended header, and of the header of each chunk then */
#define NBD_HEAD_BYTES 48u         /* of the longest head of a reply, or of one of its chunks */
#define NBD_MAX_LENGTH (32u << 20) /* of a READ or WRITE */
#define NBD_CACHE_BYTES (8u << 20) /* of a CACHE; what is behind them is not fetched */
#define NBD_MAX_EXTENTS 2048u      /* of each context in the answer to a BLOCK_STATUS */
#define NBD_MAX_HELD 1024u         /* requests of a connection; then it is not read from */
#define NBD_RECEIVE_BYTES (1u << 20)

struct nbd_conn {
    struct transport transport;
    struct task send_task; /* replies, then nbd_advance(), at the end of the round */
    struct volume *volume;
    struct worker *worker;
    int fd;
    uint64_t id;
    uint32_t modes; /* enum glide_nbd_mode */
    struct changed changed[GLIDE_NBD_SNAPSHOTS];
    uint32_t snapshots; /* of them in use */

    /* receiving: a request that is not complete yet */
    uint8_t head[NBD_EXTENDED_BYTES];
    uint32_t head_length;    /* bytes of a header */
    struct nbd_req *filling; /* a WRITE whose payload is being received... */
    uint64_t filled;         /* ...so far */
    uint64_t skip;           /* payload of a refused WRITE, to be thrown away */
    uint8_t *rest;           /* received while too much was in flight; nothing is read before it is used */
    uint64_t rest_length;
    uint64_t skip_after_rest; /* `skip` once rest is used up */
    uint64_t wanted;          /* data of the request at the head of rest, for which there was no memory */
    enum nbd_account wanted_of;
    uint32_t fill_ticks; /* of the worker, since bytes for `filling` came */

    struct list requests; /* all that are held: nbd_req.all, in order of arrival */

    /* sending */
    struct list replies; /* io_req.link of nbd_req, in order */
    uint64_t sent;       /* bytes of the first one */
    int queued;          /* bytes in the socket, at the last tick */
    uint32_t send_ticks; /* of the worker, since the peer took some */

    struct ring_op poll_op, send_op;
    bool polling, send_polling; /* those are armed */
    struct ring_op cancel_op;
    uint32_t cancels;  /* under way: each names one of the ops above */
    bool readable;     /* data may be there, but too much is in flight */
    bool hangup;       /* the end of the stream waits behind the data */
    bool ended;        /* nothing more is read */
    bool leaving;      /* we end it: replies that the peer does not take are dropped */
    bool broken;       /* nothing more is sent */
    int error;         /* why it ended: an errno, or 0 */
    uint32_t inflight; /* requests that the volume has */
    uint32_t held;     /* those, and replies not sent */
    uint64_t memory[NBD_ACCOUNTS];
    uint64_t socket_bytes; /* of its send buffer, if that was made larger */
    struct task resume_task;
    struct list detach_calls;
};

enum nbd_command {
    NBD_READ = 0,
    NBD_WRITE = 1,
    NBD_DISC = 2,
    NBD_FLUSH = 3,
    NBD_TRIM = 4,
    NBD_CACHE = 5,
    NBD_WRITE_ZEROES = 6,
    NBD_BLOCK_STATUS = 7,
};

/* Of a reply: a header, and what is sent behind it. */
struct nbd_part {
    uint8_t head[NBD_HEAD_BYTES];
    uint32_t head_length;
    const uint8_t *data; /* the request's, or a constant */
    uint64_t length;
};

struct nbd_req {
    struct io_req io;
    struct nbd_conn *conn;
    struct list all; /* conn->requests */
    uint16_t type, flags;
    uint64_t cookie;  /* as received */
    uint64_t offset;  /* as it was asked for */
    bool answered;    /* in conn->replies */
    uint32_t context; /* BLOCK_STATUS: which of the connection's it is at */
    enum nbd_account account;
    uint64_t charged;       /* to conn->memory[account] */
    struct nbd_part first;  /* of the reply, if it has one part; no head: bytes that an earlier process had to send */
    struct nbd_part *parts; /* else all of them, owned */
    uint32_t part_count;
    uint64_t reply_bytes;
    uint8_t *buf; /* owned, of capacity `size`; NULL: io.buf is the receive buffer's */
    uint64_t size;
};

static inline const struct nbd_part *nbd_part(const struct nbd_req *r, uint32_t i)
{
    return r->parts ? &r->parts[i] : &r->first;
}

static inline bool nbd_extended(const struct nbd_conn *c) { return c->modes & GLIDE_NBD_EXTENDED; }
/* Of the header of a request. */
static inline uint32_t nbd_request_bytes(const struct nbd_conn *c)
{
    return nbd_extended(c) ? NBD_EXTENDED_BYTES : NBD_REQUEST_BYTES;
}

/* ---- contexts: base:allocation if it was chosen, then those of snapshots ---- */
static inline uint32_t nbd_contexts(const struct nbd_conn *c)
{
    return c->snapshots + ((c->modes & GLIDE_NBD_ALLOCATION) != 0);
}
/* Of the context with this number; NULL: it is base:allocation. */
static inline struct changed *nbd_changed(struct nbd_conn *c, uint32_t context)
{
    bool allocation = c->modes & GLIDE_NBD_ALLOCATION;

    return allocation && !context ? NULL : &c->changed[context - allocation];
}
/* Where the extents of a context go. */
struct io_extents *nbd_extents(const struct nbd_req *r, uint32_t context);

/* ---- worker ---- */
extern const struct transport_ops NBD_OPS;
/* The connection that a transport of a volume is, or NULL. */
static inline struct nbd_conn *nbd_conn_of(struct transport *t)
{
    return t->ops == &NBD_OPS ? container_of(t, struct nbd_conn, transport) : NULL;
}

/* ---- nbd_request.c: for nbd_conn.c ---- */
static inline bool nbd_too_busy(const struct nbd_conn *c)
{
    return c->held >= NBD_MAX_HELD || (c->wanted && !nbd_memory_fits(c, c->wanted_of, c->wanted));
}
/*
 * Carry out what `data` holds. Returns the bytes used: all but an incomplete header, and what comes after the
 * connection became too busy. An incomplete payload becomes conn->filling. -EPROTO: the connection must end.
 */
int64_t nbd_parse(struct nbd_conn *c, const uint8_t *data, uint64_t length);
/* The payload of conn->filling is complete. */
void nbd_filled(struct nbd_conn *c);
void nbd_req_free(struct nbd_req *r);
/* ---- nbd_reply.c ---- */
/* Make the reply of a request that came out as err, 0 or a positive errno. */
void nbd_build_reply(struct nbd_req *r, int err);
/* ---- nbd_socket.c ---- */
/* A reply is ready: it will be sent and the request freed. */
void nbd_reply(struct nbd_req *r);
void nbd_socket_init(struct nbd_conn *c);
void nbd_arm_poll(struct nbd_conn *c);
void nbd_receive_some(struct nbd_conn *c);
/* Go on in the next round, unless it still waits for something. */
void nbd_resume_later(struct nbd_conn *c);
void nbd_send_replies(struct nbd_conn *c);
/* Keep `rest`, which was malloc'ed, to be received first. */
void nbd_keep_rest(struct nbd_conn *c, uint8_t *rest, uint64_t length);
/* ---- nbd_conn.c ---- */
void nbd_end(struct nbd_conn *c, int error, bool broken);
/* Nobody waits for its requests any more: what waits for the store or for space is given up. */
void nbd_give_up(struct nbd_conn *c, int error);
/* Go on after something has ended. May free the connection. */
void nbd_advance(struct nbd_conn *c);
/* A connection without a worker yet, which owns fd. NULL = no memory, and fd is closed. */
struct nbd_conn *nbd_conn_new(struct volume *v, int fd, uint64_t id, const struct glide_nbd_handshake *handshake);
/* Free one that never reached a worker. */
void nbd_conn_discard(struct nbd_conn *c);
/* On the worker: the connection belongs to its volume. -errno. */
int nbd_enter(struct worker *w, struct nbd_conn *c);
/* The header, nbd_request_bytes(), of the request that would be answered as `r`. */
void nbd_encode(const struct nbd_req *r, uint8_t *out);

#endif
