/*
 * What a volume's shadow (shadow.c) has, and what Python hears from it. Owned by the volume's worker.
 */
#ifndef GLIDE_SHADOW_STATE_H
#define GLIDE_SHADOW_STATE_H

#include "shadow/shadow_file.h"
#include "volume/volume.h"

struct shadow {
    struct filter filter;
    struct shadow_file file;
    struct glide_sectors *beyond; /* what it knows beyond the end */
    uint64_t beyond_count;
    struct list reads;  /* struct shadow_read */
    struct table asked; /* blocks that Python was asked for */
    uint32_t parked;
    uint32_t told;
    bool broken;
    uint8_t scratch[GLIDE_BLOCK];
};

struct shadow_source {
    uint64_t pos; /* log position, or slot << 32 | generation */
    uint8_t kind; /* enum glide_shadow_source */
    bool changed; /* written since the READ began */
};

/* A READ under way. */
struct shadow_read {
    struct list link;
    struct io_req *req;
    uint64_t first, count; /* sectors */
    uint64_t parked_ns;    /* waits for Python since, 0 = does not */
    bool go;               /* needs to wait no more */
    struct shadow_source sources[];
};

static inline struct shadow *shadow_of(const struct volume *v)
{
    return container_of(v->filter, struct shadow, filter);
}

/* Hand an item to glide_shadow_next, with the volume's cookie. False: no memory. */
bool shadow_tell(struct volume *v, struct glide_shadow_item item);
/* Nothing is compared any more, because of `err` (-errno). READs that wait are let go at the next tick: callers may be
 * in the middle of one. */
void shadow_give_up(struct volume *v, int err);

#endif
