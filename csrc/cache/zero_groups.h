/*
 * Which items of a sequence are zero in the base, in groups of GLIDE_GROUP: blocks by chunk, or chunks by page. A
 * group that is all zeros, or has none, is one entry of a table; any other has a bitmap beside it. So a hole of
 * terabytes costs an entry per page, and no walk is longer than the groups that are there. Owned by one thread.
 *
 * An item that is not set is unknown, unless its whole group was described (zero_groups_put).
 */
#ifndef GLIDE_ZERO_GROUPS_H
#define GLIDE_ZERO_GROUPS_H

#include "base/table.h"
#include "glide_core_internal.h"

#define GROUP_WORDS (GLIDE_GROUP / 64)

struct zero_groups {
    struct table groups; /* number of the group -> what is known about it */
    uint64_t bytes;      /* of bitmaps; see zero_groups_bytes */
};

enum zero_state { ZERO_UNKNOWN, ZERO_NOT, ZERO_IS };

void zero_groups_init(struct zero_groups *g);
void zero_groups_destroy(struct zero_groups *g);
uint64_t zero_groups_bytes(const struct zero_groups *g);
bool zero_groups_find(const struct zero_groups *g, uint64_t at);
/* What is known from `at` on. *end (at most `limit`, which is above `at`) is how far that holds without a look at the
 * next group. */
enum zero_state zero_groups_run(const struct zero_groups *g, uint64_t at, uint64_t limit, uint64_t *end);
/* [at, end), which is in one group, are zero. -ENOMEM. */
int zero_groups_set(struct zero_groups *g, uint64_t at, uint64_t end);
/* Describe a group: items whose bits are set are zero, besides those known to be; the others are not. -ENOMEM. */
int zero_groups_put(struct zero_groups *g, uint64_t group, const uint64_t bits[GROUP_WORDS]);
/* Forget what is known about [at, end). The time depends on the groups that are there, not on the length. */
void zero_groups_clear(struct zero_groups *g, uint64_t at, uint64_t end);

#endif
