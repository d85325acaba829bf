/*
 * READ: newest of write log, zero, block cache; a fault for what is in none.
 *
 * A request is cut into pieces by block; each piece ends on its own, so what was
 * copied stays copied while another piece waits for the store. A piece reads from
 * the page cache at once (RWF_NOWAIT); what would block goes through the ring
 * with the segment or slot pinned. Nothing else is held while it waits.
 */
#include "fault.h"
#include "io.h"
#include "volume.h"

#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>

struct read_op {
    struct ring_op op;
    struct io_req *req;
    struct log_segment *segment; /* pinned, or NULL: then `slot` is */
    uint32_t slot;
    int fd;
    uint8_t *buf;
    uint64_t offset, length;
};

void io_piece_done(struct io_req *req, int err)
{
    if (err)
        req->err = err;
    if (--req->pending == 0)
        io_finish(req, req->err);
}

/* ---- reading files ------------------------------------------------------------------------------ */

static void unpin(struct volume *v, struct log_segment *segment, uint32_t slot)
{
    if (segment)
        segment->pins--;
    else
        cache_unpin(&v->engine->cache, slot);
}

static void submit_read(struct read_op *x);

static void on_read(struct ring_op *op, int res, uint32_t flags)
{
    struct read_op *x = container_of(op, struct read_op, op);

    (void)flags;
    if (res > 0 && (uint64_t)res < x->length) {
        x->buf += res;
        x->offset += (uint64_t)res;
        x->length -= (uint64_t)res;
        submit_read(x);
        return;
    }
    if (res == -EINTR || res == -EAGAIN) {
        submit_read(x);
        return;
    }
    struct io_req *req = x->req;
    struct volume *v = req->volume;
    unpin(v, x->segment, x->slot);
    free(x);
    io_piece_done(req, res > 0 ? 0 : EIO);
    volume_read_done(v);
}

static void submit_read(struct read_op *x)
{
    struct io_uring_sqe *sqe = worker_sqe(x->req->volume->worker, &x->op);

    io_uring_prep_read(sqe, x->fd, x->buf, (unsigned)x->length, x->offset);
    io_uring_sqe_set_data(sqe, &x->op);
}

/* Read from a pinned file; takes the pin over. Adds to req->pending if it must wait. */
static int read_file(struct io_req *req, struct log_segment *segment, uint32_t slot, uint64_t offset, uint8_t *buf,
                     uint64_t length)
{
    struct volume *v = req->volume;
    int fd = segment ? segment->file.fd : v->engine->cache.fd;
    struct iovec iov = {buf, length};
    ssize_t n = preadv2(fd, &iov, 1, (off_t)offset, RWF_NOWAIT);

    if (n < 0 && (errno == EOPNOTSUPP || errno == EINVAL)) /* a file system without it, as tmpfs: memory speed */
        n = pread(fd, buf, length, (off_t)offset);
    if (n == (ssize_t)length || (n < 0 && errno != EAGAIN && errno != EINTR)) {
        unpin(v, segment, slot);
        return n < 0 ? EIO : 0;
    }
    struct read_op *x = malloc(sizeof(*x));
    if (!x) {
        unpin(v, segment, slot);
        return ENOMEM;
    }
    uint64_t got = n > 0 ? (uint64_t)n : 0;
    *x = (struct read_op){{on_read}, req, segment, slot, fd, buf + got, offset + got, length - got};
    req->pending++;
    v->reading++;
    submit_read(x);
    return 0;
}

/* ---- a piece ---------------------------------------------------------------------------------------- */

/* A range of bytes of one block, and where it goes. */
struct piece {
    struct io_req *req;
    uint64_t block;
    uint32_t from, to;
    uint8_t *buf;
    const uint64_t *pos; /* leaf of the block, or NULL */
    bool zero;           /* of sectors without position */
};

static uint64_t source_of(const struct piece *p, uint32_t sector)
{
    uint64_t pos = p->pos ? p->pos[sector] : 0;

    return pos ? pos : p->zero ? POS_ZERO : 0;
}

/* First byte after `at` that does not continue its source; *source is the source at `at`. */
static uint32_t run_end(const struct piece *p, uint32_t at, uint64_t *source)
{
    uint32_t first = at / SECTOR, s = first;

    *source = source_of(p, first);
    for (s++; s * SECTOR < p->to; s++) {
        uint64_t next = source_of(p, s);
        bool same = *source & POS_ZERO ? (next & POS_ZERO) != 0 : *source ? next == *source + (s - first) : next == 0;
        if (!same)
            break;
    }
    return s * SECTOR < p->to ? s * SECTOR : p->to;
}

static bool needs_base(const struct piece *p)
{
    uint64_t source;

    for (uint32_t at = p->from; at < p->to;) {
        uint32_t end = run_end(p, at, &source);
        if (!source)
            return true;
        at = end;
    }
    return false;
}

static void note_sources(const struct piece *p, uint32_t at, uint32_t end, const struct base_view *base)
{
    for (uint32_t s = at / SECTOR; s * SECTOR < end; s++)
        shadow_note(p->req, p->block * BLOCK_SECTORS + s, source_of(p, s), base);
}

static int read_run(const struct piece *p, uint32_t at, uint32_t end, uint64_t source, const struct base_view *base)
{
    struct volume *v = p->req->volume;
    uint8_t *buf = p->buf + (at - p->from);

    if (p->req->shadow)
        note_sources(p, at, end, base);
    if ((source & POS_ZERO) || (!source && base->kind == BASE_ZERO)) {
        memset(buf, 0, end - at);
        return 0;
    }
    if (source) {
        struct log_segment *s = log_find(&v->log, pos_seq(source));
        if (!s)
            return EIO; /* the map names a segment that is gone: never guess */
        s->pins++;
        return read_file(p->req, s, 0, segment_data_offset(s->sectors, pos_index(source)) + at % SECTOR, buf, end - at);
    }
    cache_pin_again(&v->engine->cache, base->slot); /* the piece holds a pin */
    return read_file(p->req, NULL, base->slot, cache_offset(base->slot) + at, buf, end - at);
}

/* What the base of the block is, pinned if it is a slot; drops an entry whose slot was reused. */
static struct base_view pin_base(struct volume *v, uint64_t block)
{
    struct base_view base = block_map_find(&v->base, block);

    if (base.kind != BASE_SLOT || cache_pin(&v->engine->cache, base.slot, base.generation))
        return base;
    block_map_drop(&v->base, block, 1);
    return (struct base_view){BASE_UNKNOWN, 0, 0};
}

static void count_sources(struct volume *v, bool from_base, const struct base_view *base)
{
    stat_add(!from_base                ? &v->stats.log_hits
             : base->kind == BASE_ZERO ? &v->stats.zero_reads
                                       : &v->stats.cache_reads,
             1);
}

void io_read_piece(struct io_req *req, uint64_t block)
{
    struct volume *v = req->volume;
    uint64_t start = block * GLIDE_BLOCK;
    uint64_t first = max_u64(req->offset, start), end = min_u64(req->offset + req->length, start + GLIDE_BLOCK);
    struct log_view view = log_map_view(&v->map, block);
    struct piece p = {.req = req,
                      .block = block,
                      .from = (uint32_t)(first - start),
                      .to = (uint32_t)(end - start),
                      .buf = req->buf + (first - req->offset),
                      .pos = view.pos,
                      .zero = view.zero};
    struct base_view base = {BASE_ZERO, 0, 0};
    bool from_base = needs_base(&p);
    int err = 0;

    if (v->failed) {
        io_piece_done(req, v->failed);
        return;
    }
    if (from_base)
        base = pin_base(v, block);
    for (uint32_t at = p.from; base.kind != BASE_UNKNOWN && at < p.to && !err;) {
        uint64_t source;
        uint32_t run = run_end(&p, at, &source);
        err = read_run(&p, at, run, source, &base);
        at = run;
    }
    if (base.kind == BASE_UNKNOWN) {
        err = -fault_wait(v, block, req);
        if (!err)
            return; /* its part of req->pending goes with the waiter */
    } else {
        count_sources(v, from_base, &base);
    }
    if (base.kind == BASE_SLOT)
        cache_unpin(&v->engine->cache, base.slot);
    io_piece_done(req, err);
}

void io_read(struct io_req *req)
{
    uint64_t end = req->offset + req->length;

    req->pending = 1; /* ours, until all pieces are started */
    for (uint64_t block = req->offset / GLIDE_BLOCK; block * GLIDE_BLOCK < end; block++) {
        req->pending++;
        io_read_piece(req, block);
    }
    io_piece_done(req, 0);
}
