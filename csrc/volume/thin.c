/*
 * Thinning a segment: it is committed and stays a read cache, but much of it was written again since. It gets another
 * file, which has holes where nothing is the newest data any more. Positions stay, so the map does not change, and for
 * what is alive either file is right.
 *
 * Dead is for ever, as positions only grow; but a read that began while a sector was alive may still come, so the files
 * are exchanged once none is in flight. A record that has both kinds becomes records of one sector each: its hash is of
 * all. After a restart replay.c passes over records whose data is a hole: what is newer follows in the log, or was lost
 * with the power, and then the store has what the record had.
 *
 * Where a power cut leaves the new file under its own name, it is unlinked with the spares.
 */
#include "base/space.h"
#include "base/util.h"
#include "volume/fault.h"
#include "volume/volume.h"

#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define SLICE 1024            /* journal indices per round */
#define LEAST_RUN 4           /* sectors: what is dead in between is kept, as many small extents cost more */
#define COPIED_AT_ONCE 256    /* sectors */
#define ROUNDS_FOR_READS 4096 /* of the worker */

struct thin {
    struct call call;
    struct task task;
    struct volume *v;
    uint64_t seq; /* 0 = nothing to do */
    struct segment_id id;
    struct disk_file file, made; /* a duplicate of the segment's, and that which replaces it */
    uint32_t end, sectors, valid, live;
    struct segment_journal journal;
    struct sector_sums sums; /* as of the marking */
    uint8_t *alive;          /* by index: the newest data of a sector, or kept with its neighbours */
    uint32_t at, rounds;
    uint64_t freed; /* bytes */
};

/* Whether a third of it would go, or of what was left of it the last time. */
static bool is_worth(const struct log_segment *s, uint32_t live)
{
    uint64_t had = s->thin ? s->thin_live : s->end;

    return s->counted && !s->sync_failed && s->valid && live <= had / 3 * 2 && live < had;
}

static int pick(struct worker *w, void *arg)
{
    struct thin *t = arg;
    struct volume *v = t->v;
    struct log_segment *s = log_find(&v->log, t->seq);

    (void)w;
    if (v->frozen)
        return -EBUSY;
    t->live = log_map_live(&v->map, t->seq);
    if (!s || s == v->log.active || s->seq > v->committed_seq || !is_worth(s, t->live)) {
        t->seq = 0;
        return 0;
    }
    t->file.path = strdup(s->file.path);
    t->file.fd = dup(s->file.fd);
    if (!t->file.path || t->file.fd < 0)
        return -ENOMEM;
    t->id = v->log.id;
    t->id.seq = s->seq;
    t->end = s->end;
    t->sectors = s->sectors;
    t->valid = s->valid;
    return 0;
}

static bool read_journal(struct thin *t)
{
    return segment_read_whole(&t->file, &t->id, t->sectors, t->end, t->valid, &t->journal) &&
           t->journal.end <= t->end && (t->alive = calloc(t->end, 1));
}

/* ---- on the worker ---------------------------------------------------------------------------------- */

static uint32_t mark(struct thin *t, uint32_t index)
{
    const struct segment_record *r = &t->journal.records[index];

    if (r->op != RECORD_WRITE)
        return 1;
    for (uint32_t i = 0; i < r->count; i++)
        t->alive[index + i] = log_map_find(&t->v->map, r->sector + i) == pos_make(t->seq, index + i);
    return r->count;
}

static void mark_slice(struct task *task, struct worker *w)
{
    struct thin *t = container_of(task, struct thin, task);
    uint32_t stop = (uint32_t)min_u64(t->journal.end, (uint64_t)t->at + SLICE);
    const struct log_segment *s = log_find(&t->v->log, t->seq);

    while (t->at < stop)
        t->at += mark(t, t->at);
    if (t->at < t->journal.end) {
        worker_defer(w, &t->task);
        return;
    }
    call_done(&t->call, s ? sums_copy(&t->sums, &s->sums, t->end) : -EBUSY);
}

static void start_marking(struct call *call, struct worker *w)
{
    struct thin *t = call->arg;

    list_init(&t->task.link);
    t->task.run = mark_slice;
    mark_slice(&t->task, w);
}

/* Exchange the files; `made` is then the old one. */
static void exchange(struct task *task, struct worker *w)
{
    struct thin *t = container_of(task, struct thin, task);
    struct log_segment *s = log_find(&t->v->log, t->seq);

    bool in_use = s && (s->pins || t->v->sync.running); /* requests under way name the descriptor */
    if (in_use && t->rounds++ < ROUNDS_FOR_READS) {
        worker_defer(w, &t->task);
        return;
    }
    if (!s || in_use || t->v->frozen) {
        call_done(&t->call, -EBUSY);
        return;
    }
    struct disk_file old = {s->file.fd, t->made.path};
    s->file.fd = t->made.fd; /* it gets the path, too */
    s->valid = t->journal.valid;
    t->made = old;
    log_thinned(&t->v->log, s, t->live, t->freed);
    call_done(&t->call, 0);
}

static void start_exchange(struct call *call, struct worker *w)
{
    struct thin *t = call->arg;

    list_init(&t->task.link);
    t->task.run = exchange;
    exchange(&t->task, w);
}

/* ---- on the caller's thread --------------------------------------------------------------------------- */

/* Short runs of what is dead stay with what is alive around them. */
static void keep_short_runs(struct thin *t)
{
    for (uint32_t at = 0, run; at < t->end; at += run) {
        for (run = 1; at + run < t->end && t->alive[at + run] == t->alive[at];)
            run++;
        if (!t->alive[at] && run < LEAST_RUN)
            memset(t->alive + at, 1, run);
    }
}

/* A WRITE of which only a part stays: a record for each sector, or all of it stays, if a hash is not known. */
static void split(struct thin *t, uint32_t index)
{
    struct segment_record whole = t->journal.records[index];
    uint64_t salt = segment_salt(&t->id);

    if (sums_vouch(&t->sums, index, whole.count, whole.hash) != 1) {
        memset(t->alive + index, 1, whole.count);
        return;
    }
    for (uint32_t i = 0; i < whole.count; i++) {
        struct segment_record *r = &t->journal.records[index + i];
        *r = (struct segment_record){
            .sector = whole.sector + i, .count = 1, .op = RECORD_WRITE, .hash = t->sums.sum[index + i]};
        segment_record_seal(r, salt, index + i);
    }
    t->journal.valid += whole.count - 1;
}

static void split_records(struct thin *t)
{
    uint32_t space;

    for (uint32_t at = 0; at < t->journal.end; at += space) {
        const struct segment_record *r = &t->journal.records[at];
        space = r->op == RECORD_WRITE ? r->count : 1;
        if (space > 1 && memchr(t->alive + at, 0, space) && memchr(t->alive + at, 1, space))
            split(t, at);
    }
}

static int copy_part(struct thin *t, uint8_t *buf, uint64_t offset, uint64_t length)
{
    uint64_t got;
    int err = disk_read(&t->file, buf, length, offset, &got);
    struct iovec iov = {buf, got};

    return err || !got ? err : disk_pwritev(&t->made, &iov, 1, offset); /* at the end are records without data */
}

static int copy_alive(struct thin *t, uint8_t *buf)
{
    int err = copy_part(t, buf, 0, SEGMENT_HEAD);

    for (uint32_t at = 0, run; at < t->end && !err; at += run) {
        for (run = 1; at + run < t->end && run < COPIED_AT_ONCE && t->alive[at + run] == t->alive[at];)
            run++;
        if (t->alive[at])
            err = copy_part(t, buf, segment_data_offset(t->sectors, at), (uint64_t)run * SECTOR);
    }
    struct iovec journal = {t->journal.records, t->journal.end * sizeof(struct segment_record)};
    return err ? err : disk_pwritev(&t->made, &journal, 1, SEGMENT_HEAD);
}

static uint64_t allocated(const struct disk_file *f)
{
    struct stat st;

    return fstat(f->fd, &st) ? 0 : (uint64_t)st.st_blocks * 512;
}

/* The file that will be the segment's, whole and durable. */
static int make_file(struct thin *t)
{
    char *path = segment_path(t->v->log.path, t->seq, ".spare");
    uint8_t *buf = malloc(COPIED_AT_ONCE * SECTOR);
    int err = !path || !buf                                               ? -ENOMEM
              : space_has(t->file.fd, (uint64_t)t->end * SECTOR, 2, NULL) ? disk_create(&t->made, path)
                                                                          : -ENOSPC;

    if (!err)
        err = copy_alive(t, buf);
    if (!err)
        err = disk_sync(&t->made, DISK_SYNC_BEGIN);
    if (!err) {
        uint64_t before = allocated(&t->file), after = allocated(&t->made);
        t->freed = before > after ? before - after : 0;
    }
    free(path);
    free(buf);
    return err;
}

static int replace(struct thin *t)
{
    int err = make_file(t);

    if (!err)
        err = call_run(t->v->worker, &t->call, start_exchange, t);
    if (!err)
        err = disk_rename(&t->made, t->file.path); /* the name of the new one, whose descriptor the segment has */
    else if (t->made.path)
        disk_unlink(t->made.path);
    return err;
}

int64_t glide_volume_thin(glide_volume *volume, uint64_t seq)
{
    struct thin t = {.v = volume, .seq = seq, .file = {.fd = -1}, .made = {.fd = -1}};

    pthread_mutex_lock(&volume->retire_lock);
    int err = worker_call(volume->worker, pick, &t);
    if (!err && t.seq && read_journal(&t)) {
        err = call_run(volume->worker, &t.call, start_marking, &t);
        if (!err) {
            keep_short_runs(&t);
            split_records(&t);
            err = replace(&t);
        }
    }
    pthread_mutex_unlock(&volume->retire_lock);
    segment_free_journal(&t.journal);
    sums_free(&t.sums);
    free(t.alive);
    disk_close(&t.file);
    disk_close(&t.made);
    if (!err && t.freed)
        engine_space_freed(volume->engine);
    return err == -EBUSY || disk_full(err) ? 0 : err ? err : (int64_t)t.freed;
}
