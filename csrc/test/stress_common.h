/* What all parts of stress.c use: calls that must succeed, random numbers, what a sector contains, and hashes. */
#ifndef STRESS_COMMON_H
#define STRESS_COMMON_H

#include "../glide_core_internal.h"
#include "base/data_hash.h"

#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

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

static void stress_key(uint8_t *key, const uint8_t *data)
{
    uint64_t a = 0xcbf29ce484222325u, b = 0x9e3779b97f4a7c15u;

    for (int i = 0; i < GLIDE_BLOCK; i += 8) {
        uint64_t w;
        memcpy(&w, data + i, 8);
        a = (a ^ w) * 0x100000001b3u;
        b = (b + w) * 0xd6e8feb86659fd93u ^ b >> 29;
    }
    memcpy(key, &a, 8);
    memcpy(key + 8, &b, 8);
}

/* The hash of a record is the same on every CPU, whatever computes it. */
static void stress_check_hash(void)
{
    static uint8_t data[GLIDE_BLOCK];

    for (size_t i = 0; i < sizeof(data); i++)
        data[i] = (uint8_t)(i * i >> 3);
    for (size_t length = 0; length <= sizeof(data); length += length < 2048 ? 1 : 1021)
        MUST(data_hash(data, length) == XXH3_64bits(data, length) ? 0 : -EUCLEAN);
}

#endif
