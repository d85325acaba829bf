#include "base/payload_zstd.h"

#include "base/util.h"

uint64_t payload_zstd(ZSTD_CCtx *context, int level, void *to, uint64_t room, const void *plain, uint64_t length)
{
    uint64_t most = length ? min_u64(room, length - 1) : 0;
    size_t n = ZSTD_compressCCtx(context, to, most, plain, length, level);

    return ZSTD_isError(n) ? 0 : n;
}
