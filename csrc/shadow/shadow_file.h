/*
 * The file of a second source (shadow.c) and the bitmap of the sectors that it knows: bytes only, no policy.
 * Owned by the volume's worker.
 */
#ifndef GLIDE_SHADOW_FILE_H
#define GLIDE_SHADOW_FILE_H

#include <stdbool.h>
#include <stdint.h>

struct shadow_file {
    int fd;          /* sparse; what is beyond its end is zero too */
    uint64_t *known; /* a bit for each sector; costs the memory that was touched */
    uint64_t sectors;
};

/* `fd` is duplicated. -errno. */
int shadow_file_open(struct shadow_file *f, int fd, uint64_t sectors);
void shadow_file_close(struct shadow_file *f);
/* -errno: it has its old size. */
int shadow_file_grow(struct shadow_file *f, uint64_t sectors);

static inline bool shadow_file_knows(const struct shadow_file *f, uint64_t sector)
{
    return sector < f->sectors && f->known[sector / 64] >> sector % 64 & 1;
}
/* Sectors beyond the end are left out. */
void shadow_file_learn(struct shadow_file *f, uint64_t sector, uint64_t count);

/* Offsets and lengths in bytes; -errno. None changes what is known. */
int shadow_file_put(struct shadow_file *f, const uint8_t *data, uint64_t offset, uint64_t length);
int shadow_file_punch(struct shadow_file *f, uint64_t offset, uint64_t length);
int shadow_file_get(const struct shadow_file *f, uint8_t *buf, uint64_t offset, uint64_t length);

#endif
