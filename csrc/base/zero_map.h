/*
 * Which whole blocks the log says are zero: disjoint extents [block, end) with
 * the log position that zeroed them. A discard of terabytes is one extent.
 * A treap (Seidel and Aragon 1996); owned by one thread.
 */
#ifndef GLIDE_ZERO_MAP_H
#define GLIDE_ZERO_MAP_H

#include <stdbool.h>
#include <stdint.h>

struct zero_extent {
    uint64_t start, end; /* blocks */
    uint64_t pos;        /* log position; 0 = not in the map */
};
struct zero_node;
struct zero_map {
    struct zero_node *root;
    uint64_t count;
    uint64_t seed;
    uint64_t bytes;
};

void zero_map_init(struct zero_map *m);
void zero_map_destroy(struct zero_map *m);
/* Blocks [start, end) are zero as of pos, which is newer than all that is in the map. -ENOMEM. */
int zero_map_set(struct zero_map *m, uint64_t start, uint64_t end, uint64_t pos);
/* Forget [start, end). -ENOMEM (a hole in an extent makes two). */
int zero_map_clear(struct zero_map *m, uint64_t start, uint64_t end);
/* The extent that holds `block`, or the first one after it; false = none. */
bool zero_map_next(const struct zero_map *m, uint64_t block, struct zero_extent *out);
/* Position that zeroed `block`, 0 = none. */
uint64_t zero_map_find(const struct zero_map *m, uint64_t block);

#endif
