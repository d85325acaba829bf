/*
 * Opening a log that may have been written to before: by this host's last
 * process, or by the last boot.
 *
 * Two passes. The first reads headers and journals and collects what witnesses call
 * durable: SYNC records, vouches of segments, the witness file (witness.h). The second goes through the records in
 * position order, checks the data where a power cut may have torn it, and maps what is whole. A bad or missing record
 * below the durable position is bit rot, an error; above it, it is a write that was never acknowledged as durable, and
 * what it meant to replace stays visible. Replay never stops at a bad record.
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
#include "util.h"
#include "volume.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define ADVICE                                                                                                         \
    "`glidefs logs export` saves what is whole of the log, then `glidefs attach NAME --take-over` serves what the "    \
    "store has"

struct found {
    uint64_t seq;
    struct disk_file file;
    struct segment_header header;
    struct segment_journal journal;
    bool usable;      /* the header is valid */
    bool suspect;     /* a sync failed: see log_mark_sync_failed */
    bool dropped;     /* not all valid records are replayed */
    uint32_t limit;   /* records from here on are of a writer that had lost the log */
    uint64_t durable; /* log position: everything of this segment below it is */
};

struct recovery {
    struct volume *v;
    struct found *found;
    int64_t count;
    struct vouch *vouches; /* of all witnesses; room for 1 + VOUCHES of each segment, and those of the witness file */
    uint32_t vouch_count;
    uint64_t damage_end; /* log position after the last segment that lost something; 0 = none did */
    uint64_t committed_seq;
    uint8_t *buf;
    uint64_t sums[RECORD_MAX_SECTORS];
    bool always_verify;
    struct glide_recovery *out;
};

static int open_found(struct recovery *r, struct found *f)
{
    struct write_log *log = &r->v->log;
    struct segment_id id = log->id;
    char *path = segment_path(log->path, f->seq, ".seg"), *mark = segment_path(log->path, f->seq, ".syncfail");
    int err = path && mark ? disk_open(&f->file, path, O_RDWR) : -ENOMEM;

    if (err)
        err = fail(err, "cannot open log segment %s: %s", path ? path : "", strerror(-err));
    else
        f->suspect = access(mark, F_OK) == 0;
    free(path);
    free(mark);
    if (err)
        return err;
    id.seq = f->seq;
    err = segment_read_header(&f->file, &id, &f->header);
    f->usable = err == 0;
    r->vouch_count += segment_read_vouches(&f->file, &id, r->vouches + r->vouch_count);
    if (f->usable && !r->v->frozen)
        r->out->repaired += segment_repair_header(&f->file, &f->header);
    return err == -EUCLEAN ? 0 : err; /* judged later, against the durable position */
}

/* Each header bounds the segment before it. */
static void set_limits(struct recovery *r)
{
    for (int64_t i = 0; i < r->count; i++) {
        r->found[i].limit = UINT32_MAX;
        if (i + 1 < r->count && r->found[i + 1].usable && r->found[i + 1].header.previous_seq == r->found[i].seq)
            r->found[i].limit = r->found[i + 1].header.previous_end;
    }
}

static int read_journals(struct recovery *r)
{
    for (int64_t i = 0; i < r->count; i++) {
        struct found *f = &r->found[i];
        int err = f->usable ? segment_read_journal(&f->file, &f->header, f->limit, &f->journal) : 0;
        if (err)
            return err;
        struct vouch vouch = {0}; /* all of a segment's have the same start */
        for (uint32_t k = 0; f->usable && k < f->journal.end; k++) {
            const struct segment_record *record = &f->journal.records[k];
            if (record->op == RECORD_SYNC && record->sector <= pos_make(f->seq, k))
                vouch = (struct vouch){record->hash, max_u64(vouch.to, record->sector)};
        }
        r->vouches[r->vouch_count++] = vouch;
    }
    return 0;
}

/* The log position below which everything in segment `seq` is durable. */
static uint64_t durable_for(const struct recovery *r, uint64_t seq)
{
    uint64_t durable = 0;

    for (uint32_t i = 0; i < r->vouch_count; i++) {
        if (r->vouches[i].from <= pos_make(seq, 0))
            durable = max_u64(durable, r->vouches[i].to);
    }
    return durable;
}

/* Was anything of segment `seq` synced? A sync that began between two segments names the next one's first index: that
 * one may be there by the end of the sync, with nothing of it on the disk. */
static bool was_synced(const struct recovery *r, uint64_t seq) { return durable_for(r, seq) > pos_make(seq, 0); }

static void note_damage(struct recovery *r, uint64_t seq)
{
    r->damage_end = max_u64(r->damage_end, pos_make(seq + 1, 0));
}

static int rot(const struct found *f, uint32_t index)
{
    return fail(-EUCLEAN, "%s: record %u was synced but is damaged now (bit rot); " ADVICE, f->file.path, index);
}

static int is_missing(const struct volume *v, uint64_t seq)
{
    return fail(-EUCLEAN, "%s: log segment %016llx, which was synced, is missing; put it back, or: " ADVICE,
                v->log.path, (unsigned long long)seq);
}

/* Neither copy of the header is good, though it was synced. */
static int unusable(const struct recovery *r, struct found *f)
{
    struct segment_id id = r->v->log.id;
    struct segment_header h;

    id.seq = f->seq;
    segment_read_header(&f->file, &id, &h);
    char *why = strdup(glide_error());
    int err = fail(-EUCLEAN, "%s, but it was synced (bit rot, or files in each other's place); " ADVICE,
                   why ? why : f->file.path);
    free(why);
    return err;
}

/* The last segments have no header behind them to name them: the witness file does. */
static int check_end(struct recovery *r, const uint64_t *seqs, int64_t count)
{
    struct vouch vouches[VOUCHES];
    uint32_t n = witness_read(r->v->log.path, &r->v->log.id, vouches);

    for (uint32_t i = 0; i < n; i++) {
        uint64_t seq = pos_seq(vouches[i].to);
        bool there = seq <= r->v->committed_seq;
        for (int64_t k = count; k-- > 0 && !there;)
            there = seqs[k] == seq;
        if (!there)
            return is_missing(r->v, seq);
        if (seq >= r->v->log.witness.seq) {
            r->v->log.witness.seq = seq;
            r->v->log.witness.slot = i + 1;
        }
    }
    return 0;
}

/* The data of a record may be torn only if another boot wrote it, or a sync of it failed. */
static bool must_verify(const struct recovery *r, const struct found *f)
{
    static const uint8_t none[16];

    return r->always_verify || f->suspect || !memcmp(f->header.boot_id, none, 16) ||
           memcmp(f->header.boot_id, segment_boot_id(), 16) != 0;
}

static int apply(struct recovery *r, struct found *f, uint32_t index)
{
    struct segment_record *record = &f->journal.records[index];
    uint64_t pos = pos_make(f->seq, index);
    int err = 0;

    if (record->op == RECORD_SYNC)
        return 0;
    if (record->op == RECORD_WRITE && must_verify(r, f)) {
        err = segment_verify(&f->file, &f->journal, index, r->buf, r->sums);
        r->out->verified += (uint64_t)record->count * SECTOR;
    }
    if (err == -EUCLEAN && pos >= f->durable) {
        record->op = 0;
        f->journal.valid--;
        f->dropped = true;
        r->out->dropped++;
        note_damage(r, f->seq);
        return 0;
    }
    if (err)
        return err == -EUCLEAN ? rot(f, index) : err;
    r->out->records++;
    r->out->bytes += record->op == RECORD_WRITE ? (uint64_t)record->count * SECTOR : 0;
    err = record->op == RECORD_ZERO ? log_map_zero(&r->v->map, record->sector, record->count, pos)
                                    : log_map_write(&r->v->map, record->sector, record->count, pos);
    return err ? fail(err, "no memory for the log map") : 0;
}

/* Below the durable position every index belongs to a valid record. */
static int replay_segment(struct recovery *r, struct found *f)
{
    uint32_t durable_end = 0, end = f->limit != UINT32_MAX ? f->limit : f->journal.end;

    if (pos_seq(f->durable) > f->seq && f->usable)
        durable_end = f->limit != UINT32_MAX ? f->limit : 0; /* sealed early: its end is what the next header says */
    else if (pos_seq(f->durable) == f->seq) /* a vouch of a writer that had lost the log may go beyond the limit */
        durable_end = (uint32_t)min_u64(pos_index(f->durable), f->limit);
    for (uint32_t i = 0; i < f->journal.sectors;) {
        const struct segment_record *record = &f->journal.records[i];
        uint32_t space = record->op == RECORD_WRITE ? record->count : 1;
        if (!record->op && i < durable_end)
            return rot(f, i);
        if (!record->op && i < end)
            note_damage(r, f->seq);
        int err = record->op ? apply(r, f, i) : 0;
        if (err)
            return err;
        i += space;
    }
    return 0;
}

static int adopt(struct recovery *r, struct found *f)
{
    struct stat st;
    uint32_t end = f->usable ? f->journal.end : 0;
    struct log_segment *s = log_adopt(&r->v->log, f->seq, f->file, f->usable ? f->header.sectors : 1, end,
                                      f->usable ? f->journal.valid : 0);
    if (!s || sums_from_journal(&s->sums, &f->journal))
        return -ENOMEM;
    s->first_ns = fstat(f->file.fd, &st) ? clock_ns(CLOCK_REALTIME)
                                         : (uint64_t)st.st_mtim.tv_sec * 1000000000u + (uint64_t)st.st_mtim.tv_nsec;
    s->sync_failed = f->suspect;
    s->counted = f->usable && !f->dropped;
    f->file.fd = -1; /* it is the segment's now */
    f->file.path = NULL;
    return 0;
}

static int replay(struct recovery *r)
{
    for (int64_t i = 0; i < r->count; i++) {
        struct found *f = &r->found[i];
        f->durable = durable_for(r, f->seq);
        if (!f->usable && was_synced(r, f->seq))
            return unusable(r, f);
        uint64_t before = i ? r->found[i - 1].seq : r->committed_seq;
        bool missing = f->usable && f->header.previous_seq > before;
        if (missing && was_synced(r, f->header.previous_seq))
            return is_missing(r->v, f->header.previous_seq);
        if (missing || !f->usable)
            note_damage(r, missing ? f->header.previous_seq : f->seq);
        int err = f->usable ? replay_segment(r, f) : 0;
        if (!err)
            err = adopt(r, f);
        segment_free_journal(&f->journal);
        if (err)
            return err;
    }
    return 0;
}

/* Segments that the store has are not replayed; they go. */
static void unlink_committed(struct volume *v, uint64_t *seqs, int64_t *count, uint64_t committed)
{
    int64_t kept = 0;

    for (int64_t i = 0; i < *count; i++) {
        if (seqs[i] > committed) {
            seqs[kept++] = seqs[i];
            continue;
        }
        char *path = segment_path(v->log.path, seqs[i], ".seg"),
             *mark = segment_path(v->log.path, seqs[i], ".syncfail");
        if (path && mark) {
            disk_unlink(path);
            disk_unlink(mark);
        }
        free(path);
        free(mark);
    }
    *count = kept;
}

static int recover_found(struct recovery *r, const uint64_t *seqs)
{
    struct write_log *log = &r->v->log;
    int err = log->dir.fd >= 0 ? 0 : disk_open(&log->dir, log->path, O_RDONLY | O_DIRECTORY);

    if (err)
        return fail(err, "cannot open the log directory %s: %s", log->path, strerror(-err));
    r->vouch_count = witness_read(log->path, &log->id, r->vouches);
    for (int64_t i = 0; i < r->count && !err; i++) {
        r->found[i].seq = seqs[i];
        r->found[i].file.fd = -1;
        err = open_found(r, &r->found[i]);
    }
    if (err)
        return err;
    set_limits(r);
    err = read_journals(r);
    if (!err)
        err = replay(r);
    if (err)
        return err;
    const struct log_segment *last = log->segments[log->count - 1];
    log->id.seq = last->seq;
    log->previous_end_seq = last->seq;
    log->previous_end = last->end;
    log->vouch_from = max_u64(log->vouch_from, r->damage_end);
    log->dir_unsynced = true; /* whoever made the entries may not have synced them */
    r->out->segments = log->count;
    r->out->last_seq = last->seq;
    return 0;
}

/* Recover what the sequence numbers in r->found are to hold. */
static int recover_segments(struct recovery *r, const uint64_t *seqs)
{
    int err;

    r->found = calloc((size_t)r->count, sizeof(*r->found));
    r->buf = malloc(RECORD_MAX_SECTORS * SECTOR);
    r->vouches = calloc((size_t)r->count * (1 + VOUCHES) + VOUCHES, sizeof(*r->vouches));
    err = r->found && r->buf && r->vouches ? recover_found(r, seqs) : -ENOMEM;
    for (int64_t i = 0; r->found && i < r->count; i++) {
        segment_free_journal(&r->found[i].journal);
        if (r->found[i].file.path)
            disk_close(&r->found[i].file);
    }
    free(r->found);
    free(r->buf);
    free(r->vouches);
    return err;
}

int volume_recover(struct volume *v, uint64_t committed_seq, bool always_verify, struct glide_recovery *out)
{
    uint64_t *seqs;
    struct recovery r = {.v = v, .committed_seq = committed_seq, .always_verify = always_verify, .out = out};

    memset(out, 0, sizeof(*out));
    v->log.id.seq = committed_seq; /* numbers are never used twice */
    r.count = segment_list(v->log.path, &seqs);
    if (r.count < 0)
        return (int)r.count;
    if (v->frozen) {
        r.count -= r.count > 0;
    } else {
        segment_unlink_spares(v->log.path);
        unlink_committed(v, seqs, &r.count, committed_seq);
    }
    int err = v->frozen ? 0 : check_end(&r, seqs, r.count);
    if (!err && r.count)
        err = recover_segments(&r, seqs);
    free(seqs);
    return err;
}

int volume_recover_tail(struct volume *v, struct glide_recovery *out)
{
    const struct write_log *log = &v->log;
    uint64_t *seqs, last = log->count ? log->segments[log->count - 1]->seq : 0;
    struct recovery r = {.v = v, .out = out};
    int64_t first = 0, count = segment_list(log->path, &seqs);

    memset(out, 0, sizeof(*out));
    if (count < 0)
        return (int)count;
    while (first < count && seqs[first] <= last)
        first++;
    r.committed_seq = last ? last : v->committed_seq;
    r.count = count - first;
    int err = check_end(&r, seqs, count);
    if (!err && r.count)
        err = recover_segments(&r, seqs + first);
    free(seqs);
    segment_unlink_spares(log->path);
    return err;
}
