/*
 * The plan of an upload, which packs have which blocks: see "upload" in glide_packs.h.
 */
#ifndef GLIDE_UPLOAD_PLAN_H
#define GLIDE_UPLOAD_PLAN_H

#include "glide_core_internal.h"

struct upload_plan {
    const struct gather *gather;
    const struct glide_entry *entries; /* the gather's */
    uint64_t entry_count;
    struct glide_chunk *chunks;
    uint64_t chunk_count;
    struct glide_entry *items; /* ascending by block: what packs will say */
    uint64_t item_count;
    struct glide_pack_job *jobs;
    uint64_t job_count;
};

#endif
