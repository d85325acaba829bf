#include "log/replay.h"

#include "glide_core_internal.h"
#include "log/log_map.h"
#include "base/util.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define ADVICE                                                                                                         \
    "`glidefs logs export --partial` saves what is whole of the log, then `glidefs attach NAME --take-over` serves "   \
    "what the store has"

/* ---- what is lost ------------------------------------------------------------------------------ */

/* The text of fail() is set. */
static int lost(struct replay *r, struct replay_loss loss)
{
    return r->calls->lost ? r->calls->lost(r->arg, &loss) : -EUCLEAN;
}

static int lost_record(struct replay *r, struct replay_segment *f, uint32_t index, const struct segment_record *record)
{
    fail(-EUCLEAN, "%s: record %u was synced but is damaged now (bit rot); " ADVICE, f->file.path, index);
    return lost(r, (struct replay_loss){record ? GLIDE_LOSS_RECORD : GLIDE_LOSS_PLACE, f->seq, index, record});
}

static int lost_segment(struct replay *r, uint64_t seq)
{
    fail(-EUCLEAN, "%s: log segment %016llx, which was synced, is missing; put it back, or: " ADVICE, r->dir,
         (unsigned long long)seq);
    return lost(r, (struct replay_loss){GLIDE_LOSS_SEGMENT, seq, 0, NULL});
}

/* Neither copy of the header is good, though it was synced; or the file is broken. */
static int lost_header(struct replay *r, struct replay_segment *f)
{
    fail(-EUCLEAN, "%s%s; " ADVICE, f->why ? f->why : f->file.path,
         f->broken ? "" : ", but it was synced (bit rot, or files in each other's place)");
    return lost(r, (struct replay_loss){GLIDE_LOSS_HEADER, f->seq, 0, NULL});
}

static void keep_why(struct replay_segment *f)
{
    free(f->why);
    f->why = strdup(glide_error());
    f->usable = false;
}

/* Whether the store has a segment, and nothing is lost with the file. */
static bool store_has(const struct replay *r, const struct replay_segment *f)
{
    return r->calls->drop && f->seq <= r->committed_seq;
}

/* Nothing can be read of a file: the reason `err`, with its text, ends a replay that may lose nothing. */
static int broken(struct replay *r, struct replay_segment *f, int err)
{
    if ((!r->calls->lost && !store_has(r, f)) || err == -ENOMEM)
        return err;
    keep_why(f);
    f->broken = true;
    return 0;
}

/* ---- the first pass ---------------------------------------------------------------------------- */

static int open_segment(struct replay *r, struct replay_segment *f)
{
    struct segment_id id = r->id;
    char *path = segment_path(r->dir, f->seq, ".seg"), *mark = segment_path(r->dir, f->seq, ".syncfail");
    int err = path && mark ? disk_open(&f->file, path, r->adopt ? O_RDWR : O_RDONLY) : -ENOMEM;

    if (err)
        err = fail(err, "cannot open log segment %s: %s", path ? path : "", strerror(-err));
    else
        f->suspect = access(mark, F_OK) == 0;
    free(path);
    free(mark);
    if (err)
        return store_has(r, f) ? broken(r, f, err) : err;
    id.seq = f->seq;
    err = segment_read_header(&f->file, &id, &f->header);
    f->usable = err == 0;
    if (err == -EUCLEAN)
        keep_why(f); /* judged later, against the durable position */
    else if (err)
        err = broken(r, f, err);
    r->vouch_count += segment_read_vouches(&f->file, &id, r->vouches + r->vouch_count);
    if (f->usable && r->repair)
        r->repaired += segment_repair_header(&f->file, &f->header);
    return err == -EUCLEAN ? 0 : err;
}

/* Each header bounds the segment before it. */
static void set_limits(struct replay *r)
{
    for (int64_t i = 0; i < r->count; i++) {
        struct replay_segment *f = &r->segments[i];
        f->limit = UINT32_MAX;
        if (i + 1 < r->count && f[1].usable && f[1].header.previous_seq == f->seq)
            f->limit = f[1].header.previous_end;
    }
}

static int read_journal(struct replay *r, struct replay_segment *f)
{
    segment_free_journal(&f->journal);
    int err = f->usable ? segment_read_journal(&f->file, &f->header, f->limit, &f->journal) : 0;
    return err ? broken(r, f, err) : 0;
}

static int read_journals(struct replay *r)
{
    struct replay_segment *last = &r->segments[r->count - 1];

    for (int64_t i = 0; i < r->count; i++) {
        struct replay_segment *f = &r->segments[i];
        int err = read_journal(r, f);
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
    /* What is read while its volume appends: a vouch may be newer than the page of the journal that was read before. */
    return r->adopt ? 0 : read_journal(r, last);
}

/* ---- holes of segments that the store has ------------------------------------------------------- */

static void look_for_holes(struct replay_segment *f)
{
    struct stat st;

    f->thin = !fstat(f->file.fd, &st) && (uint64_t)st.st_blocks * 512 < (uint64_t)f->journal.end * SECTOR;
    f->data = f->data_end = 0;
}

/* Whether the data of a WRITE is not all there. Records come in ascending order. */
static bool is_passed(struct replay_segment *f, uint32_t index)
{
    const struct segment_record *record = &f->journal.records[index];
    uint64_t from = segment_data_offset(f->journal.sectors, index), to = from + (uint64_t)record->count * SECTOR;

    if (!f->thin || record->op != RECORD_WRITE)
        return false;
    if (from >= f->data_end) {
        off_t data = lseek(f->file.fd, (off_t)from, SEEK_DATA);
        off_t end = data < 0 ? data : lseek(f->file.fd, data, SEEK_HOLE);
        if (end < 0 && errno != ENXIO) { /* nobody can tell */
            f->thin = false;
            return false;
        }
        f->data = end < 0 ? UINT64_MAX : (uint64_t)data; /* ENXIO: there is no data from here on */
        f->data_end = end < 0 ? UINT64_MAX : (uint64_t)end;
    }
    return from < f->data || to > f->data_end;
}

/* ---- the second pass --------------------------------------------------------------------------- */

/* The log position below which everything in segment `seq` is durable. */
static uint64_t durable_for(const struct replay *r, uint64_t seq)
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
static bool was_synced(const struct replay *r, uint64_t seq) { return durable_for(r, seq) > pos_make(seq, 0); }

static void note_damage(struct replay *r, uint64_t seq)
{
    r->damage_end = max_u64(r->damage_end, pos_make(seq + 1, 0));
}

/* The data of a record may be torn only if another boot wrote it, or a sync of it failed. */
static bool must_verify(const struct replay *r, const struct replay_segment *f)
{
    static const uint8_t none[16];

    return r->always_verify || f->suspect || !memcmp(f->header.boot_id, none, 16) ||
           memcmp(f->header.boot_id, segment_boot_id(), 16) != 0;
}

static int replay_record(struct replay *r, struct replay_segment *f, uint32_t index)
{
    struct segment_record *record = &f->journal.records[index];
    uint64_t pos = pos_make(f->seq, index);
    bool verify = record->op == RECORD_WRITE && must_verify(r, f);
    int err = 0;

    if (record->op == RECORD_SYNC || (f->seq <= r->committed_seq && is_passed(f, index)))
        return 0;
    if (verify) {
        err = segment_verify(&f->file, &f->journal, index, r->buf, r->sums);
        r->verified += (uint64_t)record->count * SECTOR;
    }
    if (err == -EUCLEAN && pos >= f->durable) {
        record->op = 0;
        f->journal.valid--;
        f->dropped = true;
        r->dropped++;
        note_damage(r, f->seq);
        return 0;
    }
    if (err && err != -EUCLEAN && !r->calls->lost)
        return err;
    return err ? lost_record(r, f, index, record) : r->calls->record(r->arg, f, index, verify ? r->sums : NULL);
}

/* Below the durable position every index belongs to a valid record. */
static int replay_segment(struct replay *r, struct replay_segment *f)
{
    uint32_t durable_end = 0, end = f->limit != UINT32_MAX ? f->limit : f->journal.end;

    if (pos_seq(f->durable) > f->seq && f->usable)
        durable_end = f->limit != UINT32_MAX ? f->limit : 0; /* sealed early: its end is what the next header says */
    else if (pos_seq(f->durable) == f->seq) /* a vouch of a writer that had lost the log may go beyond the limit */
        durable_end = (uint32_t)min_u64(pos_index(f->durable), f->limit);
    for (uint32_t i = 0; i < f->journal.sectors;) {
        const struct segment_record *record = &f->journal.records[i];
        uint32_t space = record->op == RECORD_WRITE ? record->count : 1;
        int err = 0;
        if (record->op)
            err = replay_record(r, f, i);
        else if (i < durable_end)
            err = lost_record(r, f, i, NULL);
        else if (i < end)
            note_damage(r, f->seq);
        if (err)
            return err;
        i += space;
    }
    return 0;
}

/* Whether every record that a segment ever had is there: its end is named by the next header, or by a vouch. */
static bool is_whole(const struct replay_segment *f)
{
    bool vouched = pos_seq(f->durable) == f->seq;
    uint32_t end = f->limit != UINT32_MAX ? f->limit : vouched ? pos_index(f->durable) : 0, i = 0;

    if (!f->usable || f->suspect || !end || f->journal.end != end)
        return false;
    while (i < end && f->journal.records[i].op)
        i += f->journal.records[i].op == RECORD_WRITE ? f->journal.records[i].count : 1;
    return i >= end;
}

static void drop_committed(struct replay *r, struct replay_segment *f)
{
    r->kept = 0;
    r->calls->drop(r->arg, f);
}

/* A segment that the store has: all of it, or nothing of it and of those before it. */
static int replay_committed(struct replay *r, struct replay_segment *f)
{
    int err = 0;

    if (r->kept && f->usable && f->header.previous_seq != r->kept)
        drop_committed(r, NULL); /* one between them is not here */
    if (!is_whole(f)) {
        drop_committed(r, f);
        return 0;
    }
    for (uint32_t i = 0; i < f->journal.end && !err; i++) {
        uint32_t op = f->journal.records[i].op;
        if ((op == RECORD_WRITE || op == RECORD_ZERO) && !is_passed(f, i))
            err = r->calls->record(r->arg, f, i, NULL);
    }
    r->kept = f->seq;
    return err ? err : r->calls->end(r->arg, f);
}

/* No more of those come: the last one that the store has must be among them. */
static void end_committed(struct replay *r)
{
    if (r->kept && r->kept != r->committed_seq)
        drop_committed(r, NULL);
    r->kept = 0;
}

static int replay_one(struct replay *r, int64_t i)
{
    struct replay_segment *f = &r->segments[i];
    uint64_t before = max_u64(i ? f[-1].seq : 0, r->committed_seq);
    int err = 0;

    f->durable = durable_for(r, f->seq);
    if (f->usable && f->seq <= r->committed_seq)
        look_for_holes(f);
    if (store_has(r, f))
        return replay_committed(r, f);
    end_committed(r);
    bool missing = f->usable && f->header.previous_seq > before;
    if (f->broken || (!f->usable && was_synced(r, f->seq)))
        err = lost_header(r, f);
    if (!err && missing && was_synced(r, f->header.previous_seq))
        err = lost_segment(r, f->header.previous_seq);
    if (missing || !f->usable)
        note_damage(r, missing ? f->header.previous_seq : f->seq);
    if (!err && f->usable)
        err = replay_segment(r, f);
    return err ? err : r->calls->end(r->arg, f);
}

static int replay_all(struct replay *r, const uint64_t *seqs)
{
    int err = 0;

    r->vouch_count = witness_read(r->dir, &r->id, r->vouches);
    for (int64_t i = 0; i < r->count && !err; i++) {
        r->segments[i].seq = seqs[i];
        r->segments[i].file.fd = -1;
        err = open_segment(r, &r->segments[i]);
    }
    if (err)
        return err;
    set_limits(r);
    err = read_journals(r);
    for (int64_t i = 0; i < r->count && !err; i++) {
        err = replay_one(r, i);
        segment_free_journal(&r->segments[i].journal);
    }
    if (!err)
        end_committed(r);
    return err;
}

int replay_run(struct replay *r, const uint64_t *seqs, int64_t count)
{
    if (!count)
        return 0;
    r->count = count;
    r->segments = calloc((size_t)count, sizeof(*r->segments));
    r->buf = malloc(RECORD_MAX_SECTORS * SECTOR);
    r->vouches = calloc((size_t)count * (1 + VOUCHES) + VOUCHES, sizeof(*r->vouches));
    int err = r->segments && r->buf && r->vouches ? replay_all(r, seqs) : -ENOMEM;
    for (int64_t i = 0; r->segments && i < count; i++) {
        segment_free_journal(&r->segments[i].journal);
        free(r->segments[i].why);
        if (r->segments[i].file.path)
            disk_close(&r->segments[i].file);
    }
    free(r->segments);
    free(r->buf);
    free(r->vouches);
    return err;
}

int replay_check_end(struct replay *r, struct witness_file *w)
{
    struct vouch vouches[VOUCHES];
    uint32_t n = witness_read(r->dir, &r->id, vouches);
    int err = 0;

    for (uint32_t i = 0; i < n && !err; i++) {
        uint64_t seq = pos_seq(vouches[i].to);
        char *path = segment_path(r->dir, seq, ".seg");
        if (!path)
            err = -ENOMEM;
        else if (seq > r->committed_seq && access(path, F_OK))
            err = lost_segment(r, seq);
        free(path);
        if (w && seq >= w->seq) {
            w->seq = seq;
            w->slot = i + 1;
        }
    }
    return err;
}
