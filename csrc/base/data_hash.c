#include "base/data_hash.h"

#include "glide_core_internal.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

uint64_t data_hash(const void *data, size_t length)
{
#ifdef __x86_64__
    if (__builtin_cpu_supports("avx2"))
        return data_hash_avx2(data, length);
#endif
    return XXH3_64bits(data, length);
}

uint64_t sums_hash(const uint64_t *sums, uint32_t sectors)
{
    return sectors == 1 ? sums[0] : data_hash(sums, sectors * sizeof(*sums));
}

uint64_t record_hash(const void *data, uint32_t sectors, uint64_t *sums)
{
    for (uint32_t i = 0; i < sectors; i++)
        sums[i] = data_hash((const char *)data + (size_t)i * GLIDE_SECTOR, GLIDE_SECTOR);
    return sums_hash(sums, sectors);
}
