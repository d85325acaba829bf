#include "transport/nbd/nbd_conn.h"
#include "volume/volume.h"

#include <endian.h>
#include <stdlib.h>
#include <string.h>

#define NBD_REQUEST_MAGIC 0x25609513u
#define NBD_EXTENDED_MAGIC 0x21e41c71u
#define NBD_FLAG_FUA 1u
#define NBD_FLAG_NO_HOLE 2u
#define NBD_FLAG_DF 4u
#define NBD_FLAG_REQ_ONE 8u
#define NBD_FLAG_FAST_ZERO 16u
#define NBD_FLAG_PAYLOAD_LEN 32u /* with extended headers: the length is that of a payload */

struct nbd_header {
    uint16_t flags, type;
    uint64_t cookie; /* as received */
    uint64_t offset, length;
};

/* ---- memory: a few sizes, kept by malloc's thread cache or reused here ------------------------ */

static bool need_buf(struct nbd_req *r, uint64_t length)
{
    if (r->size < length) {
        free(r->buf);
        r->buf = malloc(length);
        r->size = r->buf ? length : 0;
    }
    return r->buf != NULL;
}

void nbd_req_free(struct nbd_req *r)
{
    r->conn->held--;
    nbd_memory_give(r->conn, r->account, r->charged);
    list_remove(&r->all);
    free(r->parts);
    free(r->buf);
    free(r);
}

/* ---- a request --------------------------------------------------------------------------------- */

static uint32_t extents_of(uint16_t flags, uint64_t length)
{
    uint64_t most = length / 512 + 1;

    return flags & NBD_FLAG_REQ_ONE ? 1 : (uint32_t)min_u64(most, NBD_MAX_EXTENTS);
}

static uint64_t status_bytes(uint32_t extents)
{
    return sizeof(struct io_extents) + extents * sizeof(struct io_extent);
}

struct io_extents *nbd_extents(const struct nbd_req *r, uint32_t context)
{
    uint64_t each = status_bytes(extents_of(r->flags, r->io.length));

    return (struct io_extents *)(void *)(r->buf + context * each);
}

/* Ask for the extents of the context that a BLOCK_STATUS is at. */
static void submit_status(struct nbd_req *r)
{
    struct io_extents *out = nbd_extents(r, r->context);

    *out = (struct io_extents){.max = extents_of(r->flags, r->io.length)};
    r->io.changed = nbd_changed(r->conn, r->context);
    r->io.buf = (uint8_t *)out;
    io_submit(&r->io);
}

static void on_done(struct io_req *io, int err)
{
    struct nbd_req *r = container_of(io, struct nbd_req, io);

    if (!err && io->op == IO_STATUS && ++r->context < nbd_contexts(r->conn)) {
        submit_status(r);
        return;
    }
    nbd_build_reply(r, err);
    nbd_reply(r);
}

static int own(struct io_req *io)
{
    struct nbd_req *r = container_of(io, struct nbd_req, io);

    if (r->buf == io->buf)
        return 0;
    if (!need_buf(r, io->length))
        return -ENOMEM;
    memcpy(r->buf, io->buf, io->length);
    io->buf = r->buf;
    return 0;
}

/* Whether a READ is asked which sectors are holes; not one whose answer must be in one piece. */
static bool wants_holes(const struct nbd_conn *c, const struct nbd_header *h)
{
    return h->type == NBD_READ && c->modes & GLIDE_NBD_STRUCTURED && !(h->flags & NBD_FLAG_DF);
}

/* Bits of io.holes, in words, for a READ wherever it begins. */
static uint64_t hole_words(const struct nbd_header *h) { return (h->length / GLIDE_SECTOR + 2) / 64 + 1; }

/* Bytes that a request takes, where there are to be any. */
static uint64_t data_of(const struct nbd_conn *c, const struct nbd_header *h)
{
    switch (h->type) {
    case NBD_READ:
        if (h->length > NBD_MAX_LENGTH)
            return 0;
        return wants_holes(c, h) ? div_up(h->length, 8) * 8 + hole_words(h) * 8 : h->length;
    case NBD_WRITE:
        return h->length <= NBD_MAX_LENGTH ? h->length : 0;
    case NBD_CACHE:
        return min_u64(h->length, NBD_CACHE_BYTES);
    case NBD_BLOCK_STATUS:
        return nbd_contexts(c) * status_bytes(extents_of(h->flags, h->length));
    default:
        return 0;
    }
}

/* NULL: there is no memory for it now (conn->wanted), or none even for an error reply. */
static struct nbd_req *new_request(struct nbd_conn *c, const struct nbd_header *h)
{
    enum nbd_account account = h->type == NBD_WRITE ? NBD_PAYLOADS : NBD_REPLIES;
    uint64_t bytes = data_of(c, h);

    if (bytes && !nbd_memory_take(c, account, bytes)) {
        c->wanted = bytes;
        c->wanted_of = account;
        return NULL;
    }
    struct nbd_req *r = calloc(1, sizeof(*r));
    if (!r) {
        nbd_memory_give(c, account, bytes);
        return NULL;
    }
    nbd_memory_add(c, account, sizeof(*r));
    r->account = account;
    r->charged = bytes + sizeof(*r);
    r->conn = c;
    r->type = h->type;
    r->flags = h->flags;
    r->cookie = h->cookie;
    r->offset = h->offset;
    r->io.volume = c->volume;
    r->io.offset = h->offset;
    r->io.length = h->length;
    r->io.flags = h->flags & NBD_FLAG_FUA ? GLIDE_FUA : 0;
    r->io.done = on_done;
    r->io.own = own;
    list_init(&r->io.link);
    list_append(&c->requests, &r->all);
    r->io.tag = c;
    c->inflight++;
    c->held++;
    return r;
}

static uint32_t flags_of(const struct nbd_conn *c, uint16_t type)
{
    switch (type) {
    case NBD_READ:
        return NBD_FLAG_FUA | (c->modes & GLIDE_NBD_STRUCTURED ? NBD_FLAG_DF : 0);
    case NBD_WRITE_ZEROES:
        return NBD_FLAG_FUA | NBD_FLAG_NO_HOLE | NBD_FLAG_FAST_ZERO;
    case NBD_BLOCK_STATUS:
        return NBD_FLAG_FUA | NBD_FLAG_REQ_ONE;
    case NBD_WRITE:
        return NBD_FLAG_FUA | (nbd_extended(c) ? NBD_FLAG_PAYLOAD_LEN : 0);
    default:
        return NBD_FLAG_FUA;
    }
}

/* Bytes that follow a header. A client that leaves the flag out of a WRITE breaks the protocol; what it means is clear.
 */
static uint64_t payload_of(const struct nbd_conn *c, const struct nbd_header *h)
{
    bool told = nbd_extended(c) && h->flags & NBD_FLAG_PAYLOAD_LEN;

    return told || h->type == NBD_WRITE ? h->length : 0;
}

static bool writes(uint16_t type) { return type == NBD_WRITE || type == NBD_TRIM || type == NBD_WRITE_ZEROES; }

static int check(const struct nbd_conn *c, const struct nbd_header *h)
{
    bool data = h->type == NBD_READ || h->type == NBD_WRITE, status = h->type == NBD_BLOCK_STATUS;
    uint64_t size = atomic_load_explicit(&c->volume->size, memory_order_relaxed);

    if (h->type > NBD_BLOCK_STATUS || (h->flags & ~flags_of(c, h->type)))
        return EINVAL;
    if (status && (!nbd_contexts(c) || !h->length))
        return EINVAL;
    if (h->type == NBD_CACHE && (h->offset > size || h->length > size - h->offset))
        return EINVAL; /* beyond what is fetched of it, too */
    if (c->modes & GLIDE_NBD_READ_ONLY && writes(h->type))
        return EPERM;
    return data && h->length > NBD_MAX_LENGTH ? EINVAL : 0;
}

static uint8_t op_of(uint16_t type)
{
    switch (type) {
    case NBD_READ:
    case NBD_CACHE:
        return GLIDE_READ;
    case NBD_WRITE:
        return GLIDE_WRITE;
    case NBD_FLUSH:
        return GLIDE_FLUSH;
    case NBD_BLOCK_STATUS:
        return IO_STATUS;
    default:
        return GLIDE_ZERO;
    }
}

void nbd_encode(const struct nbd_req *r, uint8_t *out)
{
    /* What is in the log must not be written again: a later write may have replaced it since. */
    bool extended = nbd_extended(r->conn);
    uint16_t type = io_logged(&r->io) ? NBD_FLUSH : r->type;
    uint16_t flags = type == NBD_FLUSH ? 0 : r->flags;
    uint64_t offset = htobe64(r->offset), length64 = type == NBD_FLUSH ? 0 : htobe64(r->io.length);
    uint32_t magic = htobe32(extended ? NBD_EXTENDED_MAGIC : NBD_REQUEST_MAGIC);
    uint32_t length32 = type == NBD_FLUSH ? 0 : htobe32((uint32_t)r->io.length);

    flags = htobe16(flags);
    type = htobe16(type);
    memcpy(out, &magic, 4);
    memcpy(out + 4, &flags, 2);
    memcpy(out + 6, &type, 2);
    memcpy(out + 8, &r->cookie, 8);
    memcpy(out + 16, &offset, 8); /* an extended reply repeats it */
    if (extended)
        memcpy(out + 24, &length64, 8);
    else
        memcpy(out + 24, &length32, 4);
}

static void decode(const struct nbd_conn *c, const uint8_t *p, struct nbd_header *h)
{
    uint16_t u16;
    uint32_t u32;
    uint64_t u64;

    memcpy(&u16, p + 4, 2);
    h->flags = be16toh(u16);
    memcpy(&u16, p + 6, 2);
    h->type = be16toh(u16);
    memcpy(&h->cookie, p + 8, 8);
    memcpy(&u64, p + 16, 8);
    h->offset = be64toh(u64);
    if (nbd_extended(c)) {
        memcpy(&u64, p + 24, 8);
        h->length = be64toh(u64);
    } else {
        memcpy(&u32, p + 24, 4);
        h->length = be32toh(u32);
    }
}

/* A WRITE with `have` of its payload at data. Returns bytes used, -EPROTO. */
static int64_t start_write(struct nbd_conn *c, struct nbd_req *r, const uint8_t *data, uint64_t have)
{
    uint64_t length = r->io.length;

    if (have >= length) {
        r->io.buf = (uint8_t *)(uintptr_t)data; /* until io_flush; own() copies what waits longer */
        io_submit(&r->io);
        return (int64_t)length;
    }
    if (!need_buf(r, length)) {
        c->skip = length - have;
        on_done(&r->io, ENOMEM);
        return (int64_t)have;
    }
    memcpy(r->buf, data, have);
    r->io.buf = r->buf;
    c->filling = r;
    c->filled = have;
    c->fill_ticks = 0;
    worker_want_tick(c->worker); /* see tick in nbd_conn.c */
    return (int64_t)have;
}

void nbd_filled(struct nbd_conn *c)
{
    struct nbd_req *r = c->filling;

    c->filling = NULL;
    io_submit(&r->io);
}

/* What a request needs besides its header and payload. False: there is no memory. */
static bool prepare(struct nbd_conn *c, struct nbd_req *r, const struct nbd_header *h)
{
    uint64_t bytes = h->type == NBD_WRITE ? 0 : data_of(c, h);

    if (bytes && !need_buf(r, bytes))
        return false;
    r->io.op = op_of(h->type);
    r->io.buf = r->buf;
    if (h->type == NBD_FLUSH)
        r->io.offset = r->io.length = 0;
    if (h->type == NBD_CACHE)
        r->io.length = bytes;
    if (h->type == NBD_BLOCK_STATUS)
        r->io.flags |= IO_INTERNAL;
    if (wants_holes(c, h)) {
        r->io.holes = (uint64_t *)(void *)(r->buf + div_up(h->length, 8) * 8);
        memset(r->io.holes, 0, hole_words(h) * 8);
    }
    return true;
}

/* One request whose header is complete. Returns bytes of payload used, -EPROTO; -EAGAIN: not now, see conn->wanted. */
static int64_t start(struct nbd_conn *c, const uint8_t *header, const uint8_t *payload, uint64_t have)
{
    struct nbd_header h;
    uint32_t magic;

    memcpy(&magic, header, 4);
    if (be32toh(magic) != (nbd_extended(c) ? NBD_EXTENDED_MAGIC : NBD_REQUEST_MAGIC))
        return -EPROTO;
    decode(c, header, &h);
    if (payload_of(c, &h) > UINT32_MAX)
        return -EPROTO; /* nobody has that much to say, or to listen to */
    if (h.type == NBD_DISC) {
        c->ended = true;
        return 0;
    }
    struct nbd_req *r = new_request(c, &h);
    if (!r)
        return c->wanted ? -EAGAIN : -EPROTO;
    int err = check(c, &h);
    if (!err && !prepare(c, r, &h))
        err = ENOMEM;
    if (err) {
        uint64_t throw = payload_of(c, &h);
        uint64_t now = min_u64(throw, have);
        c->skip = throw -now;
        on_done(&r->io, err);
        return (int64_t)now;
    }
    if (h.type == NBD_WRITE)
        return start_write(c, r, payload, have);
    if (h.type == NBD_BLOCK_STATUS)
        submit_status(r);
    else
        io_submit(&r->io);
    return 0;
}

int64_t nbd_parse(struct nbd_conn *c, const uint8_t *data, uint64_t length)
{
    uint64_t at = 0, bytes = nbd_request_bytes(c);

    while (!c->ended && !nbd_too_busy(c) && length - at >= bytes) {
        const uint8_t *payload = data + at + bytes;
        int64_t used = start(c, data + at, payload, length - at - bytes);
        if (used == -EAGAIN)
            break;
        if (used < 0)
            return used;
        at += bytes + (uint64_t)used;
    }
    return (int64_t)(c->ended ? length : at);
}
