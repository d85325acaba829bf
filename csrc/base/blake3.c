/*
 * Eight chunks (or parents) at a time, one in each lane of a vector, as the authors' hash_many does; what is left over
 * goes one at a time. The compiler makes of the vectors what the CPU has: with AVX2 one register each, else two or
 * more. Input is never longer than a block, so the chaining values of all chunks are on the stack, and the tree above
 * them is joined level by level: with an odd one out passed up, that is the tree of the paper.
 */
#include "base/blake3.h"

#include "glide_core_internal.h"

#include <stdbool.h>
#include <string.h>

#ifndef __clang__
#pragma GCC optimize("O3") /* a fifth faster than O2, though the instructions are almost the same */
#endif
#if defined(__x86_64__)
#define LANES_CODE __attribute__((target("avx2")))
#else
#define LANES_CODE
#endif
#define INLINE static inline __attribute__((always_inline))

enum { CHUNK_START = 1, CHUNK_END = 2, PARENT = 4, ROOT = 8, DERIVE_CONTEXT = 32, DERIVE_MATERIAL = 64 };
enum { CHUNK = 1024, PIECE = 64, LANES = 8, CV = 32, MAX_CHUNKS = BLAKE3_MAX / CHUNK };

static const uint32_t IV[8] = {0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A,
                               0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19};
static const uint8_t SCHEDULE[7][16] = {
    {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, {2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8},
    {3, 4, 10, 12, 13, 2, 7, 14, 6, 5, 9, 0, 11, 15, 8, 1}, {10, 7, 12, 9, 14, 3, 13, 15, 4, 0, 11, 2, 5, 8, 1, 6},
    {12, 13, 9, 11, 15, 10, 14, 8, 7, 2, 5, 3, 0, 1, 6, 4}, {9, 14, 11, 5, 8, 12, 15, 1, 13, 3, 0, 10, 2, 6, 4, 7},
    {11, 15, 5, 0, 1, 9, 8, 6, 14, 10, 2, 12, 3, 4, 7, 13},
};

/* ---- one at a time ----------------------------------------------------------------------------- */

static inline uint32_t rotate(uint32_t x, int n) { return x >> n | x << (32 - n); }

static inline void mix(uint32_t *s, int a, int b, int c, int d, uint32_t x, uint32_t y)
{
    s[a] += s[b] + x;
    s[d] = rotate(s[d] ^ s[a], 16);
    s[c] += s[d];
    s[b] = rotate(s[b] ^ s[c], 12);
    s[a] += s[b] + y;
    s[d] = rotate(s[d] ^ s[a], 8);
    s[c] += s[d];
    s[b] = rotate(s[b] ^ s[c], 7);
}

/* The chaining value after one piece of 64 bytes, `length` of which are data. */
static void compress(uint32_t cv[8], const uint8_t *piece, uint32_t length, uint64_t counter, uint32_t flags)
{
    uint32_t m[16], s[16];

    memcpy(m, piece, PIECE); /* little-endian, as all that we run on */
    memcpy(s, cv, CV);
    memcpy(s + 8, IV, 16);
    s[12] = (uint32_t)counter;
    s[13] = (uint32_t)(counter >> 32);
    s[14] = length;
    s[15] = flags;
    for (int r = 0; r < 7; r++) {
        const uint8_t *w = SCHEDULE[r];
        mix(s, 0, 4, 8, 12, m[w[0]], m[w[1]]);
        mix(s, 1, 5, 9, 13, m[w[2]], m[w[3]]);
        mix(s, 2, 6, 10, 14, m[w[4]], m[w[5]]);
        mix(s, 3, 7, 11, 15, m[w[6]], m[w[7]]);
        mix(s, 0, 5, 10, 15, m[w[8]], m[w[9]]);
        mix(s, 1, 6, 11, 12, m[w[10]], m[w[11]]);
        mix(s, 2, 7, 8, 13, m[w[12]], m[w[13]]);
        mix(s, 3, 4, 9, 14, m[w[14]], m[w[15]]);
    }
    for (int i = 0; i < 8; i++)
        cv[i] = s[i] ^ s[i + 8];
}

/* A chunk of at most 1024 bytes; `root` if it is all there is. */
static void hash_chunk(const uint8_t *data, size_t length, const uint32_t *key, uint64_t counter, uint32_t flags,
                       bool root, uint32_t out[8])
{
    uint8_t last[PIECE] = {0};
    uint32_t start = CHUNK_START;

    memcpy(out, key, CV);
    for (; length > PIECE; data += PIECE, length -= PIECE, start = 0)
        compress(out, data, PIECE, counter, flags | start);
    memcpy(last, data, length);
    compress(out, last, (uint32_t)length, counter, flags | start | CHUNK_END | (root ? ROOT : 0));
}

/* ---- eight at a time ------------------------------------------------------------------------------ */

typedef uint32_t lanes __attribute__((vector_size(32)));
typedef uint8_t lane_bytes __attribute__((vector_size(32)));

INLINE LANES_CODE lanes all(uint32_t x) { return (lanes){x, x, x, x, x, x, x, x}; }
INLINE LANES_CODE lanes load(const uint8_t *from)
{
    lanes v;

    memcpy(&v, from, sizeof(v));
    return v;
}
/* Rotations by whole bytes are one shuffle. */
INLINE LANES_CODE lanes rotate16(lanes x)
{
    return (lanes)__builtin_shufflevector((lane_bytes)x, (lane_bytes)x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15,
                                          12, 13, 18, 19, 16, 17, 22, 23, 20, 21, 26, 27, 24, 25, 30, 31, 28, 29);
}
INLINE LANES_CODE lanes rotate8(lanes x)
{
    return (lanes)__builtin_shufflevector((lane_bytes)x, (lane_bytes)x, 1, 2, 3, 0, 5, 6, 7, 4, 9, 10, 11, 8, 13, 14,
                                          15, 12, 17, 18, 19, 16, 21, 22, 23, 20, 25, 26, 27, 24, 29, 30, 31, 28);
}
INLINE LANES_CODE lanes rotate_by(lanes x, int n) { return (x >> n) | (x << (32 - n)); }

INLINE LANES_CODE void mix_lanes(lanes *s, int a, int b, int c, int d, lanes x, lanes y)
{
    s[a] += s[b] + x;
    s[d] = rotate16(s[d] ^ s[a]);
    s[c] += s[d];
    s[b] = rotate_by(s[b] ^ s[c], 12);
    s[a] += s[b] + y;
    s[d] = rotate8(s[d] ^ s[a]);
    s[c] += s[d];
    s[b] = rotate_by(s[b] ^ s[c], 7);
}

/* Rows become columns. */
INLINE LANES_CODE void transpose(lanes *v)
{
    lanes t[8], u[8];

    for (int i = 0; i < 8; i += 2) {
        t[i] = __builtin_shufflevector(v[i], v[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        t[i + 1] = __builtin_shufflevector(v[i], v[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
    for (int i = 0; i < 8; i += 4) {
        u[i] = __builtin_shufflevector(t[i], t[i + 2], 0, 1, 8, 9, 4, 5, 12, 13);
        u[i + 1] = __builtin_shufflevector(t[i], t[i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        u[i + 2] = __builtin_shufflevector(t[i + 1], t[i + 3], 0, 1, 8, 9, 4, 5, 12, 13);
        u[i + 3] = __builtin_shufflevector(t[i + 1], t[i + 3], 2, 3, 10, 11, 6, 7, 14, 15);
    }
    for (int i = 0; i < 4; i++) {
        v[i] = __builtin_shufflevector(u[i], u[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        v[i + 4] = __builtin_shufflevector(u[i], u[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
}

/* Eight inputs of `pieces` whole pieces each, `stride` bytes apart. `step`: counters ascend (chunks), or stay 0. */
LANES_CODE static void hash_lanes(const uint8_t *data, size_t stride, int pieces, const uint32_t *key, uint32_t counter,
                                  bool step, uint32_t flags, uint32_t out[LANES][8])
{
    lanes cv[8], m[16], s[16];
    const lanes low = all(counter) + (step ? (lanes){0, 1, 2, 3, 4, 5, 6, 7} : all(0));

    for (int i = 0; i < 8; i++)
        cv[i] = all(key[i]);
    for (int p = 0; p < pieces; p++) {
        uint32_t now = flags;
        if (step)
            now |= (p == 0 ? CHUNK_START : 0) | (p == pieces - 1 ? CHUNK_END : 0);
        for (int i = 0; i < LANES; i++) {
            m[i] = load(data + (size_t)i * stride + (size_t)p * PIECE);
            m[i + 8] = load(data + (size_t)i * stride + (size_t)p * PIECE + 32);
        }
        transpose(m);
        transpose(m + 8);
        for (int i = 0; i < 8; i++)
            s[i] = cv[i];
        for (int i = 0; i < 4; i++)
            s[i + 8] = all(IV[i]);
        s[12] = low;
        s[13] = all(0);
        s[14] = all(PIECE);
        s[15] = all(now);
#pragma GCC unroll 7
        for (int r = 0; r < 7; r++) {
            const uint8_t *w = SCHEDULE[r];
            mix_lanes(s, 0, 4, 8, 12, m[w[0]], m[w[1]]);
            mix_lanes(s, 1, 5, 9, 13, m[w[2]], m[w[3]]);
            mix_lanes(s, 2, 6, 10, 14, m[w[4]], m[w[5]]);
            mix_lanes(s, 3, 7, 11, 15, m[w[6]], m[w[7]]);
            mix_lanes(s, 0, 5, 10, 15, m[w[8]], m[w[9]]);
            mix_lanes(s, 1, 6, 11, 12, m[w[10]], m[w[11]]);
            mix_lanes(s, 2, 7, 8, 13, m[w[12]], m[w[13]]);
            mix_lanes(s, 3, 4, 9, 14, m[w[14]], m[w[15]]);
        }
        for (int i = 0; i < 8; i++)
            cv[i] = s[i] ^ s[i + 8];
    }
    transpose(cv);
    memcpy(out, cv, sizeof(cv));
}

static bool has_lanes(void)
{
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx2");
#else
    return true;
#endif
}

/* ---- the tree ---------------------------------------------------------------------------------------- */

/* Join neighbours in place; how many values are left. */
static size_t join_level(uint32_t (*cvs)[8], size_t count, const uint32_t *key, uint32_t flags)
{
    size_t pairs = count / 2, done = 0;

    for (; has_lanes() && pairs - done >= LANES; done += LANES) {
        uint32_t joined[LANES][8];
        hash_lanes((const uint8_t *)cvs[2 * done], PIECE, 1, key, 0, false, flags | PARENT, joined);
        memcpy(cvs[done], joined, sizeof(joined));
    }
    for (; done < pairs; done++) {
        uint32_t joined[8];
        memcpy(joined, key, CV);
        compress(joined, (const uint8_t *)cvs[2 * done], PIECE, 0, flags | PARENT | (count == 2 ? ROOT : 0));
        memcpy(cvs[done], joined, CV);
    }
    if (count % 2)
        memcpy(cvs[pairs], cvs[count - 1], CV);
    return pairs + count % 2;
}

static void hash_all(const uint8_t *data, size_t length, const uint32_t *key, uint32_t flags, uint32_t out[8])
{
    uint32_t cvs[MAX_CHUNKS + 1][8];
    size_t count = 0;

    if (length <= CHUNK) {
        hash_chunk(data, length, key, 0, flags, true, out);
        return;
    }
    while (has_lanes() && length >= LANES * CHUNK) {
        hash_lanes(data, CHUNK, CHUNK / PIECE, key, (uint32_t)count, true, flags, cvs + count);
        data += LANES * CHUNK;
        length -= LANES * CHUNK;
        count += LANES;
    }
    while (length) {
        size_t n = length < CHUNK ? length : CHUNK;
        hash_chunk(data, n, key, count, flags, false, cvs[count]);
        data += n;
        length -= n;
        count++;
    }
    while (count > 1)
        count = join_level(cvs, count, key, flags);
    memcpy(out, cvs[0], CV);
}

void blake3_hash(const void *data, size_t length, uint8_t out[16])
{
    uint32_t words[8];

    hash_all(data, length, IV, 0, words);
    memcpy(out, words, 16);
}

void blake3_context(const char *context, struct blake3_key *out)
{
    hash_all((const uint8_t *)context, strlen(context), IV, DERIVE_CONTEXT, out->words);
}

void blake3_derive(const struct blake3_key *key, const void *data, size_t length, uint8_t out[16])
{
    uint32_t words[8];

    hash_all(data, length, key->words, DERIVE_MATERIAL, words);
    memcpy(out, words, 16);
}

void glide_payload_hash(const void *data, uint64_t length, const char *context, uint8_t *out)
{
    struct blake3_key key;

    if (!context) {
        blake3_hash(data, length, out);
        return;
    }
    blake3_context(context, &key);
    blake3_derive(&key, data, length, out);
}
