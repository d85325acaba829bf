/*
 * One pack of an upload, payload after payload while each is in the CPU's cache: read from the log and verified,
 * hashed, compressed or copied into its place.
 *
 * State is the caller's, but for the plan, which is only read: any number of threads. docs/formats.md has the bytes;
 * header, frame of the index and trailer are Python's (glidefs/formats/pack.py).
 */
#include "upload/plan.h"

#include "base/payload_hash.h"
#include "base/payload_zstd.h"
#include "base/util.h"
#include "volume/gather.h"

#include <stdlib.h>
#include <string.h>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

/* One entry of the index, as it is stored. */
struct record {
    uint64_t block;
    uint32_t mask, zero_mask, offset, stored;
    uint8_t hash[PAYLOAD_HASH];
};
_Static_assert(sizeof(struct record) == GLIDE_PACK_ENTRY, "an entry has no gaps");

struct builder {
    const struct upload_plan *plan;
    const struct glide_entry *items;
    uint64_t count;
    const struct glide_pack_rules *rules;
    ZSTD_CCtx *context;
    bool raw;       /* payloads are not compressed */
    uint8_t *plain; /* of one block, the beginning of a page: see copy_out */
    uint8_t *body;
    uint64_t end; /* of what is in it */
    uint8_t *records;
};

static uint64_t plain_bytes(uint32_t mask) { return (uint64_t)__builtin_popcount(mask) * GLIDE_SECTOR; }

/*
 * Copy to where nobody of this CPU looks soon. Stores past the cache, because Zen 3 takes three times as long for
 * `rep movsb`, which memcpy and the kernel use, to an address that is not the beginning of a cache line.
 */
static void copy_out(uint8_t *to, const uint8_t *from, uint64_t length)
{
#ifdef __SSE2__
    for (; length && (uintptr_t)to % sizeof(__m128i); length--)
        *to++ = *from++;
    for (; length >= sizeof(__m128i); length -= sizeof(__m128i)) {
        _mm_stream_si128((__m128i *)to, _mm_loadu_si128((const __m128i *)from));
        to += sizeof(__m128i);
        from += sizeof(__m128i);
    }
    _mm_sfence();
#endif
    memcpy(to, from, length);
}

/* Stored bytes of `length` plain ones at `to`, which has room for as many; what does not shrink is stored raw. */
static uint64_t compress(const struct builder *b, uint8_t *to, const uint8_t *plain, uint64_t length)
{
    uint64_t n = payload_zstd(b->context, b->rules->level, to, length, plain, length);

    if (!n)
        copy_out(to, plain, length);
    return n ? n : length;
}

/* The lowest sectors of a mask, `bytes` of them at most. */
static uint32_t lowest(uint32_t mask, uint32_t bytes)
{
    uint32_t few = 0;

    for (uint32_t n = 0; mask && n < bytes / GLIDE_SECTOR; n++) {
        few |= mask & -mask;
        mask &= mask - 1;
    }
    return few;
}

/* Whether a sample of the payloads shrinks: 1 or 0, or -errno. Spares the CPU where data is random already. */
static int worth_compressing(const struct builder *b)
{
    const struct glide_pack_rules *rules = b->rules;
    uint64_t payloads = 0, n = 0, plain = 0, stored = 0;

    for (uint64_t i = 0; i < b->count; i++)
        payloads += b->items[i].mask != 0;
    if (payloads <= rules->samples)
        return payloads != 0;
    uint64_t step = payloads / rules->samples;
    for (uint64_t i = 0; i < b->count; i++) {
        const struct glide_entry *e = &b->items[i];
        if (!e->mask || n++ % step)
            continue;
        uint32_t mask = lowest(e->mask, rules->sample);
        int err = gather_read(b->plan->gather, e->block, mask, b->plain);
        if (err)
            return err;
        plain += plain_bytes(mask);
        /* To where the first payloads will be: a sample is never larger than they are. */
        stored += compress(b, b->body + GLIDE_PACK_HEADER, b->plain, plain_bytes(mask));
    }
    return stored * 1000 < plain * rules->shrinks;
}

/* Add the payload of an item, and fill in its record. */
static int add_payload(struct builder *b, const struct glide_entry *e, struct record *r)
{
    uint64_t length = plain_bytes(e->mask);
    uint8_t *at = b->body + b->end;
    int err = gather_read(b->plan->gather, e->block, e->mask, b->plain);

    if (err)
        return err;
    payload_hash(b->plain, length, r->hash);
    r->offset = (uint32_t)b->end;
    if (b->raw)
        copy_out(at, b->plain, length);
    r->stored = (uint32_t)(b->raw ? length : compress(b, at, b->plain, length));
    b->end += r->stored;
    return 0;
}

static int add_items(struct builder *b)
{
    struct record nothing = {.block = 0};

    payload_hash("", 0, nothing.hash);
    for (uint64_t i = 0; i < b->count; i++) {
        const struct glide_entry *e = &b->items[i];
        struct record r = nothing;
        r.block = e->block;
        r.mask = e->mask;
        r.zero_mask = e->zero_mask;
        int err = e->mask ? add_payload(b, e, &r) : 0;
        if (err)
            return err;
        memcpy(b->records + i * sizeof(r), &r, sizeof(r));
    }
    return 0;
}

static uint64_t list_chunks(const struct builder *b, uint64_t *chunks)
{
    uint64_t count = 0;

    for (uint64_t i = 0; i < b->count; i++) {
        uint64_t chunk = b->items[i].block / GLIDE_GROUP;
        if (!count || chunks[count - 1] != chunk)
            chunks[count++] = chunk;
    }
    return count;
}

int glide_plan_build(glide_plan *p, uint64_t job, const struct glide_pack_rules *rules, void *body, uint64_t capacity,
                     void *records, uint64_t *chunks, struct glide_packed *out)
{
    struct builder b = {.plan = p, .rules = rules, .body = body, .end = GLIDE_PACK_HEADER, .records = records};

    if (job >= p->job_count || !rules->samples || rules->sample % GLIDE_SECTOR ||
        GLIDE_PACK_HEADER + p->jobs[job].plain > min_u64(capacity, UINT32_MAX))
        return fail(-EINVAL, "a pack that is not planned, or does not fit");
    b.items = p->items + p->jobs[job].first;
    b.count = p->jobs[job].count;
    b.plain = aligned_alloc(GLIDE_SECTOR, GLIDE_BLOCK);
    b.context = ZSTD_createCCtx();
    int err = b.plain && b.context ? worth_compressing(&b) : fail(-ENOMEM, "no memory to build a pack");
    b.raw = !err;
    if (err >= 0)
        err = add_items(&b);
    if (!err)
        *out = (struct glide_packed){.end = b.end, .chunks = list_chunks(&b, chunks)};
    ZSTD_freeCCtx(b.context);
    free(b.plain);
    return err;
}
