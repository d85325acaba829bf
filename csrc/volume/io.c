/*
 * Requests of a volume: checks, the batch of writes, the end of a request.
 * Reading is in io_read.c, unaligned writes in io_unaligned.c, durability in
 * sync.c.
 *
 * WRITEs and ZEROs wait in volume->batch in arrival order until io_flush
 * appends them together. When there is no space the head stays and everything
 * behind it waits too (`blocked`): by then each owns its data.
 */
#include "volume/io.h"

#include "volume/fault.h"
#include "volume/volume.h"

#include <string.h>

#define ZERO_MAX_SECTORS 0x80000000u /* of one record */

/* ---- begin and end --------------------------------------------------------------------------- */

void io_finish(struct io_req *req, int err)
{
    struct volume *v = req->volume;

    if (req->filtered && v->filter->ops->holds(req, err))
        return;
    io_merge_free(req);
    if (!(req->flags & IO_INTERNAL))
        stats_done(&v->stats, req->op, req->length, err, elapsed_ns(now_ns(), req->start_ns));
    req->done(req, err);
    volume_request_done(v);
}

static int check(const struct volume *v, const struct io_req *req)
{
    uint64_t size = atomic_load_explicit(&v->size, memory_order_relaxed);

    if (v->failed || v->closing)
        return v->failed ? v->failed : ESHUTDOWN;
    if (req->op == GLIDE_FLUSH)
        return 0;
    bool reads = req->op == GLIDE_READ || req->op == IO_STATUS;
    if (!reads && v->read_only)
        return EPERM;
    if ((req->offset | req->length) % 512)
        return EINVAL;
    if (req->offset > size || req->length > size - req->offset)
        return reads ? EINVAL : ENOSPC;
    return 0;
}

void io_submit(struct io_req *req)
{
    struct volume *v = req->volume;
    int err = check(v, req);

    list_init(&req->link);
    req->start_ns = now_ns();
    req->progress = req->need_seq = 0;
    req->pending = 0;
    req->err = 0;
    req->owned = false;
    req->rmw = NULL;
    req->filtered = NULL;
    v->inflight++;
    if (err || (req->length == 0 && req->op != GLIDE_FLUSH)) {
        io_finish(req, err);
    } else if (req->op == GLIDE_READ) {
        if (v->filter)
            v->filter->ops->begin(req);
        io_read(req);
    } else if (req->op == IO_STATUS) {
        io_status(req);
    } else if (req->op == GLIDE_FLUSH) {
        sync_join(req);
    } else if (req->op == GLIDE_ZERO && io_unaligned(req)) {
        if (io_zero_split(req))
            io_finish(req, ENOMEM);
    } else {
        list_append(&v->batch, &req->link);
        volume_want_flush(v);
    }
}

bool io_own(struct io_req *req)
{
    if (req->owned || !req->own || req->op != GLIDE_WRITE)
        return true;
    req->owned = true;
    int err = req->own(req);
    if (err) {
        list_remove(&req->link);
        io_finish(req, -err);
    }
    return err == 0;
}

/* ---- the batch ------------------------------------------------------------------------------------ */

static uint64_t sectors_of(const struct io_req *req)
{
    return div_up(req->offset + req->length, SECTOR) - req->offset / SECTOR;
}

/* The next record for a request, with up to `room` sectors of index space. Returns the space it takes. */
static uint32_t next_piece(const struct io_req *req, uint32_t room, struct append_piece *p)
{
    uint64_t done = req->progress / SECTOR, left = sectors_of(req) - done;

    p->sector = req->offset / SECTOR + done;
    if (req->op == GLIDE_ZERO) {
        p->op = RECORD_ZERO;
        p->count = (uint32_t)min_u64(left, ZERO_MAX_SECTORS);
        return room ? 1 : 0;
    }
    p->op = RECORD_WRITE;
    p->count = (uint32_t)min_u64(left, room);
    p->data = (req->rmw ? io_merged(req) : req->buf) + req->progress;
    return p->count;
}

/* Pieces from the head of the batch that fit together. An unaligned write goes alone: what it merged must
 * still be the newest when its record is mapped. */
static uint32_t take(struct volume *v, struct append_piece *pieces, uint32_t *sectors)
{
    uint32_t room = (uint32_t)min_u64(log_room(&v->log), APPEND_MAX_SECTORS), count = 0;

    *sectors = 0;
    list_each(at, &v->batch) {
        struct io_req *req = container_of(at, struct io_req, link);
        bool alone = req->op == GLIDE_WRITE && io_unaligned(req);
        if (count == APPEND_MAX_PIECES || (alone && count))
            break;
        uint32_t space = next_piece(req, room - *sectors, &pieces[count]);
        if (!space)
            break;
        *sectors += space;
        count++;
        if (alone || pieces[count - 1].count < sectors_of(req) - req->progress / SECTOR)
            break;
    }
    return count;
}

static int map_piece(struct volume *v, const struct append_piece *p)
{
    return p->op == RECORD_ZERO ? log_map_zero(&v->map, p->sector, p->count, p->pos)
                                : log_map_write(&v->map, p->sector, p->count, p->pos);
}

/* Appended: map and acknowledge. */
static void settle(struct volume *v, const struct append_piece *pieces, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++) {
        struct io_req *req = container_of(v->batch.next, struct io_req, link);
        int err = map_piece(v, &pieces[i]);
        if (v->filter)
            v->filter->ops->applied(v, req, &pieces[i]);
        req->progress += (uint64_t)pieces[i].count * SECTOR;
        if (err) { /* in the log but not in the map: what this process knows is no longer true */
            v->failed = EIO;
            event_post(v->engine, v->cookie, GLIDE_EV_DISK_ERROR, ENOMEM, 0);
        }
        if (!err && req->progress / SECTOR < sectors_of(req))
            continue;
        list_remove(&req->link);
        if (!err && (req->flags & GLIDE_FUA))
            sync_join(req);
        else
            io_finish(req, err ? EIO : 0);
    }
    volume_count_memory(v);
}

/* ---- waiting for space ------------------------------------------------------------------------------- */

static void block_writers(struct volume *v, uint32_t event, uint64_t detail)
{
    if (!v->blocked)
        stat_add(event == GLIDE_EV_MAP_FULL ? &v->stats.map_full_waits : &v->stats.log_full_waits, 1);
    if (!v->blocked || elapsed_ns(now_ns(), v->blocked_event_ns) > 1000000000u) {
        v->blocked_event_ns = now_ns();
        event_post(v->engine, v->cookie, event, detail, 0);
        if (event != GLIDE_EV_MAP_FULL)
            engine_space_wanted(v->engine);
    }
    v->blocked = true;
    worker_want_tick(v->worker);
}

static bool map_may_grow(const struct volume *v)
{
    /* A volume may always have a few leaves: else one that others starve could never write. */
    return log_map_bytes(&v->map) < 65536 || engine_map_bytes(v->engine) < v->engine->config.map_budget;
}

/* Append from the head of the batch. False: it must wait. */
static bool append_some(struct volume *v)
{
    struct append_piece pieces[APPEND_MAX_PIECES];
    uint32_t sectors;
    uint64_t sealed = log_sealed_seq(&v->log);
    int err = log_need_room(&v->log);

    if (log_sealed_seq(&v->log) != sealed)
        event_post(v->engine, v->cookie, GLIDE_EV_SEALED, log_sealed_seq(&v->log), 0);
    uint32_t count = err ? 0 : take(v, pieces, &sectors);
    if (!err && !log_may_grow(&v->log, sectors)) {
        block_writers(v, GLIDE_EV_LOG_FULL, v->log.no_room ? ENOSPC : 0);
        return false;
    }
    if (!err && !map_may_grow(v)) {
        block_writers(v, GLIDE_EV_MAP_FULL, 0);
        return false;
    }
    v->paced = !err && !pace_take(&v->engine->logs.pace, (uint64_t)sectors * SECTOR);
    if (v->paced) {
        stat_add(&v->stats.paced, 1);
        worker_want_soon(v->worker);
        return false;
    }
    if (!err)
        err = log_append(&v->log, v->worker->append, pieces, count);
    if (err) { /* a disk without room is a full log: what is uploaded makes some */
        v->log.room = 0;
        block_writers(v, disk_full(err) ? GLIDE_EV_LOG_FULL : GLIDE_EV_DISK_ERROR, (uint64_t)-err);
        return false;
    }
    if (!v->event_dirty) {
        v->event_dirty = true;
        event_post(v->engine, v->cookie, GLIDE_EV_FIRST_DIRTY, 0, 0);
    }
    settle(v, pieces, count);
    return true;
}

bool io_logged(const struct io_req *req)
{
    return (req->op == GLIDE_WRITE || req->op == GLIDE_ZERO) && req->length &&
           req->progress / SECTOR >= sectors_of(req);
}

static void own_what_waits(struct volume *v)
{
    for (struct list *at = v->batch.next, *next; at != &v->batch; at = next) {
        next = at->next;
        io_own(container_of(at, struct io_req, link));
    }
}

void io_flush(struct volume *v)
{
    bool going = true;
    int dead = v->failed ? v->failed : v->closing ? ESHUTDOWN : 0;

    list_remove(&v->flush_task.link);
    if (v->frozen && !dead) {
        own_what_waits(v);
        return;
    }
    while (going && !dead && !list_empty(&v->batch)) {
        struct io_req *head = container_of(v->batch.next, struct io_req, link);
        if (head->op == GLIDE_WRITE && io_unaligned(head) && !io_merge(head))
            continue;
        going = append_some(v);
        dead = v->failed;
    }
    if (going)
        v->blocked = false;
    if (dead) /* while closing: a write that came back from its read */
        io_fail_parked(v, dead);
    else if (!going)
        own_what_waits(v);
    sync_kick(v);
}

void io_cancel(struct volume *v, const void *tag, int err)
{
    struct list cancelled;

    list_init(&cancelled);
    for (struct list *at = v->batch.next, *next; at != &v->batch; at = next) {
        next = at->next;
        if (container_of(at, struct io_req, link)->tag == tag) {
            list_remove(at);
            list_append(&cancelled, at);
        }
    }
    for (struct list *e; (e = list_pop(&cancelled));)
        io_finish(container_of(e, struct io_req, link), err);
    fault_cancel(v, tag, err);
    sync_cancel(v, tag, err);
    if (v->filter)
        v->filter->ops->let_go(v, tag);
}

void io_fail_parked(struct volume *v, int err)
{
    struct list failed;

    list_init(&failed);
    list_splice(&failed, &v->batch);
    v->blocked = false;
    for (struct list *e; (e = list_pop(&failed));)
        io_finish(container_of(e, struct io_req, link), err);
    fault_resolve_all(v, err);
    sync_fail_waiters(v, err);
    if (v->filter)
        v->filter->ops->let_go(v, NULL);
}
