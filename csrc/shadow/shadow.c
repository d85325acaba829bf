/*
 * Shadow verify: a second source of a volume's content, with which every READ is compared before its reply is sent. A
 * debug option, made to find where wrong bytes come from; it changes no reply.
 *
 * The second source is a sparse file. What guests write goes into it where the log map is updated, so in the order of
 * log positions, and of the requests' own memory: it shares neither log nor maps nor block cache with what it verifies.
 * A bitmap says which sectors it knows. At open these are the sectors of the log, which Python reads from the segments;
 * the others are what the store had then. A READ of such sectors waits while Python reads them from there, past block
 * cache and maps (GLIDE_SHADOW_FILL, glide_shadow_fill).
 *
 * A READ may return a sector as it was at any time since it began. What is written in between is marked in every READ
 * under way (struct shadow_read) and left out of its comparison, so a difference is never a matter of timing.
 *
 * While a volume is frozen for a handoff no READ waits: those that do are let go before, and none begins to.
 *
 * Everything belongs to the volume's worker, which reads and writes the file in place: with this option, and nowhere
 * else, a worker may wait for a disk. When the file fails, the shadow ends (`broken`) and the volume goes on without.
 */
#include "shadow/shadow.h"

#include "shadow/shadow_compare.h"
#include "shadow/shadow_state.h"
#include "volume/io.h"

#include <stdlib.h>
#include <string.h>

#define PATIENCE_NS 30000000000u /* of a READ that waits for Python, which answers sooner if it can */
#define FILL_BLOCKS 32           /* asked for at once */

static struct shadow_read *shadow_read_of(const struct io_req *req) { return req->filtered; }

static const struct filter_ops SHADOW_OPS;

/* ---- open and close ------------------------------------------------------------------------------ */

/* The log may hold sectors beyond the end: of a volume that was larger, or grew and its record did not say so. */
static int learn_log(struct shadow *s, const struct glide_shadow_config *config)
{
    s->beyond = malloc((config->known_count + 1) * sizeof(*s->beyond));
    if (!s->beyond)
        return -ENOMEM;
    for (uint64_t i = 0; i < config->known_count; i++) {
        const struct glide_sectors *x = &config->known[i];
        shadow_file_learn(&s->file, x->sector, x->count);
        if (x->sector + x->count > s->file.sectors)
            s->beyond[s->beyond_count++] = *x;
    }
    return 0;
}

static void shadow_free(struct volume *v);

int shadow_open(struct volume *v, const struct glide_volume_config *volume_config)
{
    const struct glide_shadow_config *config = volume_config->shadow;
    uint64_t sectors = atomic_load(&v->size) / SECTOR;

    if (!config)
        return 0;
    struct shadow *s = calloc(1, sizeof(*s));
    int err = s ? shadow_file_open(&s->file, config->fd, sectors) : -ENOMEM;
    if (err) {
        free(s);
        return fail(err, "no second source of %llu sectors: %s", (unsigned long long)sectors, strerror(-err));
    }
    list_init(&s->reads);
    table_init(&s->asked);
    s->filter.ops = &SHADOW_OPS;
    v->filter = &s->filter;
    err = learn_log(s, config);
    if (err)
        shadow_free(v);
    return err;
}

static void shadow_free(struct volume *v)
{
    struct shadow *s = shadow_of(v);

    shadow_file_close(&s->file);
    table_destroy(&s->asked);
    free(s->beyond);
    free(s);
    v->filter = NULL;
}

/* ---- changes -------------------------------------------------------------------------------------- */

static void mark_changed(struct shadow *s, uint64_t sector, uint64_t count)
{
    list_each(at, &s->reads) {
        struct shadow_read *r = container_of(at, struct shadow_read, link);
        uint64_t first = max_u64(sector, r->first), end = min_u64(sector + count, r->first + r->count);
        for (uint64_t i = first; i < end; i++)
            r->sources[i - r->first].changed = true;
    }
}

static void shadow_applied(struct volume *v, const struct io_req *req, const struct append_piece *p)
{
    struct shadow *s = shadow_of(v);
    uint64_t begin = p->sector * SECTOR, from = begin, to = begin + (uint64_t)p->count * SECTOR;

    if (s->broken)
        return;
    mark_changed(s, p->sector, p->count);
    if (p->op == RECORD_WRITE) {
        /* Of the sectors at the ends of an unaligned WRITE only what the guest sent: the rest of them was read from
         * what is to be verified. */
        if (req->offset > from && shadow_file_knows(&s->file, p->sector))
            from = req->offset;
        if (req->offset + req->length < to && shadow_file_knows(&s->file, p->sector + p->count - 1))
            to = req->offset + req->length;
    }
    int err = p->op == RECORD_ZERO ? shadow_file_punch(&s->file, from, to - from)
                                   : shadow_file_put(&s->file, p->data + (from - begin), from, to - from);
    if (err)
        shadow_give_up(v, err);
    else
        shadow_file_learn(&s->file, p->sector, p->count);
}

static void shadow_grown(struct volume *v, uint64_t size)
{
    struct shadow *s = shadow_of(v);
    int err = s->broken ? 0 : shadow_file_grow(&s->file, size / SECTOR);

    if (err)
        shadow_give_up(v, err);
    for (uint64_t i = 0; i < s->beyond_count; i++)
        shadow_file_learn(&s->file, s->beyond[i].sector, s->beyond[i].count);
}

/* ---- a READ ----------------------------------------------------------------------------------------- */

static void shadow_begin(struct io_req *req)
{
    struct volume *v = req->volume;
    uint64_t first = req->offset / SECTOR, count = div_up(req->offset + req->length, SECTOR) - first;
    struct shadow_read *r = shadow_of(v)->broken ? NULL : calloc(1, sizeof(*r) + count * sizeof(r->sources[0]));

    if (!r)
        return;
    r->req = req;
    r->first = first;
    r->count = count;
    list_append(&shadow_of(v)->reads, &r->link);
    req->filtered = r;
}

static void shadow_note(struct io_req *req, uint64_t sector, uint64_t pos, const struct base_view *base)
{
    struct shadow_source *x = &shadow_read_of(req)->sources[sector - shadow_read_of(req)->first];

    x->pos = 0;
    if (pos) {
        x->kind = pos & POS_ZERO ? GLIDE_FROM_LOG_ZERO : GLIDE_FROM_LOG;
        x->pos = pos & ~POS_ZERO;
    } else if (base->kind == BASE_SLOT) {
        x->kind = GLIDE_FROM_CACHE;
        x->pos = (uint64_t)base->slot << 32 | base->generation;
    } else {
        x->kind = GLIDE_FROM_ZERO;
    }
}

static void drop(struct volume *v, struct shadow_read *r)
{
    if (r->parked_ns)
        shadow_of(v)->parked--;
    r->req->filtered = NULL;
    list_remove(&r->link);
    free(r);
}

static bool lacks_block(const struct shadow *s, const struct shadow_read *r, uint64_t block)
{
    uint64_t sector = max_u64(block * BLOCK_SECTORS, r->first);
    uint64_t end = min_u64((block + 1) * BLOCK_SECTORS, r->first + r->count);

    for (; sector < end; sector++) {
        if (!r->sources[sector - r->first].changed && !shadow_file_knows(&s->file, sector))
            return true;
    }
    return false;
}

static bool lacks(const struct shadow *s, const struct shadow_read *r)
{
    uint64_t end = div_up(r->first + r->count, BLOCK_SECTORS);

    for (uint64_t block = r->first / BLOCK_SECTORS; block < end; block++) {
        if (lacks_block(s, r, block))
            return true;
    }
    return false;
}

/* Ask Python for the blocks that a READ lacks, but for those that it was asked for. False: no memory. */
static bool ask(struct volume *v, const struct shadow_read *r)
{
    struct shadow *s = shadow_of(v);
    struct glide_shadow_item item = {.kind = GLIDE_SHADOW_FILL};
    uint64_t end = div_up(r->first + r->count, BLOCK_SECTORS);
    bool ok = true;

    for (uint64_t block = r->first / BLOCK_SECTORS; block < end && ok; block++) {
        if (table_find(&s->asked, block) || !lacks_block(s, r, block))
            continue;
        if (item.count && (item.block + item.count != block || item.count == FILL_BLOCKS)) {
            ok = shadow_tell(v, item);
            item.count = 0;
        }
        item.block = item.count ? item.block : block;
        item.count++;
        ok = ok && table_insert(&s->asked, block) != NULL;
    }
    return (!item.count || shadow_tell(v, item)) && ok;
}

static bool shadow_holds(struct io_req *req, int err)
{
    struct volume *v = req->volume;
    struct shadow_read *r = req->filtered;

    if (!err && !v->failed && !v->closing && !shadow_of(v)->broken) {
        if (!v->frozen && lacks(shadow_of(v), r) && ask(v, r)) {
            r->parked_ns = now_ns();
            shadow_of(v)->parked++;
            worker_want_tick(v->worker);
            return true;
        }
        shadow_compare(v, r);
    }
    drop(v, r);
    return false;
}

/* ---- READs that wait ----------------------------------------------------------------------------------- */

/* Compare and end those that may go. All are compared first: what ends may bring new WRITEs. */
static void release(struct volume *v)
{
    struct shadow *s = shadow_of(v);
    struct list done;

    list_init(&done);
    for (struct list *at = s->reads.next, *next; at != &s->reads; at = next) {
        struct shadow_read *r = container_of(at, struct shadow_read, link);
        struct io_req *req = r->req;
        next = at->next;
        if (!r->parked_ns || !r->go)
            continue;
        if (!s->broken && !v->failed)
            shadow_compare(v, r);
        drop(v, r);
        list_append(&done, &req->link);
    }
    for (struct list *e; (e = list_pop(&done));)
        io_finish(container_of(e, struct io_req, link), 0);
}

static void shadow_let_go(struct volume *v, const void *tag)
{
    list_each(at, &shadow_of(v)->reads) {
        struct shadow_read *r = container_of(at, struct shadow_read, link);
        r->go |= r->parked_ns && (!tag || r->req->tag == tag);
    }
    release(v);
}

static bool shadow_tick(struct volume *v, uint64_t now)
{
    struct shadow *s = shadow_of(v);

    if (!s->parked)
        return false;
    list_each(at, &s->reads) {
        struct shadow_read *r = container_of(at, struct shadow_read, link);
        r->go |= s->broken || (r->parked_ns && elapsed_ns(now, r->parked_ns) > PATIENCE_NS);
    }
    release(v);
    return s->parked > 0;
}

static const struct filter_ops SHADOW_OPS = {.begin = shadow_begin,
                                             .note = shadow_note,
                                             .holds = shadow_holds,
                                             .let_go = shadow_let_go,
                                             .tick = shadow_tick,
                                             .applied = shadow_applied,
                                             .grown = shadow_grown,
                                             .free = shadow_free};

struct fill {
    struct volume *v;
    uint64_t block, count;
    const uint8_t *data;
};

static void fill_block(struct volume *v, uint64_t block, const uint8_t *data)
{
    struct shadow_file *f = &shadow_of(v)->file;

    for (uint64_t i = 0; i < BLOCK_SECTORS; i++) {
        uint64_t sector = block * BLOCK_SECTORS + i;
        if (sector >= f->sectors || shadow_file_knows(f, sector))
            continue;
        int err = shadow_file_put(f, data + i * SECTOR, sector * SECTOR, SECTOR);
        if (err) {
            shadow_give_up(v, err);
            return;
        }
        shadow_file_learn(f, sector, 1);
    }
}

static int do_fill(struct worker *w, void *arg)
{
    struct fill *f = arg;
    struct shadow *s;

    (void)w;
    if (!f->v->filter)
        return fail(-EINVAL, "the volume has no shadow");
    s = shadow_of(f->v);
    for (uint64_t i = 0; i < f->count; i++) {
        table_remove(&s->asked, f->block + i);
        if (f->data && !s->broken)
            fill_block(f->v, f->block + i, f->data + i * GLIDE_BLOCK);
    }
    list_each(at, &s->reads) {
        struct shadow_read *r = container_of(at, struct shadow_read, link);
        bool touched = r->first < (f->block + f->count) * BLOCK_SECTORS &&
                       r->first + r->count > f->block * BLOCK_SECTORS;
        r->go |= touched && r->parked_ns && (!f->data || !lacks(s, r));
    }
    release(f->v);
    return 0;
}

int glide_shadow_fill(glide_volume *volume, uint64_t block, uint64_t count, const void *data)
{
    return worker_call(volume->worker, do_fill, &(struct fill){volume, block, count, data});
}
