/*
 * What the data of a log segment must be: a hash per sector, in memory, so that
 * no read of a log is trusted without a check. A disk that loses written-back
 * pages (a thin volume that is full, a dying SSD) does not tell readers; and the
 * journal, which has the hashes too, may be lost with the data.
 *
 * For records that this process appended, every sector's hash is known. For those that a replay found, only the
 * record's: the first read of one reads all of it and learns its sectors' hashes. Owned by the volume's worker; a
 * gather has a copy.
 */
#ifndef GLIDE_SECTOR_SUMS_H
#define GLIDE_SECTOR_SUMS_H

#include "log/segment.h"

struct sector_sums {
    uint64_t *sum; /* by index: of the sector; of a record that was not read yet at its first index */
    uint8_t *kind; /* enum sum_kind in sector_sums.c */
    uint32_t capacity;
};

void sums_free(struct sector_sums *s);
/* Make room for indices below `end`. -ENOMEM. */
int sums_reserve(struct sector_sums *s, uint32_t end);
/* The sectors of a record at `index`, with their hashes. There is room. */
void sums_set(struct sector_sums *s, uint32_t index, const uint64_t *sums, uint32_t count);
/* Copy what is known about the sectors below `end`. -ENOMEM. */
int sums_copy(struct sector_sums *to, const struct sector_sums *from, uint32_t end);
/* Whether a record's hash is `hash`: 1, or 0 = not all of its sectors are known by themselves, or -EUCLEAN. */
int sums_vouch(const struct sector_sums *s, uint32_t index, uint32_t count, uint64_t hash);
/* All that a journal says. -ENOMEM. */
int sums_from_journal(struct sector_sums *s, const struct segment_journal *j);

/* Extend the range of sectors [*index, *end) to whole records where only those have a hash. */
void sums_extend(const struct sector_sums *s, uint32_t *index, uint32_t *end);
/* Whether the data of such a range has its hashes; learns those that were not known. */
bool sums_check(struct sector_sums *s, uint32_t index, uint32_t end, const uint8_t *data);

#endif
