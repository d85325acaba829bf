/*
 * Replies. A simple one is 16 bytes and, of a READ, its data. On a connection that negotiated structured replies those
 * of READ and BLOCK_STATUS, and all errors, are chunks: 20 bytes, then what the type says.
 *
 * A READ of parts that the volume knows to be zeros says so in place of sending them. Many small holes would cost more
 * in headers and vectors than their bytes, so what is shorter than HOLE_SECTORS, or than a part of the whole, is sent.
 */
#include "transport/nbd/nbd_conn.h"

#include <endian.h>
#include <stdlib.h>
#include <string.h>

#define SIMPLE_MAGIC 0x67446698u
#define CHUNK_MAGIC 0x668e33efu
#define EXTENDED_MAGIC 0x6e8a278cu
#define CHUNK_DONE 1u
enum chunk_type {
    CHUNK_NONE = 0,
    CHUNK_DATA = 1,
    CHUNK_HOLE = 2,
    CHUNK_STATUS = 5,
    CHUNK_STATUS_EXT = 6,
    CHUNK_ERROR = 32769
};
#define SECTOR_BYTES GLIDE_SECTOR
#define HOLE_SECTORS 8u
#define HOLE_PART 64u          /* no hole shorter than this part of a READ */
#define STATE_HOLE_AND_ZERO 3u /* of base:allocation */
#define STATE_CHANGED 1u       /* of glidefs:changed: */

static uint32_t error_code(int err, uint16_t type)
{
    switch (err) {
    case 0:
        return 0;
    case ENOSPC: /* beyond the end: the specification has EINVAL for TRIM */
        return type == NBD_TRIM ? 22 : 28;
    case EPERM:
    case EROFS:
        return 1;
    case ENOMEM:
        return 12;
    case EINVAL:
    case ENOENT:
        return 22;
    case ENOTSUP:
        return 95;
    case ESHUTDOWN:
        return 108;
    default:
        return 5; /* EIO */
    }
}

static const char *error_text(uint32_t code, int err)
{
    if (err == ENOENT)
        return "the snapshot of a context glidefs:changed: was deleted";
    switch (code) {
    case 1:
        return "the export is read-only";
    case 12:
        return "the server has no memory for the request";
    case 22:
        return "unknown command or flag, no multiple of 512 bytes, too long, or beyond the end";
    case 28:
        return "beyond the end of the volume";
    case 95:
        return "not supported";
    case 108:
        return "the export goes away";
    default:
        return "input/output error: the log of the server and `glidefs show` say why";
    }
}

/* ---- bytes ----------------------------------------------------------------------------------- */

static uint8_t *put16(uint8_t *at, uint16_t value)
{
    value = htobe16(value);
    memcpy(at, &value, 2);
    return at + 2;
}

static uint8_t *put32(uint8_t *at, uint32_t value)
{
    value = htobe32(value);
    memcpy(at, &value, 4);
    return at + 4;
}

static uint8_t *put64(uint8_t *at, uint64_t value)
{
    value = htobe64(value);
    memcpy(at, &value, 8);
    return at + 8;
}

static uint8_t *put_chunk(uint8_t *at, const struct nbd_req *r, uint16_t flags, enum chunk_type type, uint32_t length)
{
    bool extended = nbd_extended(r->conn);

    at = put32(at, extended ? EXTENDED_MAGIC : CHUNK_MAGIC);
    at = put16(at, flags);
    at = put16(at, (uint16_t)type);
    memcpy(at, &r->cookie, 8);
    return extended ? put64(put64(at + 8, r->offset), length) : put32(at + 8, length);
}

static void set_head(struct nbd_part *p, const uint8_t *end) { p->head_length = (uint32_t)(end - p->head); }

/* Room for a reply of several parts; NULL: there is no memory. */
static struct nbd_part *new_parts(struct nbd_req *r, uint32_t count)
{
    r->parts = calloc(count, sizeof(*r->parts));
    if (!r->parts)
        return NULL;
    r->part_count = count;
    r->charged += count * sizeof(*r->parts);
    nbd_memory_add(r->conn, r->account, count * sizeof(*r->parts));
    return r->parts;
}

/* ---- one part --------------------------------------------------------------------------------- */

static void simple(struct nbd_req *r, uint32_t code)
{
    uint8_t *at = put32(put32(r->first.head, SIMPLE_MAGIC), code);

    memcpy(at, &r->cookie, 8);
    set_head(&r->first, at + 8);
}

static void error_chunk(struct nbd_req *r, uint32_t code, int err)
{
    const char *text = error_text(code, err);
    uint16_t length = (uint16_t)strlen(text);
    uint8_t *at = put_chunk(r->first.head, r, CHUNK_DONE, CHUNK_ERROR, 6u + length);

    set_head(&r->first, put16(put32(at, code), length));
    r->first.data = (const uint8_t *)text;
    r->first.length = length;
}

/* The id of a context with its number among those of the connection. */
static uint32_t id_of(const struct nbd_req *r, uint32_t context)
{
    return GLIDE_NBD_CONTEXT + context + !(r->conn->modes & GLIDE_NBD_ALLOCATION);
}

/* One context. The extents become those of the network where they are. In front of them are the id and, with extended
 * headers, their number, where `max` and `count` were. */
static void status_part(const struct nbd_req *r, struct nbd_part *p, uint32_t context, bool last)
{
    struct io_extents *out = nbd_extents(r, context);
    uint32_t state = nbd_changed(r->conn, context) ? STATE_CHANGED : STATE_HOLE_AND_ZERO, count = out->count;
    bool extended = nbd_extended(r->conn);
    uint8_t *begin = (uint8_t *)(extended ? &out->max : &out->count), *to = put32(begin, id_of(r, context));

    if (extended)
        to = put32(to, count);
    for (uint32_t i = 0; i < count; i++) { /* what is written here ends before what is read next */
        struct io_extent extent = out->list[i];
        uint32_t is = extent.is ? state : 0;
        to = extended ? put64(put64(to, extent.length), is) : put32(put32(to, (uint32_t)extent.length), is);
    }
    p->data = begin;
    p->length = (uint64_t)(to - begin);
    set_head(p, put_chunk(p->head, r, last ? CHUNK_DONE : 0, extended ? CHUNK_STATUS_EXT : CHUNK_STATUS,
                          (uint32_t)p->length));
}

static void status_chunks(struct nbd_req *r)
{
    uint32_t count = nbd_contexts(r->conn);
    struct nbd_part *parts = count == 1 ? &r->first : new_parts(r, count);

    if (!parts)
        error_chunk(r, error_code(ENOMEM, r->type), ENOMEM);
    for (uint32_t i = 0; parts && i < count; i++)
        status_part(r, &parts[i], i, i + 1 == count);
}

/* ---- a READ in chunks -------------------------------------------------------------------------- */

static bool is_hole(const struct nbd_req *r, uint32_t sector)
{
    return r->io.holes && r->io.holes[sector / 64] >> sector % 64 & 1;
}

/* Byte of the READ at which a sector that it touches begins; its end for the one behind the last. */
static uint64_t byte_of(const struct nbd_req *r, uint32_t sector)
{
    uint64_t at = (r->io.offset / SECTOR_BYTES + sector) * SECTOR_BYTES;

    return at <= r->io.offset ? 0 : min_u64(at - r->io.offset, r->io.length);
}

static void read_part(const struct nbd_req *r, struct nbd_part *p, uint64_t from, uint64_t to, bool hole, bool last)
{
    uint32_t length = (uint32_t)(to - from);
    uint16_t flags = last ? CHUNK_DONE : 0;

    if (hole) {
        uint8_t *at = put_chunk(p->head, r, flags, CHUNK_HOLE, 12);
        set_head(p, put32(put64(at, r->io.offset + from), length));
        return;
    }
    uint8_t *at = put_chunk(p->head, r, flags, CHUNK_DATA, 8 + length);
    set_head(p, put64(at, r->io.offset + from));
    p->data = r->buf + from;
    p->length = length;
}

/* Sectors [sector, end) of a READ are sent, as zeros. */
static void fill_zeros(struct nbd_req *r, uint32_t sector, uint32_t end)
{
    memset(r->buf + byte_of(r, sector), 0, byte_of(r, end) - byte_of(r, sector));
}

/* Go through the parts of a READ. With `parts` they are written there; without, what is too short to be a hole becomes
 * zeros in the buffer. Returns how many there are. */
static uint32_t read_parts(struct nbd_req *r, uint32_t sectors, struct nbd_part *parts)
{
    uint32_t least = max_u64(HOLE_SECTORS, sectors / HOLE_PART), count = 0, begin = 0, next;
    bool hole = false;

    for (uint32_t s = 0; s < sectors; s = next) {
        bool zero = is_hole(r, s);
        for (next = s + 1; next < sectors && is_hole(r, next) == zero; next++)
            ;
        bool tells = zero && (next - s >= least || next - s == sectors);
        if (zero && !tells && !parts)
            fill_zeros(r, s, next);
        if (s && tells != hole) {
            if (parts)
                read_part(r, &parts[count], byte_of(r, begin), byte_of(r, s), hole, false);
            count++;
            begin = s;
        }
        hole = tells;
    }
    if (parts)
        read_part(r, &parts[count], byte_of(r, begin), r->io.length, hole, true);
    return count + 1;
}

static void read_chunks(struct nbd_req *r)
{
    uint32_t sectors = (uint32_t)(div_up(r->io.offset + r->io.length, SECTOR_BYTES) - r->io.offset / SECTOR_BYTES);
    uint32_t count = read_parts(r, sectors, NULL);

    if (count == 1) {
        read_parts(r, sectors, &r->first);
        return;
    }
    if (!new_parts(r, count)) { /* all of it as data */
        for (uint32_t s = 0; s < sectors; s++)
            if (is_hole(r, s))
                fill_zeros(r, s, s + 1);
        read_part(r, &r->first, 0, r->io.length, false, true);
        return;
    }
    read_parts(r, sectors, r->parts);
}

/* ---- for the others -------------------------------------------------------------------------------- */

void nbd_build_reply(struct nbd_req *r, int err)
{
    bool chunks = r->conn->modes & GLIDE_NBD_STRUCTURED;
    uint32_t code = error_code(err, r->type);

    r->part_count = 1;
    if (chunks && code) {
        error_chunk(r, code, err);
    } else if (r->type == NBD_BLOCK_STATUS && !code) {
        status_chunks(r);
    } else if (chunks && r->type == NBD_READ && r->io.length) {
        read_chunks(r);
    } else if (chunks && (r->type == NBD_READ || nbd_extended(r->conn))) {
        set_head(&r->first, put_chunk(r->first.head, r, CHUNK_DONE, CHUNK_NONE, 0));
    } else {
        simple(r, code);
        r->first.data = r->buf;
        r->first.length = r->type == NBD_READ && !code ? r->io.length : 0;
    }
    for (uint32_t i = 0; i < r->part_count; i++)
        r->reply_bytes += nbd_part(r, i)->head_length + nbd_part(r, i)->length;
}
