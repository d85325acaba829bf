/*
 * FLUSH and FUA.
 *
 * One sync of a volume's log runs at a time. A request joins the *next* one:
 * that one starts after the request arrived, so it covers all that was
 * acknowledged before. A sync begins with noting the log position, then syncs
 * every segment with unsynced data (and the directory if it has new entries)
 * through the ring; on success a SYNC record witnesses the position.
 *
 * A failed fdatasync is sticky: the kernel may have dropped the pages and will
 * not report it twice. FLUSH fails until the store has that segment.
 *
 * flush = "store": the request waits for the commit of the segment that was
 * last written when it came; Python is asked to seal and commit it.
 */
#include "volume/fault.h"
#include "volume/io.h"
#include "volume/volume.h"

#include <stdlib.h>

struct sync_op {
    struct ring_op op;
    struct volume *volume;
    struct log_segment *segment; /* NULL: the directory */
};

static uint64_t last_written_seq(const struct volume *v)
{
    const struct write_log *log = &v->log;

    return log->active && log->active->end ? log->active->seq : log_sealed_seq(log);
}

void sync_join(struct io_req *req)
{
    struct volume *v = req->volume;

    if (!v->flush_store || (req->flags & IO_LOCAL)) {
        list_append(&v->sync.next, &req->link);
        volume_want_flush(v);
        return;
    }
    req->need_seq = last_written_seq(v);
    if (req->need_seq <= v->committed_seq) {
        io_finish(req, 0);
        return;
    }
    list_append(&v->sync.store, &req->link);
    event_post(v->engine, v->cookie, GLIDE_EV_STORE_FLUSH, req->need_seq, 0);
}

void sync_committed(struct volume *v)
{
    for (struct list *at = v->sync.store.next, *next; at != &v->sync.store; at = next) {
        struct io_req *req = container_of(at, struct io_req, link);
        next = at->next;
        if (req->need_seq <= v->committed_seq) {
            list_remove(at);
            io_finish(req, 0);
        }
    }
}

static void finish_list(struct list *requests, int err)
{
    struct list done;

    list_init(&done);
    list_splice(&done, requests);
    for (struct list *e; (e = list_pop(&done));)
        io_finish(container_of(e, struct io_req, link), err);
}

void sync_fail_waiters(struct volume *v, int err)
{
    finish_list(&v->sync.next, err); /* those of a running sync end with it */
    finish_list(&v->sync.store, err);
}

void sync_cancel(struct volume *v, const void *tag, int err)
{
    for (struct list *at = v->sync.store.next, *next; at != &v->sync.store; at = next) {
        struct io_req *req = container_of(at, struct io_req, link);
        next = at->next;
        if (req->tag == tag) {
            list_remove(at);
            io_finish(req, err);
        }
    }
}

static bool lost_data(const struct volume *v)
{
    for (uint32_t i = 0; i < v->log.count; i++) {
        if (v->log.segments[i]->sync_failed && v->log.segments[i]->seq > v->committed_seq)
            return true;
    }
    return false;
}

/* Guests must not be told that all is well; the uploader, which checks every byte it sends, goes on: the commit is
 * the cure. True: somebody still waits for a sync. */
static bool fail_guests(struct volume *v)
{
    struct list guests;

    list_init(&guests);
    for (struct list *at = v->sync.next.next, *next; at != &v->sync.next; at = next) {
        next = at->next;
        if (container_of(at, struct io_req, link)->flags & IO_LOCAL)
            continue;
        list_remove(at);
        list_append(&guests, at);
    }
    finish_list(&guests, EIO);
    return !list_empty(&v->sync.next);
}

static void sync_end(struct volume *v)
{
    struct sync_state *s = &v->sync;
    int err = s->err;

    s->running = false;
    stat_add(&v->stats.syncs, 1);
    if (!err && !v->frozen && !lost_data(v)) /* a later sync that works does not bring back what an earlier one lost */
        log_note_sync(&v->log, s->pos);
    finish_list(&s->current, err ? EIO : 0);
    if (!list_empty(&s->next))
        volume_want_flush(v);
}

static struct log_segment *newest_written(const struct write_log *log)
{
    for (uint32_t i = log->count; i-- > 0;) {
        if (log->segments[i]->end)
            return log->segments[i];
    }
    return NULL;
}

static void on_synced(struct ring_op *op, int res, uint32_t flags)
{
    struct sync_op *x = container_of(op, struct sync_op, op);
    struct volume *v = x->volume;
    struct log_segment *s = x->segment;
    int err = disk_sync_end(s ? &s->file : &v->log.dir, s ? DISK_SYNC_BEGIN : DISK_DIR_BEGIN, res < 0 ? res : 0);

    (void)flags;
    if (s)
        s->pins--;
    if (err) {
        v->sync.err = err;
        if (!s) { /* which entries are lost is unknown: the newest file with data stands for them */
            s = newest_written(&v->log);
            v->log.dir_unsynced = true; /* a file without data yet may be written to after that one is committed */
        }
        event_post(v->engine, v->cookie, GLIDE_EV_SYNC_FAILED, s ? s->seq : 0, (uint64_t)-err);
        if (s) {
            log_mark_sync_failed(&v->log, s);
            if (s == v->log.active && !v->frozen)
                log_seal(&v->log); /* later writes go where syncs may still work */
        }
    }
    free(x);
    if (--v->sync.outstanding == 0)
        sync_end(v);
}

static int sync_one(struct volume *v, struct log_segment *s)
{
    struct sync_op *x = malloc(sizeof(*x));

    if (!x)
        return -ENOMEM;
    *x = (struct sync_op){{on_synced}, v, s};
    disk_sync_begin(s ? &s->file : &v->log.dir, s ? DISK_SYNC_BEGIN : DISK_DIR_BEGIN);
    struct io_uring_sqe *sqe = worker_sqe(v->worker, &x->op);
    io_uring_prep_fsync(sqe, s ? s->file.fd : v->log.dir.fd, s ? IORING_FSYNC_DATASYNC : 0);
    io_uring_sqe_set_data(sqe, &x->op);
    if (s) {
        s->unsynced = s->noted = false;
        s->pins++;
    } else {
        v->log.dir_unsynced = false;
    }
    v->sync.outstanding++;
    return 0;
}

static bool log_is_unsynced(const struct write_log *log)
{
    bool any = log->dir_unsynced;

    for (uint32_t i = 0; i < log->count && !any; i++)
        any = log->segments[i]->unsynced && log->segments[i]->end;
    return any;
}

void sync_kick(struct volume *v)
{
    struct sync_state *s = &v->sync;
    int err = 0;

    if (s->running || v->frozen || list_empty(&s->next))
        return;
    if (lost_data(v) && !fail_guests(v))
        return;
    list_splice(&s->current, &s->next);
    s->running = true;
    s->err = 0;
    s->pos = log_position(&v->log);
    s->outstanding = 1; /* ours */
    bool any = log_is_unsynced(&v->log);
    for (uint32_t i = 0; i < v->log.count && any && !err; i++) {
        struct log_segment *x = v->log.segments[i];
        /* An empty one has nothing to lose, and may go (log_seal) while a sync of it would run. A record that was only
         * noted is below the position that is vouched for, too. */
        if ((x->unsynced || x->noted) && x->end)
            err = sync_one(v, x);
    }
    if (!err && v->log.dir_unsynced)
        err = sync_one(v, NULL);
    bool nothing = s->outstanding == 1 && !err;
    s->err = err ? err : s->err;
    if (--s->outstanding)
        return;
    if (nothing) { /* all is durable already: no record to write */
        s->running = false;
        finish_list(&s->current, 0);
    } else {
        sync_end(v);
    }
}
