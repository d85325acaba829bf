/* What all parts of stress.c use: calls that must succeed, random numbers, and what a sector contains. */
#ifndef STRESS_COMMON_H
#define STRESS_COMMON_H

#include "../glide_core_internal.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MUST(x)                                                                                                        \
    do {                                                                                                               \
        int64_t must_result = (x);                                                                                     \
        if (must_result < 0) {                                                                                         \
            fprintf(stderr, "%s:%d: %s = %lld: %s\n", __FILE__, __LINE__, #x, (long long)must_result, glide_error());  \
            abort();                                                                                                   \
        }                                                                                                              \
    } while (0)

static uint64_t stress_draw(uint64_t *seed)
{
    *seed ^= *seed << 13; /* xorshift64 (Marsaglia 2003) */
    *seed ^= *seed >> 7;
    *seed ^= *seed << 17;
    return *seed >> 16;
}

/* A sector's content is its number and generation, repeated; generation 0 is zeros. */
static void stress_fill(uint8_t *buf, uint64_t sector, uint64_t generation)
{
    uint64_t *words = (uint64_t *)(void *)buf;

    for (int i = 0; i < GLIDE_SECTOR / 16; i++) {
        words[2 * i] = generation ? sector : 0;
        words[2 * i + 1] = generation;
    }
}

static void stress_check(const uint8_t *buf, uint64_t sector, uint64_t generation)
{
    uint8_t want[GLIDE_SECTOR];

    stress_fill(want, sector, generation);
    if (memcmp(buf, want, GLIDE_SECTOR)) {
        uint64_t got[2];
        memcpy(got, buf, sizeof(got));
        fprintf(stderr, "sector %llu: want generation %llu, got sector %llu generation %llu\n",
                (unsigned long long)sector, (unsigned long long)generation, (unsigned long long)got[0],
                (unsigned long long)got[1]);
        abort();
    }
}

#endif
