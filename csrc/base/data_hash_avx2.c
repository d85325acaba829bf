/* xxHash, compiled for AVX2: it chooses its instructions at compile time, so this needs a file of its own. */
#include "base/data_hash.h"

#ifdef __x86_64__

#include <immintrin.h>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC target("avx2")
#endif

#define XXH_INLINE_ALL
#define XXH_VECTOR 2 /* XXH_AVX2, which the header names after it was included */
#include <xxhash.h>

uint64_t data_hash_avx2(const void *data, size_t length) { return XXH3_64bits(data, length); }

#ifdef __clang__
#pragma clang attribute pop
#endif

#endif
