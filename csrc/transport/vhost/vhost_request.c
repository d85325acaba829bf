/*
 * Requests of virtio-blk (virtio 1.2, section 5.2.6).
 *
 * Data of a READ that is one piece goes straight into the guest's memory (IO_SHARED: the guest may change it, so what
 * is not as it should be there says nothing about a disk). One of many pieces is read at once and then copied: a call
 * of the kernel for each piece costs more. A WRITE is copied first: its hash, its record and its data must be of the
 * same bytes.
 *
 * A request that was begun is in flight until it is answered: in the ring, in the record, and here. While its volume is
 * frozen it is not answered, because another process may do so by then.
 */
#include "transport/vhost/vhost.h"

#include <endian.h>
#include <linux/virtio_blk.h>
#include <stdlib.h>
#include <string.h>

#define HEADER_BYTES 16u
#define RANGE_BYTES 16u

struct vhost_part {
    struct io_req io;
    struct vhost_req *owner;
};

struct header {
    uint32_t type, reserved;
    uint64_t sector; /* of 512 bytes */
};

/* ---- memory ------------------------------------------------------------------------------------ */

static struct vhost_req *req_new(struct vhost_device *d)
{
    struct list *unused = list_pop(&d->unused);

    if (unused)
        return container_of(unused, struct vhost_req, link);
    struct vhost_req *r = calloc(1, sizeof(*r));
    if (r)
        list_init(&r->link);
    return r;
}

static bool need_buf(struct vhost_req *r, uint64_t length)
{
    if (r->size < length) {
        free(r->buf);
        r->buf = malloc(length);
        r->size = r->buf ? length : 0;
    }
    return r->buf != NULL;
}

/* A device that holds nothing gets what it asks for. */
static bool fits(const struct vhost_device *d, uint64_t bytes)
{
    return !d->charged || d->charged + bytes <= VHOST_MEMORY;
}

void vhost_free_unused(struct vhost_device *d)
{
    for (struct list *e; (e = list_pop(&d->unused));) {
        struct vhost_req *r = container_of(e, struct vhost_req, link);
        free(r->buf);
        free(r);
    }
}

static void release(struct vhost_req *r)
{
    struct vhost_ring *ring = r->ring;
    struct vhost_device *d = ring->device;

    ring->busy[r->head] = NULL;
    ring->count--;
    d->inflight--;
    d->charged -= r->charged;
    vhost_memory_drop(d, r->memory);
    free(r->pieces);
    free(r->parts);
    r->pieces = NULL;
    r->parts = NULL;
    if (r->size > VHOST_KEPT_BUFFER) {
        free(r->buf);
        r->buf = NULL;
        r->size = 0;
    }
    list_append(&d->unused, &r->link);
    if (d->starved)
        vhost_serve_later(d);
    vhost_end_later(d);
}

/* ---- the end of a request ------------------------------------------------------------------------ */

static uint8_t status_of(int err)
{
    if (!err)
        return VIRTIO_BLK_S_OK;
    return err == ENOTSUP ? VIRTIO_BLK_S_UNSUPP : VIRTIO_BLK_S_IOERR;
}

static void answer(struct vhost_req *r, int err)
{
    if (!err && r->pieces)
        vhost_scatter(r->pieces, r->buf, r->io.length);
    *(volatile uint8_t *)r->status = status_of(err);
    vhost_ring_push(r->ring, r->head, err ? 1 : r->written);
    release(r);
}

static void complete(struct vhost_req *r, int err)
{
    struct vhost_device *d = r->ring->device;

    if (d->volume->frozen && !d->ended) {
        r->err = err;
        list_append(&d->held, &r->link);
    } else if (atomic_load(&d->broken) || (d->ended && (err || d->volume->frozen))) {
        release(r); /* it stays in flight: whoever serves next carries it out */
    } else {
        answer(r, err);
    }
}

void vhost_answer_held(struct vhost_device *d)
{
    for (struct list *e; (e = list_pop(&d->held));) {
        struct vhost_req *r = container_of(e, struct vhost_req, link);
        complete(r, r->err);
    }
}

void vhost_drop_held(struct vhost_device *d)
{
    for (struct list *e; (e = list_pop(&d->held));)
        release(container_of(e, struct vhost_req, link));
}

void vhost_note_logged(struct vhost_device *d)
{
    for (uint32_t i = 0; i < GLIDE_VHOST_QUEUES; i++) {
        struct vhost_ring *r = &d->rings[i];
        for (uint32_t head = 0; r->count && head < r->num; head++)
            if (r->busy[head] && io_logged(&r->busy[head]->io))
                r->record->entries[head].logged = 1;
    }
}

static void on_done(struct io_req *io, int err) { complete(container_of(io, struct vhost_req, io), err); }

static void part_done(struct vhost_req *r, int err)
{
    if (err)
        r->err = err;
    if (!--r->left)
        complete(r, r->err);
}

static void on_part_done(struct io_req *io, int err) { part_done(container_of(io, struct vhost_part, io)->owner, err); }

/* ---- its begin ----------------------------------------------------------------------------------- */

static bool writes(uint32_t type)
{
    return type == VIRTIO_BLK_T_OUT || type == VIRTIO_BLK_T_DISCARD || type == VIRTIO_BLK_T_WRITE_ZEROES;
}

/* A range of sectors within the volume. */
static int check_range(const struct vhost_device *d, uint64_t sector, uint64_t bytes)
{
    uint64_t size = atomic_load_explicit(&d->volume->size, memory_order_relaxed);

    if (bytes % 512)
        return EINVAL;
    return sector > size / 512 || bytes > size - sector * 512 ? ERANGE : 0;
}

/* One DISCARD or WRITE_ZEROES names up to 16 ranges. 0 or a positive errno; the ranges are checked. */
static int read_ranges(struct vhost_req *r, const struct vhost_chain *c, const struct header *h)
{
    struct vhost_device *d = r->ring->device;
    struct virtio_blk_discard_write_zeroes ranges[GLIDE_VHOST_ZERO_RANGES];
    uint64_t bytes = c->out_bytes - HEADER_BYTES;
    uint32_t count = (uint32_t)(bytes / RANGE_BYTES);
    uint32_t allowed = h->type == VIRTIO_BLK_T_WRITE_ZEROES ? VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP : 0;

    if (!bytes || bytes % RANGE_BYTES || bytes > sizeof(ranges))
        return EINVAL;
    vhost_gather(c->pieces, HEADER_BYTES, ranges, bytes);
    for (uint32_t i = 0; i < count; i++) {
        uint32_t sectors = le32toh(ranges[i].num_sectors);
        if (le32toh(ranges[i].flags) & ~allowed)
            return ENOTSUP;
        if (sectors > GLIDE_VHOST_ZERO_SECTORS)
            return EINVAL;
        int err = check_range(d, le64toh(ranges[i].sector), (uint64_t)sectors * 512);
        if (err)
            return err;
    }
    r->parts = calloc(count, sizeof(*r->parts));
    if (!r->parts)
        return ENOMEM;
    for (r->left = 0; r->left < count; r->left++) {
        struct vhost_part *p = &r->parts[r->left];
        p->owner = r;
        p->io = (struct io_req){.volume = d->volume,
                                .tag = d,
                                .op = GLIDE_ZERO,
                                .flags = d->writeback ? 0 : GLIDE_FUA,
                                .offset = le64toh(ranges[r->left].sector) * 512,
                                .length = (uint64_t)le32toh(ranges[r->left].num_sectors) * 512,
                                .done = on_part_done};
    }
    return 0;
}

/* A filter compares what was read, so nobody else may write there. */
static bool is_direct(const struct vhost_device *d, const struct vhost_chain *c)
{
    return !d->volume->filter && c->pieces[c->out_count].iov_len >= c->in_bytes - 1;
}

/* Data that it holds in memory of ours. */
static uint64_t own_bytes(const struct vhost_device *d, const struct vhost_chain *c, const struct header *h)
{
    uint64_t data = h->type == VIRTIO_BLK_T_OUT                      ? c->out_bytes - HEADER_BYTES
                    : h->type == VIRTIO_BLK_T_IN && !is_direct(d, c) ? c->in_bytes - 1
                                                                     : 0;
    return data <= VHOST_MAX_LENGTH ? data : 0;
}

static int prepare_read(struct vhost_req *r, const struct vhost_chain *c)
{
    uint32_t count = c->count - c->out_count;

    r->written = (uint32_t)c->in_bytes;
    if (is_direct(r->ring->device, c)) {
        r->io.buf = c->pieces[c->out_count].iov_base;
        r->io.flags |= IO_SHARED;
        return 0;
    }
    r->pieces = malloc(count * sizeof(*r->pieces));
    if (!r->pieces || !need_buf(r, r->io.length))
        return ENOMEM;
    memcpy(r->pieces, &c->pieces[c->out_count], count * sizeof(*r->pieces));
    r->io.buf = r->buf;
    return 0;
}

static int prepare_data(struct vhost_req *r, const struct vhost_chain *c, const struct header *h)
{
    struct vhost_device *d = r->ring->device;
    bool out = h->type == VIRTIO_BLK_T_OUT;
    uint64_t length = out ? c->out_bytes - HEADER_BYTES : c->in_bytes - 1;

    if (length > VHOST_MAX_LENGTH)
        return EINVAL;
    int err = check_range(d, h->sector, length);
    if (err)
        return err;
    r->io.op = out ? GLIDE_WRITE : GLIDE_READ;
    r->io.offset = h->sector * 512;
    r->io.length = length;
    if (!out)
        return prepare_read(r, c);
    if (!need_buf(r, length ? length : 1))
        return ENOMEM;
    vhost_gather(c->pieces, HEADER_BYTES, r->buf, length);
    r->io.buf = r->buf;
    r->io.flags |= d->writeback ? 0 : GLIDE_FUA;
    return 0;
}

static void answer_id(struct vhost_req *r, const struct vhost_chain *c)
{
    uint64_t length = min_u64(c->in_bytes - 1, GLIDE_VHOST_ID_BYTES);

    vhost_scatter(&c->pieces[c->out_count], r->ring->device->config.serial, length);
    r->written = (uint32_t)length + 1;
    complete(r, 0);
}

/* What of the request is wrong: 0 or a positive errno. `again`: its data is in the log. */
static int prepare(struct vhost_req *r, const struct vhost_chain *c, const struct header *h, bool logged)
{
    struct vhost_device *d = r->ring->device;

    r->io = (struct io_req){.volume = d->volume, .tag = d, .op = GLIDE_FLUSH, .done = on_done};
    if (writes(h->type) && d->config.read_only)
        return EPERM;
    if (logged || h->type == VIRTIO_BLK_T_FLUSH || h->type == VIRTIO_BLK_T_GET_ID)
        return 0;
    if (h->type == VIRTIO_BLK_T_IN || h->type == VIRTIO_BLK_T_OUT)
        return prepare_data(r, c, h);
    return writes(h->type) ? read_ranges(r, c, h) : ENOTSUP;
}

static void submit(struct vhost_req *r)
{
    uint32_t count = r->left;

    if (!r->parts) {
        io_submit(&r->io);
        return;
    }
    r->left++; /* ours, until all are submitted */
    for (uint32_t i = 0; i < count; i++)
        io_submit(&r->parts[i].io);
    part_done(r, 0);
}

int vhost_begin(struct vhost_ring *ring, uint16_t head)
{
    struct vhost_device *d = ring->device;
    struct vhost_chain *c = &d->chain;
    struct header h;
    int err = vhost_chain_read(ring, head, c);

    if (err)
        return err;
    if (c->out_bytes < HEADER_BYTES || !c->in_bytes)
        return vhost_broken(d, "queue %u: a request without a header or without a place for its status", ring->index);
    vhost_gather(c->pieces, 0, &h, HEADER_BYTES);
    h.type = le32toh(h.type);
    h.sector = le64toh(h.sector);
    uint64_t bytes = own_bytes(d, c, &h);
    struct vhost_req *r = fits(d, bytes) ? req_new(d) : NULL;
    if (!r) {
        d->starved = true;
        return d->inflight ? -EAGAIN : vhost_broken(d, "there is no memory for its requests");
    }
    r->ring = ring;
    r->head = head;
    r->memory = d->memory;
    r->memory->refs++;
    r->charged = bytes;
    r->written = 1;
    r->err = 0;
    r->left = 0;
    struct iovec *last = &c->pieces[c->count - 1];
    r->status = (uint8_t *)last->iov_base + last->iov_len - 1;
    d->charged += bytes;
    d->inflight++;
    bool logged = vhost_ring_take(ring, head, r);
    err = prepare(r, c, &h, logged);
    if (err)
        complete(r, err);
    else if (h.type == VIRTIO_BLK_T_GET_ID && !logged)
        answer_id(r, c);
    else
        submit(r);
    return 0;
}
