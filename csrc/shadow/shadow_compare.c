#include "shadow/shadow_compare.h"

#include "volume/engine.h"
#include "volume/io.h"

#include <string.h>

#define TOLD_MAX 32 /* differences of a volume that are described; all are counted */

static bool same_source(const struct shadow_source *a, const struct shadow_source *b)
{
    bool log = a->kind == GLIDE_FROM_LOG;

    return a->kind == b->kind && (log ? pos_seq(a->pos) == pos_seq(b->pos) : a->pos == b->pos);
}

static void describe(struct volume *v, const struct shadow_source *x, struct glide_shadow_item *out)
{
    out->source = x->kind;
    if (x->kind == GLIDE_FROM_LOG || x->kind == GLIDE_FROM_LOG_ZERO) {
        out->segment = pos_seq(x->pos);
        out->index = pos_index(x->pos);
    } else if (x->kind == GLIDE_FROM_CACHE) {
        out->slot = (uint32_t)(x->pos >> 32);
        out->generation = (uint32_t)x->pos;
        out->has_key = cache_identify(&v->engine->cache, out->slot, out->generation, out->key, out->hash);
    }
}

/* `length` bytes at `offset`, of whole or partial sectors that were compared: count those that differ and tell of each
 * run of them. */
static void report(struct volume *v, const struct shadow_read *r, uint64_t offset, const uint8_t *got,
                   const uint8_t *want, uint64_t length)
{
    struct glide_shadow_item item = {.count = 0};
    const struct shadow_source *last = NULL;

    for (uint64_t at = 0, end; at < length; at = end) {
        uint64_t sector = (offset + at) / SECTOR, byte = at;
        const struct shadow_source *x = &r->sources[sector - r->first];
        end = min_u64((sector + 1) * SECTOR - offset, length);
        while (byte < end && got[byte] == want[byte])
            byte++;
        if (byte == end)
            continue;
        stat_add(&v->stats.shadow_differences, 1);
        if (item.count && item.sector + item.count == sector && same_source(last, x)) {
            item.count++;
            last = x;
            continue;
        }
        if (item.count && shadow_of(v)->told++ < TOLD_MAX)
            shadow_tell(v, item);
        item = (struct glide_shadow_item){.kind = GLIDE_SHADOW_DIFFERENCE,
                                          .block = sector / BLOCK_SECTORS,
                                          .count = 1,
                                          .sector = sector,
                                          .offset = offset + byte,
                                          .bytes = (uint32_t)min_u64(sizeof(item.got), end - byte)};
        memcpy(item.got, got + byte, item.bytes);
        memcpy(item.want, want + byte, item.bytes);
        describe(v, x, &item);
        last = x;
    }
    if (item.count && shadow_of(v)->told++ < TOLD_MAX)
        shadow_tell(v, item);
}

static bool comparable(const struct shadow *s, const struct shadow_read *r, uint64_t sector)
{
    return !r->sources[sector - r->first].changed && shadow_file_knows(&s->file, sector);
}

void shadow_compare(struct volume *v, const struct shadow_read *r)
{
    struct shadow *s = shadow_of(v);
    const struct io_req *req = r->req;
    uint64_t stop = r->first + r->count, n;

    for (uint64_t sector = r->first; sector < stop && !s->broken; sector += n) {
        for (n = 0; sector + n < stop && n < BLOCK_SECTORS && comparable(s, r, sector + n); n++)
            ;
        if (!n) {
            bool changed = r->sources[sector - r->first].changed;
            stat_add(changed ? &v->stats.shadow_changed : &v->stats.shadow_absent, 1);
            n = 1;
            continue;
        }
        uint64_t from = max_u64(sector * SECTOR, req->offset);
        uint64_t to = min_u64((sector + n) * SECTOR, req->offset + req->length);
        const uint8_t *got = req->buf + (from - req->offset);
        int err = shadow_file_get(&s->file, s->scratch, from, to - from);
        if (err) {
            shadow_give_up(v, err);
            return;
        }
        stat_add(&v->stats.shadow_compared, n);
        if (memcmp(got, s->scratch, to - from))
            report(v, r, from, got, s->scratch, to - from);
    }
}
