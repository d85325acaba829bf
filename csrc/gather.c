/*
 * What a range of sealed segments holds, newest version of each sector as of the
 * last of them. Works from the files alone, in the caller's thread: the live map
 * has newer writes, which must not leak into the commit of an older segment.
 */
#include "glide_core_internal.h"
#include "log_map.h"
#include "sector_sums.h"
#include "util.h"
#include "volume.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>

struct source {
    uint64_t seq;
    uint32_t end, valid; /* what the volume knows; UINT32_MAX offline */
    uint32_t sectors;
    struct disk_file file;
    struct sector_sums sums; /* of what was verified: the disk may have lost it by the time it is read again */
};

struct gather {
    struct source *sources;
    uint32_t source_count;
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
            a->g->sources[a->g->source_count++] = (struct source){.seq = s->seq, .end = s->end, .valid = s->valid};
    }
    return 0;
}

static int ask_directory(struct gather *g, const char *dir, uint64_t first, uint64_t last)
{
    uint64_t *seqs;
    int64_t count = segment_list(dir, &seqs);

    if (count < 0)
        return (int)count;
    g->sources = calloc((size_t)count + 1, sizeof(*g->sources));
    for (int64_t i = 0; g->sources && i < count; i++) {
        if (seqs[i] >= first && seqs[i] <= last)
            g->sources[g->source_count++] = (struct source){.seq = seqs[i], .end = UINT32_MAX, .valid = UINT32_MAX};
    }
    free(seqs);
    return g->sources ? 0 : -ENOMEM;
}

/* ---- replay ------------------------------------------------------------------------------------- */

static int replay_record(struct gather *g, struct source *s, struct segment_journal *j, uint32_t i, uint8_t *buf,
                         uint32_t *good)
{
    const struct segment_record *r = &j->records[i];
    uint64_t pos = pos_make(s->seq, i), sums[RECORD_MAX_SECTORS];
    int err = 0;

    if (r->op == RECORD_SYNC)
        return 0;
    if (r->op == RECORD_WRITE)
        err = segment_verify(&s->file, j, i, buf, sums);
    if (err == -EUCLEAN) /* torn; the count tells whether that is allowed */
        return 0;
    if (!err && r->op == RECORD_WRITE)
        sums_set(&s->sums, i, sums, r->count);
    if (!err)
        err = r->op == RECORD_ZERO ? log_map_zero(&g->map, r->sector, r->count, pos)
                                   : log_map_write(&g->map, r->sector, r->count, pos);
    *good += !err;
    return err;
}

static int replay_source(struct gather *g, struct source *s, const struct segment_header *h, uint8_t *buf)
{
    struct segment_journal j;
    uint32_t good = 0;
    int err = segment_read_journal(&s->file, h, s->end, &j);

    if (!err)
        err = sums_reserve(&s->sums, j.end);
    for (uint32_t i = 0; !err && i < j.end; i++) {
        if (j.records[i].op)
            err = replay_record(g, s, &j, i, buf, &good);
    }
    segment_free_journal(&j);
    if (!err && s->valid != UINT32_MAX && good != s->valid)
        err = fail(-EUCLEAN, "%s: %u of %u records are damaged (bit rot); nothing of it was uploaded", s->file.path,
                   s->valid - good, s->valid);
    return err;
}

static int replay_all(struct gather *g, const char *dir, struct segment_id *id, bool offline)
{
    struct segment_header *headers = calloc(g->source_count + 1, sizeof(*headers));
    uint8_t *buf = malloc(RECORD_MAX_SECTORS * SECTOR);
    int err = headers && buf ? 0 : -ENOMEM;

    for (uint32_t i = 0; i < g->source_count && !err; i++) {
        struct source *s = &g->sources[i];
        char *path = segment_path(dir, s->seq, ".seg");
        err = path ? disk_open(&s->file, path, O_RDONLY) : -ENOMEM;
        if (err)
            err = fail(err, "cannot open log segment %s: %s", path ? path : "", strerror(-err));
        free(path);
        id->seq = s->seq;
        if (!err && s->end)
            err = segment_read_header(&s->file, id, &headers[i]);
        if (offline && err == -EUCLEAN) {
            headers[i].sectors = 0; /* nothing to be had from it */
            err = 0;
        }
        s->sectors = headers[i].sectors;
        if (offline && i && s->sectors && headers[i].previous_seq == g->sources[i - 1].seq)
            g->sources[i - 1].end = headers[i].previous_end;
    }
    for (uint32_t i = 0; i < g->source_count && !err; i++) {
        if (g->sources[i].sectors)
            err = replay_source(g, &g->sources[i], &headers[i], buf);
    }
    free(headers);
    free(buf);
    return err;
}

/* ---- result ---------------------------------------------------------------------------------------- */

static bool add_entry(uint64_t block, uint64_t value, void *arg)
{
    struct gather *g = arg;
    const struct log_leaf *leaf = (const struct log_leaf *)(uintptr_t)value;
    struct glide_entry *e = &g->entries[g->entry_count++];

    *e = (struct glide_entry){.block = block};
    for (uint32_t i = 0; i < BLOCK_SECTORS; i++) {
        if (leaf->pos[i])
            *(leaf->pos[i] & POS_ZERO ? &e->zero_mask : &e->mask) |= 1u << i;
    }
    if (zero_map_find(&g->map.zeros, block))
        e->zero_mask = ~e->mask;
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
    return 0;
}

int glide_gather_open(glide_volume *volume, const char *log_dir, const uint8_t *volume_id, const uint8_t *log_id,
                      uint64_t first, uint64_t last, glide_gather **out)
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
    int err = volume ? worker_call(volume->worker, ask_volume, &ask) : ask_directory(g, log_dir, first, last);
    for (uint32_t i = 0; i < g->source_count; i++)
        g->sources[i].file.fd = -1;
    if (!err)
        err = replay_all(g, log_dir, &id, volume == NULL);
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

static struct source *find_source(struct gather *g, uint64_t seq)
{
    for (uint32_t i = 0; i < g->source_count; i++) {
        if (g->sources[i].seq == seq)
            return &g->sources[i];
    }
    return NULL;
}

static int read_run(struct source *s, uint32_t index, uint8_t *buf, uint64_t length)
{
    for (uint64_t done = 0; done < length;) {
        ssize_t n = pread(s->file.fd, buf + done, length - done,
                          (off_t)(segment_data_offset(s->sectors, index) + done));
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return fail(n ? -errno : -EIO, "cannot read %s", s->file.path);
        done += (uint64_t)n;
    }
    if (sums_check(&s->sums, index, index + (uint32_t)(length / SECTOR), buf))
        return 0;
    return fail(-EUCLEAN, "%s: the disk lost data that it had a moment ago; nothing of it was uploaded", s->file.path);
}

static int fill_entry(struct gather *g, const struct glide_entry *e, uint8_t **buf)
{
    const uint64_t *pos = log_map_view(&g->map, e->block).pos;

    for (uint32_t i = 0; i < BLOCK_SECTORS;) {
        if (!(e->mask >> i & 1)) {
            i++;
            continue;
        }
        uint32_t n = 1;
        while (i + n < BLOCK_SECTORS && pos[i + n] == pos[i] + n)
            n++;
        struct source *s = find_source(g, pos_seq(pos[i]));
        int err = s ? read_run(s, pos_index(pos[i]), *buf, (uint64_t)n * SECTOR) : -EUCLEAN;
        if (err)
            return err;
        *buf += (uint64_t)n * SECTOR;
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
        int err = fill_entry(g, &g->entries[i], &at);
        if (err)
            return err;
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
    free(g);
}
