/*
 * Retiring a segment: its data is in the store, and the reader uses a manifest
 * that has it; the log forgets it and the file goes.
 *
 * The caller's thread reads the journal and unlinks; the worker does the map, a
 * slice of records per round so that guests never wait for a whole segment. The
 * stamp is bumped before the first record: a fault that was resolved against an
 * older manifest cannot install what the log is about to uncover.
 *
 * What the journal says on the disk is believed only if it has every record that
 * was appended: else a damaged one would leave a position of a file that is gone.
 * Then the map itself is walked, which needs no file.
 */
#include "volume/fault.h"
#include "base/util.h"
#include "volume/volume.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define SLICE 1024 /* journal indices per round */

struct retire {
    struct call call;
    struct task task;
    struct volume *v;
    uint64_t limit; /* retire up to this sequence number */
    uint64_t seq;   /* the segment at work, 0 = none left */
    struct segment_id id;
    struct disk_file file; /* of it, a duplicate: closing the last fd may take the file system a while */
    uint32_t end, sectors, valid;
    bool counted; /* `valid` is all that was ever appended */
    bool whole;   /* so is the journal */
    struct segment_journal journal;
    uint32_t at;
    int err;
    bool spare; /* the file was kept for the log's next segment */
};

static int pick(struct worker *w, void *arg)
{
    struct retire *r = arg;
    struct write_log *log = &r->v->log;
    struct log_segment *s = log->count ? log->segments[0] : NULL;

    (void)w;
    r->seq = 0;
    if (r->v->frozen)
        return fail(-EBUSY, "the volume is being handed over");
    if (!s || s == log->active || s->seq > r->limit)
        return 0;
    if (s->seq > r->v->committed_seq)
        return fail(-EINVAL, "segment %llu is not committed", (unsigned long long)s->seq);
    r->file.path = strdup(s->file.path);
    r->file.fd = dup(s->file.fd);
    if (!r->file.path || r->file.fd < 0)
        return -ENOMEM;
    r->seq = s->seq;
    r->id = log->id;
    r->id.seq = s->seq;
    r->end = s->end;
    r->sectors = s->sectors;
    r->valid = s->valid;
    r->counted = s->counted && !s->sync_failed;
    return 0;
}

static void forgot(uint64_t block, uint64_t count, void *arg)
{
    block_map_drop(&((struct volume *)arg)->base, block, count);
}

void retire_failed(struct volume *v)
{
    uint64_t seq = 0;

    for (uint32_t i = 0; i < v->log.count && v->log.segments[i]->seq <= v->committed_seq; i++) {
        struct log_segment *s = v->log.segments[i];
        if (s->sync_failed && !s->unmapped)
            seq = s->seq;
        s->unmapped = s->sync_failed;
    }
    if (!seq)
        return;
    atomic_fetch_add(&v->stamp, 1);
    v->forgotten_seq = max_u64(v->forgotten_seq, seq);
    log_map_forget_upto(&v->map, seq, forgot, v); /* what it has no memory to forget is checked when it is read */
    volume_count_memory(v);
}

static void forget_slice(struct task *task, struct worker *w)
{
    struct retire *r = container_of(task, struct retire, task);
    struct volume *v = r->v;
    uint32_t stop = (uint32_t)min_u64(r->journal.end, (uint64_t)r->at + SLICE);

    if (!r->whole) {
        r->err = log_map_forget_upto(&v->map, r->seq, forgot, v);
        r->whole = true; /* as far as the map goes */
        r->at = stop = r->journal.end;
    }
    for (; r->at < stop && !r->err; r->at++) {
        const struct segment_record *record = &r->journal.records[r->at];
        uint64_t pos = pos_make(r->seq, r->at);
        if (record->op == RECORD_WRITE)
            r->err = log_map_forget_write(&v->map, record->sector, record->count, pos, forgot, v);
        else if (record->op == RECORD_ZERO)
            r->err = log_map_forget_zero(&v->map, record->sector, record->count, pos, forgot, v);
    }
    struct log_segment *s = log_find(&v->log, r->seq);
    bool more = !r->err && r->at < r->journal.end;
    if (more || (!r->err && s->pins)) {
        worker_defer(w, &r->task); /* the next slice, or until the last reader leaves */
        return;
    }
    if (!r->err)
        r->spare = log_retire(&v->log, s);
    volume_count_memory(v);
    call_done(&r->call, r->err);
}

static void start_forget(struct call *call, struct worker *w)
{
    struct retire *r = call->arg;

    atomic_fetch_add(&r->v->stamp, 1);
    r->v->forgotten_seq = max_u64(r->v->forgotten_seq, r->seq);
    r->at = 0;
    r->err = 0;
    list_init(&r->task.link);
    r->task.run = forget_slice;
    forget_slice(&r->task, w);
}

/* Whether the journal on the disk has all that the map may have of the segment. */
static bool read_whole(struct retire *r)
{
    return r->counted && segment_read_whole(&r->file, &r->id, r->sectors, r->end, r->valid, &r->journal);
}

static int retire_one(struct retire *r)
{
    r->whole = !r->valid || read_whole(r);
    int err = call_run(r->v->worker, &r->call, start_forget, r);
    segment_free_journal(&r->journal);
    if (err)
        return err;
    if (!r->spare)
        return segment_unlink(r->v->log.path, r->seq);
    segment_unlink_mark(r->v->log.path, r->seq);
    return 0;
}

int glide_volume_retire(glide_volume *volume, uint64_t seq)
{
    struct retire r = {.v = volume, .limit = seq};
    bool any = false;
    int err;

    pthread_mutex_lock(&volume->retire_lock);
    while (!(err = worker_call(volume->worker, pick, &r)) && r.seq) {
        err = retire_one(&r);
        disk_close(&r.file);
        memset(&r.journal, 0, sizeof(r.journal));
        if (err)
            break;
        any = true;
    }
    pthread_mutex_unlock(&volume->retire_lock);
    if (any)
        engine_space_freed(volume->engine);
    return err;
}

/* ---- test hook ---- */

struct forget {
    struct volume *v;
    uint64_t sector;
};

static int do_forget_sector(struct worker *w, void *arg)
{
    struct forget *f = arg;
    struct log_map *m = &f->v->map;
    uint64_t pos = log_map_find(m, f->sector);

    (void)w;
    if (!pos)
        return -ENOENT;
    return pos & POS_ZERO ? log_map_forget_zero(m, f->sector, 1, pos & ~POS_ZERO, forgot, f->v)
                          : log_map_forget_write(m, f->sector, 1, pos, forgot, f->v);
}

int glide_volume_forget_sector(glide_volume *volume, uint64_t sector)
{
    return worker_call(volume->worker, do_forget_sector, &(struct forget){volume, sector});
}
