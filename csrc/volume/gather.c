/*
 * What a range of sealed segments holds, newest version of each sector as of the
 * last of them. Works from the files alone, in the caller's thread: the live map
 * has newer writes, which must not leak into the commit of an older segment.
 *
 * For a volume, each segment must have the records that the volume knows. For those that this process appended, the
 * hashes of their sectors come from its memory, so their data is read once, by whoever asks for it, and verified
 * then; the data of others is verified here. What nobody asks for, because it was overwritten, is not read. Offline,
 * replay.c judges what is bad, as at a start. A record that is lost is mapped like others, so that nothing older is
 * taken for what it held, and left out at the end.
 */
#include "volume/gather.h"

#include "log/log_map.h"
#include "log/replay.h"
#include "log/sector_sums.h"
#include "base/util.h"
#include "volume/volume.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct source {
    uint64_t seq;
    uint32_t end, valid; /* what the volume knows */
    uint32_t sectors;
    struct disk_file file;
    struct sector_sums sums; /* what each sector must be when it is read: known of all before the open ends */
};

/* A record that is lost. */
struct hole {
    uint64_t pos;
    uint32_t count;
};

struct gather {
    struct source *sources;
    uint32_t source_count;
    struct glide_loss *losses;
    struct hole *holes; /* ascending */
    struct glide_sectors *sectors;
    uint64_t loss_count, hole_count, sector_count, torn;
    struct leaf_pool pool;
    struct log_map map;
    struct glide_entry *entries;
    struct glide_extent *extents;
    uint64_t entry_count, extent_count;
};

/* ---- which segments -------------------------------------------------------------------------- */

struct ask {
    struct volume *v;
    uint64_t first, last;
    struct gather *g;
};

static int ask_volume(struct worker *w, void *arg)
{
    struct ask *a = arg;
    struct write_log *log = &a->v->log;

    (void)w;
    a->g->sources = calloc(log->count ? log->count : 1, sizeof(*a->g->sources));
    if (!a->g->sources)
        return -ENOMEM;
    for (uint32_t i = 0; i < log->count; i++) {
        const struct log_segment *s = log->segments[i];
        if (s->seq >= a->first && s->seq <= a->last && s != log->active)
            a->g->sources[a->g->source_count++] = (struct source){
                .seq = s->seq, .end = s->end, .valid = s->valid, .file = {.fd = -1}};
    }
    return 0;
}

/* Of a segment that is retired meanwhile nothing is known: it is verified. */
static int ask_sums(struct worker *w, void *arg)
{
    struct ask *a = arg;
    struct write_log *log = &a->v->log;
    int err = 0;

    (void)w;
    for (uint32_t i = 0, k = 0; i < a->g->source_count && !err; i++) {
        struct source *s = &a->g->sources[i];
        while (k < log->count && log->segments[k]->seq < s->seq)
            k++;
        if (k < log->count && log->segments[k]->seq == s->seq)
            err = sums_copy(&s->sums, &log->segments[k]->sums, s->end);
    }
    return err;
}

static int ask_both(struct ask *a)
{
    int err = worker_call(a->v->worker, ask_volume, a);

    for (uint32_t i = 0; i < a->g->source_count && !err; i++) {
        struct sector_sums *sums = &a->g->sources[i].sums;
        err = sums_reserve(sums, a->g->sources[i].end);
        if (!err && sums->capacity) /* so that the page faults are not the worker's, which has guests */
            memset(sums->sum, 0, sums->capacity * sizeof(*sums->sum));
    }
    return err ? err : worker_call(a->v->worker, ask_sums, a);
}

/* ---- the segments of a volume --------------------------------------------------------------------- */

static int map_record(struct gather *g, struct source *s, const struct segment_record *r, uint32_t index,
                      const uint64_t *sums)
{
    uint64_t pos = pos_make(s->seq, index);

    if (r->op == RECORD_WRITE && sums)
        sums_set(&s->sums, index, sums, r->count);
    return r->op == RECORD_ZERO ? log_map_zero(&g->map, r->sector, r->count, pos)
                                : log_map_write(&g->map, r->sector, r->count, pos);
}

static int replay_source(struct gather *g, struct source *s, const struct segment_header *h, uint8_t *buf)
{
    struct segment_journal j;
    uint64_t sums[RECORD_MAX_SECTORS];
    uint32_t good = 0;
    int err = segment_read_journal(&s->file, h, s->end, &j);

    if (!err)
        err = sums_reserve(&s->sums, j.end);
    for (uint32_t i = 0; !err && i < j.end; i++) {
        const struct segment_record *r = &j.records[i];
        if (!r->op || r->op == RECORD_SYNC)
            continue;
        int known = r->op == RECORD_WRITE ? sums_vouch(&s->sums, i, r->count, r->hash) : 1;
        err = known > 0 ? 0 : known ? known : segment_verify(&s->file, &j, i, buf, sums);
        if (err == -EUCLEAN) { /* torn, or not what was written here; the count tells whether that is allowed */
            err = 0;
            continue;
        }
        if (!err)
            err = map_record(g, s, r, i, known ? NULL : sums);
        good += !err;
    }
    segment_free_journal(&j);
    if (!err && good != s->valid)
        err = fail(-EUCLEAN, "%s: %u of %u records are damaged (bit rot); nothing of it was uploaded", s->file.path,
                   s->valid - good, s->valid);
    return err;
}

static int replay_volume(struct gather *g, const char *dir, struct segment_id *id)
{
    uint8_t *buf = malloc(RECORD_MAX_SECTORS * SECTOR);
    int err = buf ? 0 : -ENOMEM;

    for (uint32_t i = 0; i < g->source_count && !err; i++) {
        struct source *s = &g->sources[i];
        struct segment_header header = {.sectors = 0};
        char *path = segment_path(dir, s->seq, ".seg");
        err = path ? disk_open(&s->file, path, O_RDONLY) : -ENOMEM;
        if (err)
            err = fail(err, "cannot open log segment %s: %s", path ? path : "", strerror(-err));
        free(path);
        id->seq = s->seq;
        if (!err && s->end)
            err = segment_read_header(&s->file, id, &header);
        s->sectors = header.sectors;
        if (!err && s->sectors)
            err = replay_source(g, s, &header, buf);
    }
    free(buf);
    return err;
}

/* ---- offline -------------------------------------------------------------------------------------- */

/* Room for one more; they grow by the power of two. NULL = no memory, the old ones stay. */
static void *grown(void *items, uint64_t count, size_t size)
{
    return count & (count - 1) ? items : realloc(items, (count ? 2 * count : 1) * size);
}

static struct source *source_of(struct gather *g, uint64_t seq)
{
    if (!g->source_count || g->sources[g->source_count - 1].seq != seq)
        g->sources[g->source_count++] = (struct source){.seq = seq, .file = {.fd = -1}};
    return &g->sources[g->source_count - 1];
}

static int take_record(void *arg, struct replay_segment *f, uint32_t index, const uint64_t *sums)
{
    struct gather *g = arg;
    struct source *s = source_of(g, f->seq);
    int err = s->sums.capacity ? 0 : sums_reserve(&s->sums, f->journal.end);

    return err ? err : map_record(g, s, &f->journal.records[index], index, sums);
}

static int take_file(void *arg, struct replay_segment *f)
{
    struct source *s = source_of(arg, f->seq);

    s->sectors = f->usable ? f->header.sectors : 0;
    s->file = f->file;
    f->file.fd = -1;
    f->file.path = NULL;
    return 0;
}

static int note_loss(void *arg, const struct replay_loss *lost)
{
    struct gather *g = arg;
    struct glide_loss *l = NULL;

    for (uint64_t i = g->loss_count; i-- > 0 && !l;) {
        if (g->losses[i].seq == lost->seq && g->losses[i].kind == lost->kind)
            l = &g->losses[i];
    }
    if (!l) {
        struct glide_loss *losses = grown(g->losses, g->loss_count, sizeof(*losses));
        if (!losses)
            return -ENOMEM;
        g->losses = losses;
        l = &losses[g->loss_count++];
        *l = (struct glide_loss){.seq = lost->seq, .kind = lost->kind};
        snprintf(l->why, sizeof(l->why), "%s", glide_error());
    }
    l->count++;
    if (!lost->record)
        return 0;
    struct hole *holes = grown(g->holes, g->hole_count, sizeof(*holes));
    if (!holes)
        return -ENOMEM;
    g->holes = holes;
    holes[g->hole_count] = (struct hole){pos_make(lost->seq, lost->index), lost->record->count};
    return log_map_write(&g->map, lost->record->sector, lost->record->count, holes[g->hole_count++].pos);
}

static const struct replay_calls OFFLINE = {.record = take_record, .end = take_file, .lost = note_loss};

static int replay_directory(struct gather *g, const char *dir, const struct segment_id *id, uint64_t first,
                            uint64_t last, uint64_t committed)
{
    struct replay r = {.dir = dir, .id = *id, .always_verify = true, .calls = &OFFLINE, .arg = g};
    uint64_t *seqs;
    int64_t from = 0, count = segment_list(dir, &seqs);

    if (count < 0)
        return (int)count;
    bool empty = count == 0;
    while (count && seqs[count - 1] > last)
        count--;
    while (from < count && seqs[from] < first)
        from++;
    r.committed_seq = committed != UINT64_MAX ? committed : empty ? 0 : seqs[0] - 1;
    g->sources = calloc((size_t)(count - from) + 1, sizeof(*g->sources));
    int err = g->sources ? replay_run(&r, seqs + from, count - from) : -ENOMEM;
    if (from < count) /* they go from the first on: behind one that is there, none is gone because the store has it */
        r.committed_seq = min_u64(r.committed_seq, seqs[from] - 1);
    if (!err && last == UINT64_MAX)
        err = replay_check_end(&r, NULL);
    g->torn = r.dropped;
    free(seqs);
    return err;
}

/* The record that is lost and has this position, or NULL. */
static const struct hole *hole_at(const struct gather *g, uint64_t pos)
{
    uint64_t low = 0, high = g->hole_count;

    while (low < high) {
        uint64_t middle = (low + high) / 2;
        if (g->holes[middle].pos + g->holes[middle].count <= pos)
            low = middle + 1;
        else
            high = middle;
    }
    return low < g->hole_count && g->holes[low].pos <= pos ? &g->holes[low] : NULL;
}

void glide_gather_damage(glide_gather *g, struct glide_damage *out)
{
    *out = (struct glide_damage){.losses = g->losses,
                                 .sectors = g->sectors,
                                 .loss_count = g->loss_count,
                                 .sector_count = g->sector_count,
                                 .torn = g->torn};
}

/* ---- result ---------------------------------------------------------------------------------------- */

static bool add_entry(uint64_t block, uint64_t value, void *arg)
{
    struct gather *g = arg;
    const struct log_leaf *leaf = (const struct log_leaf *)(uintptr_t)value;
    struct glide_entry *e = &g->entries[g->entry_count++];

    uint32_t lost = 0;

    *e = (struct glide_entry){.block = block};
    for (uint32_t i = 0; i < BLOCK_SECTORS; i++) {
        if (leaf->pos[i])
            *(leaf->pos[i] & POS_ZERO ? &e->zero_mask : hole_at(g, leaf->pos[i]) ? &lost : &e->mask) |= 1u << i;
    }
    if (zero_map_find(&g->map.zeros, block))
        e->zero_mask = ~(e->mask | lost);
    return false;
}

static int by_block(const void *a, const void *b)
{
    uint64_t x = ((const struct glide_entry *)a)->block, y = ((const struct glide_entry *)b)->block;
    return x < y ? -1 : x > y;
}

/* Zero extents without the blocks that have an entry. */
static void add_extents(struct gather *g)
{
    struct zero_extent e;
    uint64_t i = 0;

    for (uint64_t at = 0; zero_map_next(&g->map.zeros, at, &e);) {
        uint64_t start = max_u64(at, e.start);
        while (i < g->entry_count && g->entries[i].block < start)
            i++;
        uint64_t stop = i < g->entry_count ? min_u64(e.end, g->entries[i].block) : e.end;
        if (stop > start)
            g->extents[g->extent_count++] = (struct glide_extent){start, stop - start};
        at = stop < e.end ? stop + 1 : e.end;
    }
}

/* The sectors of a block whose newest data is lost; all blocks ascending. */
static int add_lost(struct gather *g, uint64_t block)
{
    const uint64_t *pos = log_map_view(&g->map, block).pos;

    for (uint32_t i = 0; i < BLOCK_SECTORS; i++) {
        uint64_t sector = block * BLOCK_SECTORS + i;
        struct glide_sectors *last = g->sector_count ? &g->sectors[g->sector_count - 1] : NULL;
        if (!pos[i] || pos[i] & POS_ZERO || !hole_at(g, pos[i]))
            continue;
        if (last && last->sector + last->count == sector) {
            last->count++;
            continue;
        }
        struct glide_sectors *sectors = grown(g->sectors, g->sector_count, sizeof(*sectors));
        if (!sectors)
            return -ENOMEM;
        g->sectors = sectors;
        sectors[g->sector_count++] = (struct glide_sectors){sector, 1};
    }
    return 0;
}

static int summarize(struct gather *g)
{
    uint64_t leaves = table_count(&g->map.leaves);

    g->entries = calloc(leaves + 1, sizeof(*g->entries));
    g->extents = calloc(leaves + g->map.zeros.count + 1, sizeof(*g->extents));
    if (!g->entries || !g->extents)
        return fail(-ENOMEM, "no memory to gather %llu blocks", (unsigned long long)leaves);
    table_filter(&g->map.leaves, add_entry, g);
    qsort(g->entries, g->entry_count, sizeof(*g->entries), by_block);
    add_extents(g);
    int err = 0;
    for (uint64_t i = 0; i < g->entry_count && g->hole_count && !err; i++)
        err = add_lost(g, g->entries[i].block);
    return err;
}

int glide_gather_open(glide_volume *volume, const char *log_dir, const uint8_t *volume_id, const uint8_t *log_id,
                      uint64_t first, uint64_t last, uint64_t committed, glide_gather **out)
{
    struct gather *g = calloc(1, sizeof(*g));
    struct segment_id id;
    struct ask ask = {volume, first, last, g};

    *out = NULL;
    if (!g)
        return -ENOMEM;
    memcpy(id.volume_id, volume_id, 16);
    memcpy(id.log_id, log_id, 16);
    leaf_pool_init(&g->pool);
    log_map_init(&g->map, &g->pool);
    int err = volume ? ask_both(&ask) : replay_directory(g, log_dir, &id, first, last, committed);
    if (!err && volume)
        err = replay_volume(g, log_dir, &id);
    if (!err)
        err = summarize(g);
    if (err)
        glide_gather_close(g);
    else
        *out = g;
    return err;
}

uint64_t glide_gather_entries(glide_gather *g, const struct glide_entry **out)
{
    *out = g->entries;
    return g->entry_count;
}

uint64_t glide_gather_extents(glide_gather *g, const struct glide_extent **out)
{
    *out = g->extents;
    return g->extent_count;
}

uint64_t glide_gather_bytes(glide_gather *g, uint64_t first, uint64_t count)
{
    uint64_t sectors = 0;

    for (uint64_t i = first; i < first + count && i < g->entry_count; i++)
        sectors += (uint64_t)__builtin_popcount(g->entries[i].mask);
    return sectors * SECTOR;
}

static struct source *find_source(const struct gather *g, uint64_t seq)
{
    for (uint32_t i = 0; i < g->source_count; i++) {
        if (g->sources[i].seq == seq)
            return &g->sources[i];
    }
    return NULL;
}

static int read_run(struct source *s, uint32_t index, uint8_t *buf, uint64_t length)
{
    uint64_t got;
    int err = disk_read(&s->file, buf, length, segment_data_offset(s->sectors, index), &got);

    if (err)
        return fail(err, "cannot read %s", s->file.path);
    if (got == length && sums_check(&s->sums, index, index + (uint32_t)(length / SECTOR), buf))
        return 0;
    return fail(-EUCLEAN, "%s: what was written at %u is damaged (bit rot, or the disk lost it); nothing was uploaded",
                s->file.path, index);
}

int gather_read(const struct gather *g, uint64_t block, uint32_t mask, uint8_t *out)
{
    const uint64_t *pos = log_map_view(&g->map, block).pos;

    for (uint32_t i = 0; i < BLOCK_SECTORS;) {
        if (!(mask >> i & 1)) {
            i++;
            continue;
        }
        uint32_t n = 1;
        while (i + n < BLOCK_SECTORS && mask >> (i + n) & 1 && pos[i + n] == pos[i] + n)
            n++;
        struct source *s = find_source(g, pos_seq(pos[i]));
        int err = s ? read_run(s, pos_index(pos[i]), out, (uint64_t)n * SECTOR) : -EUCLEAN;
        if (err)
            return err;
        out += (uint64_t)n * SECTOR;
        i += n;
    }
    return 0;
}

int glide_gather_fill(glide_gather *g, uint64_t first, uint64_t count, void *buf, uint64_t length)
{
    uint8_t *at = buf;

    if (first > g->entry_count || count > g->entry_count - first || glide_gather_bytes(g, first, count) > length)
        return fail(-EINVAL, "entries out of range");
    for (uint64_t i = first; i < first + count; i++) {
        const struct glide_entry *e = &g->entries[i];
        int err = gather_read(g, e->block, e->mask, at);
        if (err)
            return err;
        at += (uint64_t)__builtin_popcount(e->mask) * SECTOR;
    }
    return 0;
}

void glide_gather_close(glide_gather *g)
{
    for (uint32_t i = 0; i < g->source_count; i++) {
        if (g->sources[i].file.fd >= 0)
            disk_close(&g->sources[i].file);
        sums_free(&g->sources[i].sums);
    }
    log_map_destroy(&g->map);
    leaf_pool_destroy(&g->pool);
    free(g->sources);
    free(g->entries);
    free(g->extents);
    free(g->losses);
    free(g->holes);
    free(g->sectors);
    free(g);
}
