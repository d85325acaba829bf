/*
 * Requests that do not cover whole sectors.
 *
 * An unaligned WRITE needs the rest of its first and last sector. It leaves the
 * batch, reads them, comes back to the head of the batch, and its merged sectors
 * are appended - if the map then still says of these sectors what it said when
 * they were read (same log position; for the base, the same stamp, which every
 * change of the base bumps). Else it reads again. Check and append are one step
 * on the worker, so two of them never lose each other's bytes, and nothing is
 * locked while one waits for the store.
 */
#include "volume/io.h"
#include "volume/volume.h"

#include <stdlib.h>
#include <string.h>

/* A request that serves another one. */
struct part {
    struct io_req req;
    void *owner;
};

/* ---- ZERO: a small write, an aligned ZERO, a small write ---------------------------------------- */

struct zero_split {
    struct part parts[3];
    struct io_req *parent;
    uint32_t left;
    int err;
};

static uint8_t zeroes[SECTOR]; /* never written */

static void zero_split_done(struct zero_split *z, int err)
{
    if (err)
        z->err = err;
    if (--z->left)
        return;
    io_finish(z->parent, z->err);
    free(z);
}

static void zero_part_done(struct io_req *req, int err)
{
    zero_split_done(container_of(req, struct part, req)->owner, err);
}

int io_zero_split(struct io_req *req)
{
    uint64_t end = req->offset + req->length;
    uint64_t first = min_u64(div_up(req->offset, SECTOR) * SECTOR, end);
    uint64_t cut[4] = {req->offset, first, max_u64(end / SECTOR * SECTOR, first), end};
    struct zero_split *z = calloc(1, sizeof(*z));

    if (!z)
        return -ENOMEM;
    z->parent = req;
    z->left = 1; /* ours, until all are submitted */
    for (int i = 0; i < 3; i++) {
        if (cut[i + 1] == cut[i])
            continue;
        z->left++;
        z->parts[i] = (struct part){.owner = z,
                                    .req = {.volume = req->volume,
                                            .tag = req->tag,
                                            .buf = zeroes,
                                            .offset = cut[i],
                                            .length = cut[i + 1] - cut[i],
                                            .op = i == 1 ? GLIDE_ZERO : GLIDE_WRITE,
                                            .flags = req->flags | IO_INTERNAL,
                                            .done = zero_part_done}};
        io_submit(&z->parts[i].req);
    }
    zero_split_done(z, 0);
    return 0;
}

/* ---- WRITE ------------------------------------------------------------------------------------------ */

struct rmw {
    struct part reads[2]; /* first and last sector, or only one */
    struct io_req *write;
    uint64_t sector[2];
    uint64_t seen[2]; /* log_map_find of them when they were read */
    uint64_t stamp;
    uint32_t count; /* of reads */
    uint32_t left;
    int err;
    bool ready;
    uint8_t merged[]; /* all sectors that the write touches */
};

static struct rmw *rmw_new(struct io_req *req)
{
    uint64_t first = req->offset / SECTOR, last = (req->offset + req->length - 1) / SECTOR;
    struct rmw *r = malloc(sizeof(*r) + (last - first + 1) * SECTOR);

    if (!r)
        return NULL;
    r->write = req;
    r->sector[0] = first;
    r->sector[1] = last;
    r->count = first == last ? 1 : 2;
    r->ready = false;
    stat_add(&req->volume->stats.rmw, 1);
    return r;
}

static void rmw_done(struct rmw *r, int err)
{
    struct io_req *req = r->write;

    if (err)
        r->err = err;
    if (--r->left)
        return;
    if (r->err) {
        io_finish(req, r->err);
        return;
    }
    r->ready = true;
    req->progress = 0;
    memcpy(r->merged + req->offset % SECTOR, req->buf, req->length);
    list_prepend(&req->volume->batch, &req->link);
    volume_want_flush(req->volume);
}

static void rmw_read_done(struct io_req *read, int err) { rmw_done(container_of(read, struct part, req)->owner, err); }

static void rmw_read(struct rmw *r)
{
    struct volume *v = r->write->volume;

    r->stamp = atomic_load(&v->stamp);
    r->err = 0;
    r->ready = false;
    r->left = r->count + 1; /* one is ours, until all are submitted */
    for (uint32_t i = 0; i < r->count; i++) {
        r->seen[i] = log_map_find(&v->map, r->sector[i]);
        r->reads[i] = (struct part){.owner = r,
                                    .req = {.volume = v,
                                            .tag = r->write->tag,
                                            .buf = r->merged + (r->sector[i] - r->sector[0]) * SECTOR,
                                            .offset = r->sector[i] * SECTOR,
                                            .length = SECTOR,
                                            .op = GLIDE_READ,
                                            .flags = IO_INTERNAL,
                                            .done = rmw_read_done}};
    }
    for (uint32_t i = 0; i < r->count; i++)
        io_submit(&r->reads[i].req);
    rmw_done(r, 0);
}

/* Is what was read still the newest? Sectors that this write has appended itself do not count. */
static bool still_newest(const struct rmw *r)
{
    const struct volume *v = r->write->volume;
    uint64_t appended = r->sector[0] + r->write->progress / SECTOR;

    for (uint32_t i = 0; i < r->count; i++) {
        if (r->sector[i] < appended)
            continue;
        uint64_t pos = log_map_find(&v->map, r->sector[i]);
        if (pos != r->seen[i] || (!pos && r->stamp != atomic_load(&v->stamp)))
            return false;
    }
    return true;
}

bool io_merge(struct io_req *req)
{
    if (!req->rmw && !io_own(req))
        return false;
    if (!req->rmw && !(req->rmw = rmw_new(req))) {
        list_remove(&req->link);
        io_finish(req, ENOMEM);
        return false;
    }
    if (req->rmw->ready && still_newest(req->rmw))
        return true;
    list_remove(&req->link);
    rmw_read(req->rmw);
    return false;
}

const uint8_t *io_merged(const struct io_req *req) { return req->rmw->merged; }

void io_merge_free(struct io_req *req)
{
    free(req->rmw);
    req->rmw = NULL;
}
