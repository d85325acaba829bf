/*
 * The file of a log segment: bytes only, no policy.
 *
 *   sector 0        header (struct segment_header, rest zero)
 *   sector 1        the same header again, and two vouches (witness.h)
 *   journal         `sectors` records of 32 bytes, rounded up to sectors
 *   data            `sectors` sectors of 4 KiB
 *
 * Record i of the journal describes the data that starts at sector i of the
 * data region. WRITE takes `count` sectors of that space; the journal slots of
 * the sectors after its first stay zero. ZERO and SYNC take one. Both regions
 * are sparse and written once, in order.
 *
 * A header names the end of the segment before it: records of that one at or
 * beyond its end are from a writer that had lost the log, and do not count.
 * Either copy of the header is enough. Sector 0 is never written again, so a
 * power cut that tears sector 1 takes nothing that is needed.
 * All integers are little-endian (the core refuses to build elsewhere).
 */
#ifndef GLIDE_SEGMENT_H
#define GLIDE_SEGMENT_H

#include "base/disk.h"

#include <stdbool.h>
#include <stdint.h>

#define SECTOR 4096u
#define SEGMENT_HEAD (2 * SECTOR)            /* both headers: where the journal begins */
#define SEGMENT_MAX_SECTORS ((1u << 24) - 1) /* an end of segment must fit into a log position */
#define SEGMENT_MAX_SEQ ((uint64_t)1 << 38)  /* a sequence number is below: it must fit, too */
#define RECORD_MAX_SECTORS 1024u             /* longest WRITE: bounds what one checksum covers */

enum record_op { RECORD_WRITE = 1, RECORD_ZERO = 2, RECORD_SYNC = 3 };

struct segment_header {
    char magic[8]; /* "GLIDELOG" */
    uint32_t version;
    uint32_t sectors; /* of the data region */
    uint8_t volume_id[16];
    uint8_t log_id[16];
    uint8_t boot_id[16]; /* of the boot that wrote it: see segment_boot_id */
    uint64_t seq;
    uint64_t previous_seq; /* 0 = first of this log */
    uint32_t previous_end; /* first index of the previous segment that was not used */
    uint32_t pad;
    uint64_t check; /* XXH3-64 of all fields before */
};

struct segment_record {
    uint64_t sector; /* of the volume; SYNC: everything from `hash` to this log position is durable */
    uint32_t count;  /* sectors: WRITE up to RECORD_MAX_SECTORS */
    uint32_t op;
    uint64_t hash;  /* WRITE: record_hash of the data; SYNC: a log position, see there */
    uint64_t check; /* XXH3-64 of the fields before, seeded by log id, seq and index */
};

/* What ties a file to its log. */
struct segment_id {
    uint8_t volume_id[16], log_id[16];
    uint64_t seq;
};

static inline uint64_t segment_journal_bytes(uint32_t sectors)
{
    return ((uint64_t)sectors * sizeof(struct segment_record) + SECTOR - 1) / SECTOR * SECTOR;
}
static inline uint64_t segment_record_offset(uint32_t index)
{
    return SEGMENT_HEAD + (uint64_t)index * sizeof(struct segment_record);
}
static inline uint64_t segment_data_offset(uint32_t sectors, uint32_t index)
{
    return SEGMENT_HEAD + segment_journal_bytes(sectors) + (uint64_t)index * SECTOR;
}

const uint8_t *segment_boot_id(void);
uint64_t segment_salt(const struct segment_id *id);
void segment_record_seal(struct segment_record *r, uint64_t salt, uint32_t index);

/* Write both sectors of the head of a new file. -errno. */
int segment_write_header(struct disk_file *f, const struct segment_id *id, uint32_t sectors, uint64_t previous_seq,
                         uint32_t previous_end);
/* Whichever copy is good. -EUCLEAN: neither is a header of this segment; -ESTALE: one of another log; -ENOTSUP: of
 * another format; -errno of the read. fail() text set. */
int segment_read_header(struct disk_file *f, const struct segment_id *id, struct segment_header *out);
/* Write each copy that differs from `h` again. True: one did. */
bool segment_repair_header(struct disk_file *f, const struct segment_header *h);

/* A journal in memory. */
struct segment_journal {
    struct segment_record *records; /* `sectors` of them; those that are not valid have op 0 */
    uint32_t sectors;
    uint32_t end;   /* index after the last valid record's space */
    uint32_t valid; /* WRITE and ZERO records */
};
/* Read and check all records below `limit` (UINT32_MAX = all). Free with segment_free_journal. */
int segment_read_journal(struct disk_file *f, const struct segment_header *h, uint32_t limit,
                         struct segment_journal *out);
/* The same for a segment whose shape is known. False: it has not the `valid` records that were appended below `limit`,
 * or cannot be read. */
bool segment_read_whole(struct disk_file *f, const struct segment_id *id, uint32_t sectors, uint32_t limit,
                        uint32_t valid, struct segment_journal *out);
void segment_free_journal(struct segment_journal *j);

/* 0 = the data of WRITE record `index` has its hash; -EUCLEAN; -errno. buf and sums hold RECORD_MAX_SECTORS; sums gets
 * the hash of each sector. */
int segment_verify(struct disk_file *f, const struct segment_journal *j, uint32_t index, uint8_t *buf, uint64_t *sums);

/* "{dir}/{seq:016x}.seg" into a malloc'ed string; NULL = no memory. */
char *segment_path(const char *dir, uint64_t seq, const char *suffix);
/* Sequence numbers in a directory, ascending, malloc'ed; count or -errno. A directory that is absent has none. */
int64_t segment_list(const char *dir, uint64_t **out);
/* Unlink the mark of a sync that failed, if there is one. */
void segment_unlink_mark(const char *dir, uint64_t seq);
/* Unlink the file of a segment and that mark. -errno: the file may still be there. */
int segment_unlink(const char *dir, uint64_t seq);
/* Unlink the spares that an earlier process left. */
void segment_unlink_spares(const char *dir);

#endif
