/*
 * READ: newest of write log, zero, block cache; a fault for what is in none.
 *
 * A request is cut into pieces by block; each piece ends on its own, so what was
 * copied stays copied while another piece waits for the store. A piece reads from
 * the page cache at once (RWF_NOWAIT); what would block goes through the ring
 * with the segment or slot pinned. Nothing else is held while it waits.
 *
 * Files are not believed: what is read is compared with the hashes of its sectors in memory. Where that fails, or the
 * read does, the block waits for a fault: the store has it, if the segment is committed. EIO is for what is nowhere
 * else, after DISK_TRIES reads.
 */
#include "cache/block_cache.h"
#include "base/data_hash.h"
#include "volume/fault.h"
#include "volume/io.h"
#include "volume/volume.h"

#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>

/* A read of one file for one run of a piece. */
struct read_op {
    struct ring_op op;
    struct io_req *req;
    uint64_t block;
    struct log_segment *segment; /* pinned, or NULL: then `slot` is */
    uint32_t slot, generation;
    uint32_t index, end; /* sectors of the segment or slot that are read */
    uint8_t *buf;        /* the guest's */
    uint32_t length;     /* of it */
    uint32_t skip;       /* bytes that are read before what the guest wants */
    uint8_t *bounce;     /* where whole sectors go if the guest wants parts; NULL = to buf */
    uint64_t offset;     /* in the file */
    uint64_t total, got; /* bytes */
    uint32_t tries;      /* that failed */
};

void io_piece_done(struct io_req *req, int err)
{
    if (err)
        req->err = err;
    if (--req->pending == 0)
        io_finish(req, req->err);
}

/* ---- what a file did not have ---------------------------------------------------------------------- */

#define WAITS (-1) /* instead of an errno: the whole piece is done again when the store has answered */

/* Let the piece wait until the store gave its block. WAITS or a positive errno. */
static int ask_store(struct read_op *x)
{
    struct io_req *req = x->req;
    struct volume *v = req->volume;

    if (v->failed || v->closing)
        return v->failed ? v->failed : ESHUTDOWN;
    if (req->flags & IO_HERE)
        return ENODATA;
    req->pending++;
    int err = fault_wait(v, x->block, req);
    if (!err)
        return WAITS;
    req->pending--;
    return -err;
}

/* The log does not have what its map says. Only of what is committed the store has it, and what else is committed of
 * the block. As at retirement: older answers must not land, and what is known of the base is older than the log was. */
static int lost_in_log(struct read_op *x, uint64_t seq, int err)
{
    struct volume *v = x->req->volume;

    event_post(v->engine, v->cookie, GLIDE_EV_READ_LOST, seq, (uint64_t)-err);
    if (seq > v->committed_seq)
        return EIO;
    atomic_fetch_add(&v->stamp, 1);
    v->lent = NULL; /* an older answer, too */
    v->forgotten_seq = v->committed_seq;
    if (log_map_forget_block(&v->map, x->block, v->committed_seq))
        return EIO;
    block_map_drop(&v->base, x->block, 1);
    return ask_store(x);
}

static int lost_in_cache(struct read_op *x, int err)
{
    struct volume *v = x->req->volume;

    cache_lost(&v->engine->cache, x->slot, x->generation, err);
    block_map_drop_slot(&v->base, x->block);
    return ask_store(x);
}

/* ---- reading files ------------------------------------------------------------------------------ */

static void unpin(struct volume *v, struct log_segment *segment, uint32_t slot)
{
    if (segment)
        segment->pins--;
    else
        cache_unpin(&v->engine->cache, slot);
}

static void submit_read(struct read_op *x)
{
    struct volume *v = x->req->volume;
    struct io_uring_sqe *sqe = worker_sqe(v->worker, &x->op);
    uint8_t *to = (x->bounce ? x->bounce : x->buf) + x->got;

    io_uring_prep_read(sqe, x->segment ? x->segment->file.fd : v->engine->cache.fd, to, (unsigned)(x->total - x->got),
                       x->offset + x->got);
    io_uring_sqe_set_data(sqe, &x->op);
}

static bool is_good(struct read_op *x)
{
    const uint8_t *data = x->bounce ? x->bounce : x->buf;

    if (x->segment)
        return sums_check(&x->segment->sums, x->index, x->end, data);
    return cache_check(&x->req->volume->engine->cache, x->slot, x->index, x->end, data);
}

static int read_later(const struct read_op *x);

/* All was read, or cannot be (err, -EIO for a file that is too short). Gives pin and bounce up, or begins once more.
 * 0, WAITS or a positive errno. */
static int finish_read(struct read_op *x, int err)
{
    struct volume *v = x->req->volume;
    if (!err)
        err = disk_injected(x->segment ? DISK_READ : DISK_CACHE_READ);
    bool good = !err && is_good(x);

    if (!good && x->req->flags & IO_SHARED && !x->bounce) { /* once more, where nobody else can write */
        x->bounce = malloc(x->total);
        x->got = 0;
        if (x->bounce)
            return read_later(x);
        unpin(v, x->segment, x->slot);
        return ENOMEM;
    }
    if (!good && x->segment && x->segment->seq > v->committed_seq && ++x->tries < DISK_TRIES) {
        x->got = 0;
        return read_later(x);
    }
    if (good && x->bounce)
        memcpy(x->buf, x->bounce + x->skip, x->length);
    free(x->bounce);
    uint64_t seq = x->segment ? x->segment->seq : 0;
    unpin(v, x->segment, x->slot);
    if (good)
        return 0;
    return seq ? lost_in_log(x, seq, err) : lost_in_cache(x, err);
}

static void on_read(struct ring_op *op, int res, uint32_t flags)
{
    struct read_op *x = container_of(op, struct read_op, op);
    struct io_req *req = x->req;
    struct volume *v = req->volume;

    (void)flags;
    x->got += res > 0 ? (uint64_t)res : 0;
    if (res == -EINTR || res == -EAGAIN || (res > 0 && x->got < x->total)) {
        submit_read(x);
        return;
    }
    int err = finish_read(x, res < 0 ? res : res == 0 ? -EIO : 0);
    free(x);
    io_piece_done(req, err == WAITS ? 0 : err);
    volume_read_done(v);
}

/* Read through the ring; adds to req->pending. Takes over what x has. */
static int read_later(const struct read_op *x)
{
    struct volume *v = x->req->volume;
    struct read_op *later = malloc(sizeof(*later));

    if (!later) {
        free(x->bounce);
        unpin(v, x->segment, x->slot);
        return ENOMEM;
    }
    *later = *x;
    later->op = (struct ring_op){on_read};
    x->req->pending++;
    v->reading++;
    submit_read(later);
    return 0;
}

/* Takes the pin over. Adds to req->pending if it must wait. */
static int read_file(struct read_op *x)
{
    struct volume *v = x->req->volume;
    int fd = x->segment ? x->segment->file.fd : v->engine->cache.fd;

    if (x->total != x->length && !(x->bounce = malloc(x->total))) {
        unpin(v, x->segment, x->slot);
        return ENOMEM;
    }
    struct iovec iov = {x->bounce ? x->bounce : x->buf, x->total};
    ssize_t n = preadv2(fd, &iov, 1, (off_t)x->offset, RWF_NOWAIT);
    if (n < 0 && (errno == EOPNOTSUPP || errno == EINVAL)) /* a file system without it, as tmpfs: memory speed */
        n = pread(fd, iov.iov_base, x->total, (off_t)x->offset);
    if (n == (ssize_t)x->total || (n < 0 && errno != EAGAIN && errno != EINTR))
        return finish_read(x, n < 0 ? -errno : 0);
    x->got = n > 0 ? (uint64_t)n : 0;
    return read_later(x);
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
        p->req->volume->filter->ops->note(p->req, p->block * BLOCK_SECTORS + s, source_of(p, s), base);
}

/* Bytes [at, end) of the block are at index `pos` of a segment. */
static int read_log(const struct piece *p, uint32_t at, uint32_t end, uint64_t pos, uint8_t *buf)
{
    struct volume *v = p->req->volume;
    struct log_segment *s = log_find(&v->log, pos_seq(pos));
    struct read_op x = {.req = p->req, .block = p->block, .segment = s, .buf = buf, .length = end - at};

    if (!s) /* the map names a segment that is gone: never guess */
        return lost_in_log(&x, pos_seq(pos), -ENOENT);
    uint32_t first = x.index = pos_index(pos);
    x.end = first + (uint32_t)div_up(end, SECTOR) - at / SECTOR;
    sums_extend(&s->sums, &x.index, &x.end);
    x.offset = segment_data_offset(s->sectors, x.index);
    x.total = (uint64_t)(x.end - x.index) * SECTOR;
    x.skip = (first - x.index) * SECTOR + at % SECTOR;
    s->pins++;
    return read_file(&x);
}

static int read_slot(const struct piece *p, uint32_t at, uint32_t end, const struct base_view *base, uint8_t *buf)
{
    struct block_cache *c = &p->req->volume->engine->cache;
    struct read_op x = {.req = p->req,
                        .block = p->block,
                        .slot = base->slot,
                        .generation = base->generation,
                        .index = at / SECTOR,
                        .end = (uint32_t)div_up(end, SECTOR),
                        .buf = buf,
                        .length = end - at,
                        .skip = at % SECTOR};

    x.offset = cache_offset(base->slot) + (uint64_t)x.index * SECTOR;
    x.total = (uint64_t)(x.end - x.index) * SECTOR;
    cache_pin_again(c, base->slot); /* the piece holds a pin */
    return read_file(&x);
}

/* Bytes [at, end) of the block are zeros, or not, which a piece that is done again may find otherwise. */
static void mark_hole(const struct piece *p, uint32_t at, uint32_t end, bool zero)
{
    uint64_t first = p->block * BLOCK_SECTORS - p->req->offset / SECTOR;

    for (uint64_t s = first + at / SECTOR; s < first + div_up(end, SECTOR); s++) {
        uint64_t mask = 1ull << s % 64, *word = &p->req->holes[s / 64];
        *word = zero ? *word | mask : *word & ~mask;
    }
}

static int read_run(const struct piece *p, uint32_t at, uint32_t end, uint64_t source, const struct base_view *base)
{
    uint8_t *buf = p->buf + (at - p->from);
    bool zero = (source & POS_ZERO) || (!source && base->kind == BASE_ZERO);

    if (p->req->filtered)
        note_sources(p, at, end, base);
    if (p->req->holes)
        mark_hole(p, at, end, zero);
    if (zero) {
        if (!p->req->holes || p->req->filtered)
            memset(buf, 0, end - at);
        return 0;
    }
    if (source)
        return read_log(p, at, end, source, buf);
    if (base->kind == BASE_LENT) {
        memcpy(buf, p->req->volume->lent + at, end - at);
        return 0;
    }
    return read_slot(p, at, end, base, buf);
}

/* What the base of the block is, pinned if it is a slot; drops an entry whose slot was reused. */
static struct base_view pin_base(struct volume *v, uint64_t block)
{
    if (v->lent && v->lent_block == block)
        return (struct base_view){BASE_LENT, 0, 0};
    struct base_view base = block_map_find(&v->base, block);
    if (base.kind != BASE_SLOT || cache_pin(&v->engine->cache, base.slot, base.generation))
        return base;
    block_map_drop_slot(&v->base, block);
    return block_map_find(&v->base, block);
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
        err = read_run(&p, at, run, source, &base); /* if it WAITS, what p points to may be gone */
        at = run;
    }
    err = err == WAITS ? 0 : err;
    if (base.kind == BASE_UNKNOWN && req->flags & IO_HERE) {
        err = ENODATA;
    } else if (base.kind == BASE_UNKNOWN) {
        err = -fault_wait(v, block, req);
        if (!err)
            return; /* its part of req->pending goes with the waiter */
    } else if (!(req->flags & IO_HERE)) {
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
