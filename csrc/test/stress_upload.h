/* Packs of an upload in stress.c: built by one call each, and read again. */
#ifndef GLIDE_STRESS_UPLOAD_H
#define GLIDE_STRESS_UPLOAD_H

#include "stress_common.h"

#include <stdlib.h>
#include <string.h>

/* Build a pack and read it into the base. */
static void upload_pack(uint8_t (*base)[GLIDE_BLOCK], glide_plan *plan, uint64_t number,
                        const struct glide_pack_job *job)
{
    const struct glide_pack_rules rules = {.level = 1, .samples = 4, .sample = 4096, .shrinks = 970};
    uint64_t capacity = GLIDE_PACK_HEADER + job->plain;
    uint8_t *body = malloc(capacity), *records = malloc(job->count * GLIDE_PACK_ENTRY);
    uint64_t *chunks = malloc(job->count * sizeof(*chunks));
    struct glide_packed packed;
    static __thread uint8_t data[GLIDE_BLOCK];

    MUST(glide_plan_build(plan, number, &rules, body, capacity, records, chunks, &packed));
    for (uint64_t i = 0; i < job->count; i++) {
        uint64_t block;
        uint32_t field[4]; /* mask, zero mask, offset, stored */
        memcpy(&block, records + i * GLIDE_PACK_ENTRY, sizeof(block));
        memcpy(field, records + i * GLIDE_PACK_ENTRY + sizeof(block), sizeof(field));
        uint32_t plain = (uint32_t)__builtin_popcount(field[0]) * GLIDE_SECTOR;
        if (plain)
            MUST(glide_payload_decompress(body + field[2], field[3], data, plain));
        glide_block_overlay(base[block], field[0], field[1], data);
    }
    free(body);
    free(records);
    free(chunks);
}

/* Add what was gathered to the blocks at `base`, by way of packs. */
static void upload_packs(uint8_t (*base)[GLIDE_BLOCK], uint64_t size, glide_gather *g)
{
    const struct glide_chunk *chunks;
    const struct glide_pack_job *jobs;
    glide_plan *plan;

    MUST(glide_plan_open(g, size, &plan));
    uint64_t count = glide_plan_chunks(plan, &chunks);
    uint8_t *keep = malloc(count + 1);
    memset(keep, 1, count + 1);
    MUST(glide_plan_cut(plan, keep, NULL, 0, 4 * GLIDE_BLOCK, 1000));
    free(keep);
    count = glide_plan_jobs(plan, &jobs);
    for (uint64_t i = 0; i < count; i++)
        upload_pack(base, plan, i, &jobs[i]);
    glide_plan_close(plan);
}

#endif
