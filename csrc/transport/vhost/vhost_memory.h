/*
 * Memory that a front-end shares: mappings of its files, and the table that says where the guest has them.
 *
 * A table never changes. A new one shares the mappings that stay, and requests keep the one that they began with: so a
 * region that goes lives until the last request that uses it has ended. `refs` of a table are the worker's. Tables are
 * made and freed, and so mappings are counted, on the thread that controls the device: unmapping much memory takes
 * long.
 *
 * The front-end can make its files shorter. Whoever then touches the mapping gets SIGBUS: the handler puts a page of
 * zeros there and sets *torn. A kernel that copies for us says EFAULT instead.
 */
#ifndef GLIDE_VHOST_MEMORY_H
#define GLIDE_VHOST_MEMORY_H

#include "glide_core_internal.h"
#include "base/util.h"

#include <stdatomic.h>

struct vhost_map {
    uint8_t *base;
    uint64_t bytes;
    uint32_t slot; /* of the table that the handler looks into, from 1 on; 0: not mapped */
};

/* Map the first `bytes` of a file, which has them, and is memory. *torn outlives the mapping. -errno. */
int vhost_map_open(int fd, uint64_t bytes, _Atomic bool *torn, struct vhost_map *out);
void vhost_map_close(struct vhost_map *map);

struct vhost_region {
    uint32_t tables; /* that have it */
    struct glide_vhost_region at;
    struct vhost_map map;
};

struct vhost_memory {
    struct list link; /* of those that are to be freed */
    uint32_t refs;
    uint32_t count;
    uint32_t last; /* where the last look-up found what it wanted */
    struct vhost_region *regions[];
};

/* A table, with regions of `old` where the list says so. *out has one reference. -errno and glide_error(). */
int vhost_memory_new(const struct vhost_memory *old, const struct glide_vhost_region *list, uint32_t count,
                     _Atomic bool *torn, struct vhost_memory **out);
void vhost_memory_free(struct vhost_memory *m);

/* Where the bytes at this address of the guest are, and how many of *length are there in one piece. NULL: in a hole. */
uint8_t *vhost_guest_at(struct vhost_memory *m, uint64_t address, uint64_t *length);
/* Where `length` bytes at this address of the front-end are, all of them in one region. NULL: nowhere. */
uint8_t *vhost_user_at(const struct vhost_memory *m, uint64_t address, uint64_t length);

#endif
