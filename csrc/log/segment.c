#include "log/segment.h"

#include "base/data_hash.h"
#include "glide_core_internal.h"
#include "base/util.h"

#include <dirent.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the formats are little-endian");
_Static_assert(sizeof(struct segment_record) == 32, "journal records are 32 bytes");
_Static_assert(sizeof(struct segment_header) == 96, "segment header layout");

#define MAGIC "GLIDELOG"
#define VERSION 2u

static uint8_t boot_id[16];
static pthread_once_t boot_id_once = PTHREAD_ONCE_INIT;

static void read_boot_id(void)
{
    char text[64] = "";
    int fd = open("/proc/sys/kernel/random/boot_id", O_RDONLY | O_CLOEXEC);

    if (fd < 0)
        return; /* zero: never trusted, see segment_boot_id's user */
    if (read(fd, text, sizeof(text) - 1) > 0) {
        XXH128_hash_t h = XXH3_128bits(text, strlen(text));
        memcpy(boot_id, &h, sizeof(boot_id));
    }
    close(fd);
}

const uint8_t *segment_boot_id(void)
{
    pthread_once(&boot_id_once, read_boot_id);
    return boot_id;
}

uint64_t segment_salt(const struct segment_id *id) { return XXH3_64bits_withSeed(id->log_id, 16, id->seq); }

static uint64_t record_check(const struct segment_record *r, uint64_t salt, uint32_t index)
{
    return XXH3_64bits_withSeed(r, offsetof(struct segment_record, check), salt + index);
}

void segment_record_seal(struct segment_record *r, uint64_t salt, uint32_t index)
{
    r->check = record_check(r, salt, index);
}

/* ---- header ------------------------------------------------------------------------------ */

int segment_write_header(struct disk_file *f, const struct segment_id *id, uint32_t sectors, uint64_t previous_seq,
                         uint32_t previous_end)
{
    struct segment_header h = {.version = VERSION,
                               .sectors = sectors,
                               .seq = id->seq,
                               .previous_seq = previous_seq,
                               .previous_end = previous_end};
    uint8_t head[SEGMENT_HEAD] = {0}; /* all of it: the file may have had another life */
    struct iovec iov = {head, sizeof(head)};

    memcpy(h.magic, MAGIC, sizeof(h.magic));
    memcpy(h.volume_id, id->volume_id, 16);
    memcpy(h.log_id, id->log_id, 16);
    memcpy(h.boot_id, segment_boot_id(), 16);
    h.check = XXH3_64bits(&h, offsetof(struct segment_header, check));
    memcpy(head, &h, sizeof(h));
    memcpy(head + SECTOR, &h, sizeof(h));
    return disk_pwritev(f, &iov, 1, 0);
}

static bool header_whole(const struct segment_header *h)
{
    return !memcmp(h->magic, MAGIC, sizeof(h->magic)) &&
           h->check == XXH3_64bits(h, offsetof(struct segment_header, check));
}

/* Why a copy of the header is not this segment's, set as the error's text; 0 = it is. */
static int judge_header(const struct disk_file *f, const struct segment_id *id, const struct segment_header *h,
                        bool whole)
{
    if (!whole || !header_whole(h))
        return fail(-EUCLEAN, "%s: no valid segment header", f->path);
    if (h->version != VERSION)
        return fail(-ENOTSUP,
                    "%s: written by GlideFS 0.1 format %u, this one reads format %u; drain the volume with the release "
                    "that wrote it",
                    f->path, h->version, VERSION);
    if (memcmp(h->volume_id, id->volume_id, 16))
        return fail(-ESTALE, "%s: belongs to another volume: move it back to where it was", f->path);
    if (memcmp(h->log_id, id->log_id, 16))
        return fail(-ESTALE, "%s: belongs to another log of this volume: move it back to where it was", f->path);
    if (h->seq != id->seq) /* or a spare whose new header never reached the disk */
        return fail(-EUCLEAN, "%s: the header is that of segment %016llx", f->path, (unsigned long long)h->seq);
    if (h->sectors == 0 || h->sectors > SEGMENT_MAX_SECTORS)
        return fail(-EUCLEAN, "%s: impossible geometry", f->path);
    return 0;
}

static int read_copy(struct disk_file *f, const struct segment_id *id, struct segment_header *h, uint64_t offset)
{
    uint64_t got;
    int err = disk_read(f, h, sizeof(*h), offset, &got);

    return err ? fail(err, "cannot read %s", f->path) : judge_header(f, id, h, got == sizeof(*h));
}

int segment_read_header(struct disk_file *f, const struct segment_id *id, struct segment_header *h)
{
    int first = read_copy(f, id, h, 0);

    if (!first)
        return 0;
    int second = read_copy(f, id, h, SECTOR);
    if (!second || (first == -EUCLEAN && second != -EUCLEAN))
        return second;
    return read_copy(f, id, h, 0); /* once more, for the text of its error */
}

bool segment_repair_header(struct disk_file *f, const struct segment_header *h)
{
    bool damaged = false;

    for (uint64_t at = 0; at < SEGMENT_HEAD; at += SECTOR) {
        struct segment_header found;
        struct iovec iov = {(void *)(uintptr_t)h, sizeof(*h)};
        uint64_t got;
        if (!disk_read(f, &found, sizeof(found), at, &got) && got == sizeof(found) && !memcmp(&found, h, got))
            continue;
        damaged = true;
        disk_pwritev(f, &iov, 1, at); /* best effort: the other one is good */
    }
    return damaged;
}

/* ---- journal ------------------------------------------------------------------------------ */

static bool record_valid(const struct segment_record *r, uint64_t salt, uint32_t index, uint32_t sectors)
{
    if (r->op < RECORD_WRITE || r->op > RECORD_SYNC || r->check != record_check(r, salt, index))
        return false;
    if (r->op == RECORD_WRITE)
        return r->count && r->count <= RECORD_MAX_SECTORS && r->count <= sectors - index;
    return r->op == RECORD_SYNC || r->count;
}

/* Count the records that are valid, clear op of the others. */
static void check_journal(struct segment_journal *j, const struct segment_header *h, uint32_t limit)
{
    struct segment_id id = {.seq = h->seq};

    memcpy(id.volume_id, h->volume_id, 16);
    memcpy(id.log_id, h->log_id, 16);
    uint64_t salt = segment_salt(&id);
    for (uint32_t i = 0; i < j->sectors;) {
        struct segment_record *r = &j->records[i];
        if (i >= limit || !record_valid(r, salt, i, j->sectors)) {
            r->op = 0;
            i++;
            continue;
        }
        uint32_t space = r->op == RECORD_WRITE ? r->count : 1;
        j->valid += r->op != RECORD_SYNC;
        for (uint32_t k = 1; k < space; k++)
            j->records[i + k].op = 0;
        i += space;
        j->end = i;
    }
}

int segment_read_journal(struct disk_file *f, const struct segment_header *h, uint32_t limit,
                         struct segment_journal *out)
{
    uint64_t got, bytes = segment_journal_bytes(h->sectors);
    struct segment_record *records = calloc(1, bytes);

    memset(out, 0, sizeof(*out));
    if (!records)
        return fail(-ENOMEM, "no memory for the journal of %s", f->path);
    int err = disk_read(f, records, bytes, SEGMENT_HEAD, &got);
    if (err) {
        free(records);
        return fail(err, "cannot read the journal of %s", f->path);
    }
    out->records = records;
    out->sectors = h->sectors;
    check_journal(out, h, limit);
    return 0;
}

bool segment_read_whole(struct disk_file *f, const struct segment_id *id, uint32_t sectors, uint32_t limit,
                        uint32_t valid, struct segment_journal *out)
{
    struct segment_header h = {.seq = id->seq, .sectors = sectors};

    memcpy(h.volume_id, id->volume_id, 16);
    memcpy(h.log_id, id->log_id, 16);
    return !segment_read_journal(f, &h, limit, out) && out->valid == valid;
}

void segment_free_journal(struct segment_journal *j)
{
    free(j->records);
    j->records = NULL;
}

int segment_verify(struct disk_file *f, const struct segment_journal *j, uint32_t index, uint8_t *buf, uint64_t *sums)
{
    const struct segment_record *r = &j->records[index];
    uint64_t got, length = (uint64_t)r->count * SECTOR;
    int err = disk_read(f, buf, length, segment_data_offset(j->sectors, index), &got);

    if (err)
        return fail(err, "cannot read record %u of %s", index, f->path);
    return got == length && record_hash(buf, r->count, sums) == r->hash ? 0 : -EUCLEAN;
}

/* ---- directory ------------------------------------------------------------------------------ */

char *segment_path(const char *dir, uint64_t seq, const char *suffix)
{
    char *path;

    return asprintf(&path, "%s/%016llx%s", dir, (unsigned long long)seq, suffix) < 0 ? NULL : path;
}

static int unlink_with(const char *dir, uint64_t seq, const char *suffix)
{
    char *path = segment_path(dir, seq, suffix);
    int err = path ? disk_unlink(path) : -ENOMEM;

    free(path);
    return err;
}

void segment_unlink_mark(const char *dir, uint64_t seq) { unlink_with(dir, seq, ".syncfail"); }

int segment_unlink(const char *dir, uint64_t seq)
{
    int err = unlink_with(dir, seq, ".seg");

    segment_unlink_mark(dir, seq);
    return err;
}

static bool parse_name(const char *name, const char *suffix, uint64_t *seq)
{
    *seq = 0;
    for (int i = 0; i < 16; i++) {
        char c = name[i];
        int digit = c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
        if (digit < 0)
            return false;
        *seq = *seq << 4 | (uint64_t)digit;
    }
    return !strcmp(name + 16, suffix) && *seq > 0 && *seq < SEGMENT_MAX_SEQ;
}

static int compare_u64(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}

int64_t segment_list(const char *dir, uint64_t **out)
{
    uint64_t *seqs = NULL, seq;
    size_t count = 0, capacity = 0;
    DIR *d = opendir(dir);

    *out = NULL;
    if (!d)
        return errno == ENOENT ? 0 : fail(-errno, "cannot list %s", dir);
    for (struct dirent *e; (e = readdir(d));) {
        if (!parse_name(e->d_name, ".seg", &seq))
            continue;
        if (count == capacity) {
            capacity = capacity ? capacity * 2 : 16;
            uint64_t *more = realloc(seqs, capacity * sizeof(*seqs));
            if (!more) {
                free(seqs);
                closedir(d);
                return -ENOMEM;
            }
            seqs = more;
        }
        seqs[count++] = seq;
    }
    closedir(d);
    if (count)
        qsort(seqs, count, sizeof(*seqs), compare_u64);
    *out = seqs;
    return (int64_t)count;
}

void segment_unlink_spares(const char *dir)
{
    DIR *d = opendir(dir);
    uint64_t seq;

    for (struct dirent *e; d && (e = readdir(d));) {
        char *path = parse_name(e->d_name, ".spare", &seq) ? segment_path(dir, seq, ".spare") : NULL;
        if (path)
            disk_unlink(path);
        free(path);
    }
    if (d)
        closedir(d);
}

int glide_segment_look(const void *data, uint64_t length, struct glide_segment *out)
{
    struct segment_header copies[2], *h = NULL;

    memset(out, 0, sizeof(*out));
    for (uint32_t i = 0; i < 2; i++) {
        if (length < i * SECTOR + sizeof(*h))
            break;
        memcpy(&copies[i], (const uint8_t *)data + (uint64_t)i * SECTOR, sizeof(*h));
        if (!header_whole(&copies[i]))
            continue;
        h = h ? h : &copies[i];
        out->copies |= 1u << i;
    }
    if (!h)
        return -EUCLEAN;
    out->version = h->version;
    out->sectors = h->sectors;
    memcpy(out->volume_id, h->volume_id, 16);
    memcpy(out->log_id, h->log_id, 16);
    out->seq = h->seq;
    out->previous_seq = h->previous_seq;
    out->previous_end = h->previous_end;
    if (h->version != VERSION)
        return -ENOTSUP;
    if (h->sectors == 0 || h->sectors > SEGMENT_MAX_SECTORS)
        return -EUCLEAN;
    if (length <= SEGMENT_HEAD)
        return 0;
    struct segment_journal j = {.records = calloc(1, segment_journal_bytes(h->sectors)), .sectors = h->sectors};
    if (!j.records)
        return -ENOMEM;
    memcpy(j.records, (const uint8_t *)data + SEGMENT_HEAD,
           min_u64(length - SEGMENT_HEAD, segment_journal_bytes(h->sectors)));
    check_journal(&j, h, UINT32_MAX);
    for (uint32_t i = 0; i < j.end; i++) {
        uint32_t op = j.records[i].op;
        out->records[op] += op != 0;
        out->written += op == RECORD_WRITE ? (uint64_t)j.records[i].count * SECTOR : 0;
    }
    segment_free_journal(&j);
    return 0;
}

int glide_log_segments(const char *log_dir, uint64_t *seqs, uint32_t max)
{
    uint64_t *found;
    int64_t n = segment_list(log_dir, &found);

    for (int64_t i = 0; i < n && i < max; i++)
        seqs[i] = found[i];
    free(found);
    return (int)n;
}

/* The record that has `index` in its space; NULL = none. */
static const struct segment_record *find_record(const struct segment_journal *j, uint32_t index, uint32_t *start)
{
    for (*start = index; *start + RECORD_MAX_SECTORS > index; (*start)--) {
        const struct segment_record *r = &j->records[*start];
        if (r->op)
            return index - *start < (r->op == RECORD_WRITE ? r->count : 1) ? r : NULL;
        if (!*start)
            break;
    }
    return NULL;
}

static int check_record(struct disk_file *f, const struct segment_id *id, uint32_t index, struct glide_record *out)
{
    struct segment_header header;
    struct segment_journal j = {.records = NULL};
    uint32_t start;
    uint64_t sums[RECORD_MAX_SECTORS];
    uint8_t *buf = malloc(RECORD_MAX_SECTORS * SECTOR);
    int err = buf ? segment_read_header(f, id, &header) : -ENOMEM;

    if (err == -EUCLEAN)
        err = -ENOENT; /* without a header no record is valid */
    if (!err)
        err = segment_read_journal(f, &header, UINT32_MAX, &j);
    if (!err) {
        const struct segment_record *r = index < j.sectors ? find_record(&j, index, &start) : NULL;
        err = r ? 0 : fail(-ENOENT, "%s has no valid record at %u", f->path, index);
        if (r)
            *out = (struct glide_record){
                .sector = r->sector, .count = r->count, .index = start, .zero = r->op == RECORD_ZERO};
        if (r && r->op == RECORD_WRITE)
            err = segment_verify(f, &j, start, buf, sums);
    }
    segment_free_journal(&j);
    free(buf);
    return err;
}

int glide_log_record(const char *log_dir, const uint8_t *volume_id, const uint8_t *log_id, uint64_t seq, uint32_t index,
                     struct glide_record *out)
{
    struct segment_id id = {.seq = seq};
    struct disk_file f = {.fd = -1};
    char *path = segment_path(log_dir, seq, ".seg");
    int err = path ? disk_open(&f, path, O_RDONLY) : -ENOMEM;

    memset(out, 0, sizeof(*out));
    free(path);
    if (err)
        return err;
    memcpy(id.volume_id, volume_id, 16);
    memcpy(id.log_id, log_id, 16);
    err = check_record(&f, &id, index, out);
    disk_close(&f);
    return err;
}
