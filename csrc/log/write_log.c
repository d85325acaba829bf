#include "log/write_log.h"

#include "base/data_hash.h"
#include "base/space.h"
#include "base/util.h"
#include "log/log_dir.h"

#include <stdlib.h>
#include <string.h>

static const uint8_t zero_sector[SECTOR];

/* ---- open, close ---------------------------------------------------------------------- */

int log_open(struct write_log *log, struct log_budget *budget, const char *path, const uint8_t *volume_id,
             const uint8_t *log_id)
{
    memset(log, 0, sizeof(*log));
    log->budget = budget;
    log->dir.fd = -1;
    witness_init(&log->witness);
    memcpy(log->id.volume_id, volume_id, 16);
    memcpy(log->id.log_id, log_id, 16);
    log->path = strdup(path);
    return log->path ? 0 : -ENOMEM;
}

static int need_dir(struct write_log *log)
{
    return log->dir.fd >= 0 ? 0 : log_dir_open(&log->dir, log->path, &log->witness);
}

static void charge(struct write_log *log, struct log_segment *s, uint64_t bytes)
{
    s->used += bytes;
    if (s->used <= s->bytes)
        return; /* space of its former life */
    uint64_t more = s->used - s->bytes;
    s->bytes += more;
    log->bytes += more;
    log->room -= min_u64(log->room, more);
    atomic_fetch_add(&log->budget->used, more);
}

static void discharge(struct write_log *log, uint64_t bytes)
{
    log->bytes -= bytes;
    atomic_fetch_sub(&log->budget->used, bytes);
}

static void forget(struct write_log *log, struct log_segment *s)
{
    discharge(log, s->bytes);
    disk_close(&s->file);
    sums_free(&s->sums);
    free(s);
}

/* The warmest spare. Its bytes stay charged. */
static struct disk_file take_spare(struct write_log *log, uint64_t *bytes)
{
    uint32_t last = --log->spare_count;

    *bytes = log->spare_bytes[last];
    atomic_fetch_sub(&log->budget->spare, *bytes);
    return log->spares[last];
}

/* Close a spare, and give its space back. */
static void close_spare(struct write_log *log, struct disk_file file, uint64_t bytes, bool ours)
{
    if (ours)
        disk_unlink(file.path);
    disk_close(&file);
    discharge(log, bytes);
}

static bool close_spares(struct write_log *log, bool ours)
{
    bool any = log->spare_count > 0;
    uint64_t bytes;

    while (log->spare_count) {
        struct disk_file file = take_spare(log, &bytes);
        close_spare(log, file, bytes, ours);
    }
    return any;
}

bool log_drop_spares(struct write_log *log) { return close_spares(log, true); }

void log_close(struct write_log *log, bool ours)
{
    close_spares(log, ours);
    for (uint32_t i = 0; i < log->count; i++)
        forget(log, log->segments[i]);
    free(log->segments);
    disk_close(&log->dir);
    witness_close(&log->witness);
    free(log->path);
    memset(log, 0, sizeof(*log));
    log->dir.fd = -1;
}

/* ---- the list of segments ----------------------------------------------------------------- */

struct log_segment *log_find(const struct write_log *log, uint64_t seq)
{
    uint32_t low = 0, high = log->count;

    while (low < high) {
        uint32_t middle = (low + high) / 2;
        if (log->segments[middle]->seq < seq)
            low = middle + 1;
        else
            high = middle;
    }
    return low < log->count && log->segments[low]->seq == seq ? log->segments[low] : NULL;
}

static struct log_segment *add_segment(struct write_log *log, uint64_t seq, struct disk_file file, uint32_t sectors)
{
    if (log->count == log->capacity) {
        uint32_t capacity = log->capacity ? log->capacity * 2 : 8;
        struct log_segment **more = realloc(log->segments, capacity * sizeof(struct log_segment *));
        if (!more)
            return NULL;
        log->segments = more;
        log->capacity = capacity;
    }
    struct log_segment *s = calloc(1, sizeof(*s));
    if (!s)
        return NULL;
    s->seq = seq;
    s->file = file;
    s->sectors = sectors;
    log->segments[log->count++] = s;
    return s;
}

static uint64_t record_bytes(uint32_t sectors) { return sectors * (uint64_t)(SECTOR + sizeof(struct segment_record)); }

struct log_segment *log_adopt(struct write_log *log, uint64_t seq, struct disk_file file, uint32_t sectors,
                              uint32_t end, uint32_t valid)
{
    struct log_segment *s = add_segment(log, seq, file, sectors);

    if (!s)
        return NULL;
    s->end = end;
    s->valid = valid;
    s->unsynced = true;
    charge(log, s, SEGMENT_HEAD + record_bytes(end));
    return s;
}

static void unlist(struct write_log *log, const struct log_segment *s)
{
    for (uint32_t i = 0; i < log->count; i++) {
        if (log->segments[i] == s) {
            memmove(&log->segments[i], &log->segments[i + 1], (log->count - i - 1) * sizeof(struct log_segment *));
            log->count--;
            break;
        }
    }
    if (log->active == s)
        log->active = NULL;
}

/* A file, charged already, is kept for the next segment. */
static void put_spare(struct write_log *log, struct disk_file file, uint64_t bytes)
{
    log->dir_unsynced = true;
    log->spares[log->spare_count] = file;
    log->spare_bytes[log->spare_count++] = bytes;
    atomic_fetch_add(&log->budget->spare, bytes);
}

/* Keep the file of a full segment, under a name that recovery does not replay. */
static bool make_spare(struct write_log *log, struct log_segment *s)
{
    const struct log_budget *b = log->budget;
    bool full = s->sectors == b->segment_sectors && s->end >= s->sectors / 4 * 3;

    if (!full || log_scarce(b, 0) || s->sync_failed || s->thin || log->spare_count == LOG_SPARES)
        return false;
    char *path = segment_path(log->path, s->seq, ".spare");
    bool kept = path && !disk_rename(&s->file, path);
    free(path);
    if (!kept)
        return false;
    put_spare(log, s->file, s->bytes);
    return true;
}

void log_add_spare(struct write_log *log, struct disk_file file, uint64_t bytes)
{
    log->bytes += bytes;
    atomic_fetch_add(&log->budget->used, bytes);
    put_spare(log, file, bytes);
}

void log_thinned(struct write_log *log, struct log_segment *s, uint32_t live, uint64_t freed)
{
    uint64_t most = s->bytes - min_u64(s->bytes, SEGMENT_HEAD + segment_journal_bytes(s->sectors));

    freed = min_u64(freed, most);
    s->thin = true;
    s->thin_live = live;
    s->bytes -= freed;
    discharge(log, freed);
}

void log_forget(struct write_log *log, struct log_segment *s)
{
    unlist(log, s);
    forget(log, s);
}

bool log_retire(struct write_log *log, struct log_segment *s)
{
    bool spare = make_spare(log, s);

    if (!spare) {
        log_forget(log, s);
        return false;
    }
    unlist(log, s); /* its file and its charge live on */
    sums_free(&s->sums);
    free(s);
    return true;
}

/* ---- segments come and go ------------------------------------------------------------------- */

/* A file for the next segment: a spare of this log, or a new one. *bytes = what is charged for it already. */
static int next_file(struct write_log *log, const char *path, struct disk_file *file, uint64_t *bytes)
{
    *bytes = 0;
    if (log->spare_count) {
        struct disk_file spare = take_spare(log, bytes);
        if (!disk_rename(&spare, path)) {
            *file = spare;
            return 0;
        }
        close_spare(log, spare, *bytes, true);
        *bytes = 0;
    }
    return disk_create(file, path);
}

static int open_segment(struct write_log *log)
{
    struct segment_id id = log->id;
    uint32_t sectors = log->budget->segment_sectors;
    struct disk_file file;
    uint64_t bytes;
    int err = need_dir(log);

    if (err)
        return err;
    log->no_room = !log->spare_count &&
                   !(space_has(log->dir.fd, SEGMENT_HEAD, 1, &log->room) && space_has_files(log->dir.fd));
    if (log->no_room)
        return -ENOSPC;
    id.seq++;
    char *path = segment_path(log->path, id.seq, ".seg");
    if (!path)
        return -ENOMEM;
    err = next_file(log, path, &file, &bytes);
    if (!err) {
        log->dir_unsynced = true;
        err = segment_write_header(&file, &id, sectors, log->previous_end_seq, log->previous_end);
        struct log_segment *s = err ? NULL : add_segment(log, id.seq, file, sectors);
        if (s) {
            log->active = s;
            log->id.seq = id.seq;
            s->unsynced = true;
            s->first_ns = clock_ns(CLOCK_REALTIME);
            s->counted = true;
            s->bytes = bytes;
            charge(log, s, SEGMENT_HEAD);
        } else {
            err = err ? err : -ENOMEM;
            disk_unlink(path);
            disk_close(&file);
            discharge(log, bytes);
        }
    }
    free(path);
    return err;
}

int log_need_room(struct write_log *log)
{
    if (log->active && log_room(log) == 0)
        log_seal(log);
    return log->active ? 0 : open_segment(log);
}

void log_seal(struct write_log *log)
{
    struct log_segment *s = log->active;

    if (!s)
        return;
    log->active = NULL;
    if (s->end == 0) { /* nothing was ever written: leave no trace, its number is not used again */
        disk_unlink(s->file.path);
        unlist(log, s);
        forget(log, s);
        return;
    }
    s->unsynced |= s->noted; /* the next header counts that record in: it must not go missing */
    log->previous_end_seq = s->seq;
    log->previous_end = s->end;
}

uint64_t log_sealed_seq(const struct write_log *log)
{
    uint32_t n = log->active ? log->count - 1 : log->count;

    return n ? log->segments[n - 1]->seq : 0;
}

uint64_t log_position(const struct write_log *log)
{
    return log->active ? pos_make(log->active->seq, log->active->end) : pos_make(log->id.seq + 1, 0);
}

void log_mark_sync_failed(struct write_log *log, struct log_segment *s)
{
    struct disk_file file;
    char *path = segment_path(log->path, s->seq, ".syncfail");

    s->sync_failed = true;
    if (path && !disk_create(&file, path)) {
        disk_sync(&file, DISK_SYNC_BEGIN); /* best effort: the disk is failing */
        disk_close(&file);
        log->dir_unsynced = true;
    }
    free(path);
}

/* ---- append ------------------------------------------------------------------------------------- */

/*
 * Space is shared by dynamic thresholds (Choudhury and Hahne 1998): a log may hold up to 16 times what is
 * still free, so one writer alone gets 16/17 of the limit, and many leave some for a newcomer. The mark at which
 * committed segments begin to go is well below: writing/retire.py.
 */
bool log_may_grow(struct write_log *log, uint32_t sectors)
{
    const struct log_budget *b = log->budget;
    const struct log_segment *s = log->active;
    log->no_room = false;
    if (s && s->used + record_bytes(sectors) <= s->bytes)
        return true; /* its space is charged already */
    uint64_t used = atomic_load_explicit(&b->used, memory_order_relaxed);
    uint64_t after = used + record_bytes(sectors) + SEGMENT_HEAD;

    if (after > b->limit)
        return false;
    uint64_t floor = min_u64(record_bytes(b->segment_sectors), b->limit / 16);
    if (log->bytes >= floor && log->bytes > 16 * (b->limit - after))
        return false;
    log->no_room = !space_has(log->dir.fd, record_bytes(sectors), 1, &log->room);
    return !log->no_room;
}

/* Fill the journal entries and the data vector for pieces that start at index `at`; returns sectors taken. */
static uint32_t build(struct write_log *log, struct append_scratch *x, struct append_piece *pieces, uint32_t count,
                      uint32_t at)
{
    struct segment_id id = log->id;
    uint32_t taken = 0;

    id.seq = log->active->seq;
    uint64_t salt = segment_salt(&id);
    for (uint32_t i = 0; i < count; i++) {
        struct append_piece *p = &pieces[i];
        uint32_t space = p->op == RECORD_WRITE ? p->count : 1;
        struct segment_record *r = &x->records[taken];
        memset(r, 0, space * sizeof(*r));
        r->sector = p->sector;
        r->count = p->count;
        r->op = p->op;
        const uint8_t *data = p->op == RECORD_WRITE ? p->data : zero_sector;
        if (p->op == RECORD_WRITE)
            r->hash = record_hash(data, space, &x->sums[taken]);
        segment_record_seal(r, salt, at + taken);
        x->iov[i] = (struct iovec){(void *)(uintptr_t)data, (size_t)space * SECTOR};
        p->pos = pos_make(log->active->seq, at + taken);
        taken += space;
    }
    return taken;
}

int log_append(struct write_log *log, struct append_scratch *x, struct append_piece *pieces, uint32_t count)
{
    struct log_segment *s = log->active;
    uint32_t at = s->end, taken = build(log, x, pieces, count, at);
    struct iovec journal = {x->records, taken * sizeof(struct segment_record)};

    if (sums_reserve(&s->sums, at + taken))
        return -ENOMEM;
    s->unsynced = true; /* before the bytes: a sync that begins from here on covers them */
    int err = disk_pwritev(&s->file, x->iov, (int)count, segment_data_offset(s->sectors, at));
    if (!err)
        err = disk_pwritev(&s->file, &journal, 1, segment_record_offset(at));
    if (err) {
        log_seal(log);
        return err;
    }
    s->end += taken;
    s->valid += count;
    for (uint32_t i = 0; i < count; i++) {
        uint32_t index = pos_index(pieces[i].pos);
        if (pieces[i].op == RECORD_WRITE)
            sums_set(&s->sums, index, &x->sums[index - at], pieces[i].count);
    }
    charge(log, s, record_bytes(taken));
    return 0;
}

static void append_sync_record(struct write_log *log, uint64_t pos)
{
    struct log_segment *s = log->active;
    struct segment_record r = {.op = RECORD_SYNC, .sector = pos, .hash = log->vouch_from};
    struct iovec iov = {&r, sizeof(r)};

    if (!s || log_room(log) < 2) /* leave the last index to data: a sync record is only a witness */
        return;
    struct segment_id id = log->id;
    id.seq = s->seq;
    segment_record_seal(&r, segment_salt(&id), s->end);
    if (disk_pwritev(&s->file, &iov, 1, segment_record_offset(s->end))) {
        log_seal(log);
        return;
    }
    s->end++;
    s->noted = true;
    charge(log, s, sizeof(r));
}

/* The segment of the newest record below pos. */
static struct log_segment *newest_below(const struct write_log *log, uint64_t pos)
{
    for (uint32_t i = log->count; i-- > 0;) {
        struct log_segment *s = log->segments[i];
        if (s->end && pos_make(s->seq, 0) < pos)
            return s;
    }
    return NULL;
}

void log_note_sync(struct write_log *log, uint64_t pos)
{
    struct log_segment *s = newest_below(log, pos);

    if (s) { /* before the SYNC record, which may be its next */
        struct vouch vouch = {log->vouch_from, s->seq == pos_seq(pos) ? pos : pos_make(s->seq, s->end)};
        struct segment_id id = log->id;
        id.seq = s->seq;
        if (vouch.from < vouch.to) {
            segment_write_vouch(&s->file, &id, log->vouch_slot++, &vouch);
            witness_note(&log->witness, log->path, &id, &vouch);
        }
    }
    append_sync_record(log, pos);
}
