/*
 * Which parts of a range are zeros, answered without reading any of it.
 *
 * The newest of a sector is in the log, else in the base (io_read.c), and so is the answer: by sectors where the log
 * has some of a block, by blocks elsewhere. Where the base is not known, Python is asked, and the request waits as a
 * READ does. But once an answer has reached the end of a chunk it goes out, for fewer bytes than were asked for.
 *
 * The work grows with what is found: runs of the base, extents of zeros, and runs within at most LEAVES blocks that
 * the log has parts of. Where nothing is found there is one look for each 64 blocks.
 */
#include "volume/changed.h"
#include "volume/fault.h"
#include "volume/io.h"
#include "volume/volume.h"

#define CHUNK_BYTES ((uint64_t)GLIDE_GROUP * GLIDE_BLOCK)
#define LEAVES 4096
#define CHUNKS_AHEAD 8 /* that Python is asked of at once */

struct run {
    uint64_t end; /* bytes */
    enum zero_state state;
};

static enum zero_state sector_state(const struct log_view *view, uint32_t sector, enum zero_state base)
{
    uint64_t pos = view->pos[sector];

    if (pos)
        return pos & POS_ZERO ? ZERO_IS : ZERO_NOT;
    return view->zero ? ZERO_IS : base;
}

/* In a block that the log has some sectors of. */
static struct run leaf_run(const struct volume *v, const struct log_view *view, uint64_t at)
{
    uint64_t block = at / GLIDE_BLOCK, ignored;
    uint32_t s = (uint32_t)(at % GLIDE_BLOCK / SECTOR);
    enum zero_state base = block_map_run(&v->base, block, block + 1, &ignored);
    enum zero_state state = sector_state(view, s, base);

    for (s++; s < BLOCK_SECTORS && sector_state(view, s, base) == state; s++)
        ;
    return (struct run){block * GLIDE_BLOCK + (uint64_t)s * SECTOR, state};
}

static struct run next_run(const struct volume *v, uint64_t at, uint64_t end, uint32_t *leaves)
{
    uint64_t block = at / GLIDE_BLOCK, stop = div_up(end, GLIDE_BLOCK);
    struct log_view view = log_map_view(&v->map, block);
    enum zero_state state = ZERO_IS;
    struct zero_extent zeros;

    if (view.pos) {
        --*leaves;
        return leaf_run(v, &view, at);
    }
    bool more = zero_map_next(&v->map.zeros, block, &zeros);
    if (more && zeros.start <= block)
        stop = min_u64(stop, zeros.end);
    else
        state = block_map_run(&v->base, block, more ? min_u64(stop, zeros.start) : stop, &stop);
    return (struct run){log_map_next_leaf(&v->map, block + 1, stop) * GLIDE_BLOCK, state};
}

bool io_add_extent(struct io_extents *out, uint64_t length, bool is)
{
    struct io_extent *last = out->count ? &out->list[out->count - 1] : NULL;

    if (last && (last->is != 0) == is) {
        last->length += length;
        return true;
    }
    if (out->count == out->max)
        return false;
    out->list[out->count++] = (struct io_extent){length, is};
    return true;
}

void io_status(struct io_req *req)
{
    struct volume *v = req->volume;
    struct io_extents *out = (struct io_extents *)(void *)req->buf;
    uint64_t at = req->offset, end = at + min_u64(req->length, IO_STATUS_BYTES);
    uint32_t leaves = LEAVES;
    bool known = !v->failed;

    if (req->changed) {
        changed_status(req);
        return;
    }
    out->count = 0;
    while (known && at < end && leaves) {
        struct run run = next_run(v, at, end, &leaves);
        uint64_t stop = min_u64(run.end, end);
        known = run.state != ZERO_UNKNOWN;
        if (!known || !io_add_extent(out, stop - at, run.state == ZERO_IS))
            break;
        at = stop;
    }
    uint64_t chunk = at / CHUNK_BYTES, last = (end - 1) / CHUNK_BYTES;
    if (known || v->failed || chunk > req->offset / CHUNK_BYTES) {
        io_finish(req, v->failed);
        return;
    }
    req->pending = 1; /* for who fails it while it waits */
    int err = fault_wait_holes(v, chunk, (uint32_t)min_u64(last - chunk + 1, CHUNKS_AHEAD), req);
    if (err)
        io_finish(req, -err);
}
