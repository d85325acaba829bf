#include "data_hash.h"

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
