#include "log/witness.h"

#include "log/log_map.h"
#include "base/util.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

/* ---- in the segment ---------------------------------------------------------------------- */

struct vouch_slot {
    uint64_t from, to;
    uint64_t pad;
    uint64_t check; /* XXH3-64 of the fields before, seeded by log id, seq and slot */
};
_Static_assert(sizeof(struct vouch_slot) == 32, "vouch layout");

/* Each in 512 bytes of its own, which disks write whole. */
static uint64_t slot_offset(uint32_t slot) { return SECTOR + 512 * (1 + (uint64_t)slot); }

static uint64_t slot_check(const struct vouch_slot *s, const struct segment_id *id, uint32_t slot)
{
    /* No record has such an index. */
    return XXH3_64bits_withSeed(s, offsetof(struct vouch_slot, check), segment_salt(id) + SEGMENT_MAX_SECTORS + slot);
}

void segment_write_vouch(struct disk_file *f, const struct segment_id *id, uint32_t slot, const struct vouch *vouch)
{
    struct vouch_slot s = {.from = vouch->from, .to = vouch->to};
    struct iovec iov = {&s, sizeof(s)};

    s.check = slot_check(&s, id, slot % VOUCHES);
    disk_pwritev(f, &iov, 1, slot_offset(slot % VOUCHES));
}

uint32_t segment_read_vouches(struct disk_file *f, const struct segment_id *id, struct vouch *out)
{
    uint32_t count = 0;

    for (uint32_t i = 0; i < VOUCHES; i++) {
        struct vouch_slot s;
        if (pread(f->fd, &s, sizeof(s), (off_t)slot_offset(i)) == sizeof(s) && s.check == slot_check(&s, id, i))
            out[count++] = (struct vouch){s.from, s.to};
    }
    return count;
}

/* ---- the file beside the log --------------------------------------------------------------- */

#define MAGIC "GLIDEWIT"
#define VERSION 2u /* as that of segments */

struct witness_slot {
    char magic[8];
    uint32_t version, pad;
    uint8_t volume_id[16], log_id[16];
    uint64_t from, to;
    uint64_t check; /* XXH3-64 of the fields before */
};
_Static_assert(sizeof(struct witness_slot) == 72, "witness layout");

static uint64_t witness_check(const struct witness_slot *s)
{
    return XXH3_64bits(s, offsetof(struct witness_slot, check));
}

static bool belongs(const struct witness_slot *s, const struct segment_id *id)
{
    return !memcmp(s->magic, MAGIC, sizeof(s->magic)) && s->check == witness_check(s) && s->version == VERSION &&
           !memcmp(s->volume_id, id->volume_id, 16) && !memcmp(s->log_id, id->log_id, 16);
}

static char *witness_path(const char *dir)
{
    char *path;

    return asprintf(&path, "%s.witness", dir) < 0 ? NULL : path;
}

void witness_init(struct witness_file *w) { *w = (struct witness_file){.file = {.fd = -1}}; }

void witness_close(struct witness_file *w)
{
    disk_close(&w->file);
    witness_init(w);
}

uint32_t witness_read(const char *dir, const struct segment_id *id, struct vouch *out)
{
    char *path = witness_path(dir);
    int fd = path ? disk_open_fd(path, O_RDONLY) : -1;
    uint32_t count = 0;

    free(path);
    for (uint32_t i = 0; fd >= 0 && i < VOUCHES; i++) {
        struct witness_slot s;
        if (pread(fd, &s, sizeof(s), (off_t)i * SECTOR) == sizeof(s) && belongs(&s, id))
            out[count++] = (struct vouch){s.from, s.to};
    }
    if (fd >= 0)
        close(fd);
    return count;
}

bool witness_make(struct witness_file *w, const char *dir)
{
    char *path = w->file.fd < 0 ? witness_path(dir) : NULL;
    bool made = false;

    if (path)
        disk_open_or_create(&w->file, path, &made);
    free(path);
    return made;
}

void witness_note(struct witness_file *w, const char *dir, const struct segment_id *id, const struct vouch *vouch)
{
    struct witness_slot s = {.version = VERSION, .from = vouch->from, .to = vouch->to};
    struct iovec iov = {&s, sizeof(s)};

    if (pos_seq(vouch->to) <= w->seq)
        return;
    witness_make(w, dir);
    if (w->file.fd < 0)
        return;
    memcpy(s.magic, MAGIC, sizeof(s.magic));
    memcpy(s.volume_id, id->volume_id, 16);
    memcpy(s.log_id, id->log_id, 16);
    s.check = witness_check(&s);
    if (disk_pwritev(&w->file, &iov, 1, (uint64_t)(w->slot % VOUCHES) * SECTOR))
        return;
    sync_file_range(w->file.fd, 0, 0, SYNC_FILE_RANGE_WRITE); /* on its way: the next flush of the disk makes it last */
    w->slot++;
    w->seq = pos_seq(vouch->to);
}
