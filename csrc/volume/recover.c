/*
 * Opening a log that may have been written to before: by this host's last
 * process, or by the last boot.
 *
 * replay.c says which records count, and ends at damage to synced data. Here they become the volume's maps and
 * segments.
 *
 * What was dropped once must be dropped by every later replay too, although the
 * log is synced again in between: from then on SYNC records vouch only for
 * positions after the last segment with damage (write_log.vouch_from).
 *
 * Found segments are sealed and count as unsynced: the next write opens a new one.
 *
 * A volume in standby (handoff) is replayed while another process appends to its log: all but the last
 * segment, which is replayed with what came after it once that process has stopped.
 */
#include "log/replay.h"
#include "base/util.h"
#include "volume/volume.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

struct recovery {
    struct volume *v;
    struct glide_recovery *out;
    struct replay replay;
};

static int apply(void *arg, struct replay_segment *f, uint32_t index, const uint64_t *sums)
{
    struct recovery *r = arg;
    const struct segment_record *record = &f->journal.records[index];
    uint64_t pos = pos_make(f->seq, index);

    (void)sums; /* the journal's are enough: see sums_from_journal */
    r->out->records++;
    r->out->bytes += record->op == RECORD_WRITE ? (uint64_t)record->count * SECTOR : 0;
    int err = record->op == RECORD_ZERO ? log_map_zero(&r->v->map, record->sector, record->count, pos)
                                        : log_map_write(&r->v->map, record->sector, record->count, pos);
    return err ? fail(err, "no memory for the log map") : 0;
}

static int adopt(void *arg, struct replay_segment *f)
{
    struct recovery *r = arg;
    struct stat st = {0};
    uint32_t end = f->usable ? f->journal.end : 0;
    struct log_segment *s = log_adopt(&r->v->log, f->seq, f->file, f->usable ? f->header.sectors : 1, end,
                                      f->usable ? f->journal.valid : 0);
    if (!s || sums_from_journal(&s->sums, &f->journal))
        return -ENOMEM;
    s->first_ns = fstat(f->file.fd, &st) ? clock_ns(CLOCK_REALTIME)
                                         : (uint64_t)st.st_mtim.tv_sec * 1000000000u + (uint64_t)st.st_mtim.tv_nsec;
    s->sync_failed = f->suspect;
    s->counted = f->usable && !f->dropped;
    s->unsynced = f->seq > r->replay.committed_seq; /* a commit is of what was synced */
    if (f->thin)
        log_thinned(&r->v->log, s, end, s->bytes - min_u64(s->bytes, (uint64_t)st.st_blocks * 512));
    f->file.fd = -1; /* it is the segment's now */
    f->file.path = NULL;
    return 0;
}

/* Segments that the store has, which cannot be served from: they go. */
static void drop(void *arg, struct replay_segment *f)
{
    struct volume *v = ((struct recovery *)arg)->v;
    struct write_log *log = &v->log;

    log_map_destroy(&v->map);
    log_map_init(&v->map, &v->engine->leaves);
    while (log->count) {
        segment_unlink(log->path, log->segments[0]->seq);
        log_forget(log, log->segments[0]);
    }
    if (f)
        segment_unlink(log->path, f->seq);
}

static const struct replay_calls CALLS = {.record = apply, .end = adopt, .drop = drop};
/* In a handoff another process has the log. */
static const struct replay_calls STANDBY = {.record = apply, .end = adopt};

static int recover_segments(struct recovery *r, const uint64_t *seqs, int64_t count)
{
    struct write_log *log = &r->v->log;

    if (!count)
        return 0;
    int err = log->dir.fd >= 0 ? 0 : disk_open(&log->dir, log->path, O_RDONLY | O_DIRECTORY);
    if (err)
        return fail(err, "cannot open the log directory %s: %s", log->path, strerror(-err));
    err = replay_run(&r->replay, seqs, count);
    if (err)
        return err;
    if (!log->count)
        return 0;
    const struct log_segment *last = log->segments[log->count - 1];
    log->id.seq = last->seq;
    log->previous_end_seq = last->seq;
    log->previous_end = last->end;
    log->vouch_from = max_u64(log->vouch_from, r->replay.damage_end);
    log->dir_unsynced = true; /* whoever made the entries may not have synced them */
    r->out->segments = log->count;
    r->out->last_seq = last->seq;
    r->out->verified = r->replay.verified;
    r->out->dropped = r->replay.dropped;
    r->out->repaired = r->replay.repaired;
    return 0;
}

static struct recovery begin(struct volume *v, uint64_t committed_seq, struct glide_recovery *out)
{
    struct replay replay = {.dir = v->log.path,
                            .id = v->log.id,
                            .committed_seq = committed_seq,
                            .repair = !v->frozen,
                            .adopt = true,
                            .calls = v->frozen ? &STANDBY : &CALLS};

    memset(out, 0, sizeof(*out));
    return (struct recovery){.v = v, .out = out, .replay = replay};
}

int volume_recover(struct volume *v, uint64_t committed_seq, bool always_verify, struct glide_recovery *out)
{
    struct recovery r = begin(v, committed_seq, out);
    uint64_t *seqs;
    int64_t count = segment_list(v->log.path, &seqs);

    r.replay.arg = &r;
    r.replay.always_verify = always_verify;
    v->log.id.seq = committed_seq; /* numbers are never used twice */
    if (count < 0)
        return (int)count;
    if (v->frozen) {
        count -= count > 0;
    } else {
        segment_unlink_spares(v->log.path);
    }
    int err = v->frozen ? 0 : replay_check_end(&r.replay, &v->log.witness);
    if (!err)
        err = recover_segments(&r, seqs, count);
    free(seqs);
    return err;
}

int volume_recover_tail(struct volume *v, struct glide_recovery *out)
{
    const struct write_log *log = &v->log;
    uint64_t *seqs, last = log->count ? log->segments[log->count - 1]->seq : 0;
    struct recovery r = begin(v, last ? last : v->committed_seq, out);
    int64_t first = 0, count = segment_list(log->path, &seqs);

    r.replay.arg = &r;
    if (count < 0)
        return (int)count;
    while (first < count && seqs[first] <= last)
        first++;
    int err = replay_check_end(&r.replay, &v->log.witness);
    if (!err)
        err = recover_segments(&r, seqs + first, count - first);
    free(seqs);
    segment_unlink_spares(log->path);
    return err;
}
