/*
 * Payloads of packs: compression and the sector arithmetic of part-blocks, one
 * call for many so that Python pays per pack and not per block.
 */
#include "glide_core_internal.h"
#include "base/payload_zstd.h"
#include "base/util.h"

#include <string.h>

int64_t glide_payloads_compress(const void *plain, const uint32_t *lengths, uint32_t count, int level, void *out,
                                uint64_t capacity, uint32_t *stored)
{
    const char *in = plain;
    char *to = out;
    uint64_t used = 0;
    ZSTD_CCtx *context = ZSTD_createCCtx();

    if (!context)
        return fail(-ENOMEM, "no memory to compress");
    for (uint32_t i = 0; i < count; i++) {
        uint64_t left = capacity - used;
        uint64_t n = payload_zstd(context, level, to + used, left, in, lengths[i]);
        if (!n) {
            if (left < lengths[i]) {
                ZSTD_freeCCtx(context);
                return fail(-ENOBUFS, "the output buffer is too small");
            }
            memcpy(to + used, in, lengths[i]);
            n = lengths[i];
        }
        stored[i] = (uint32_t)n;
        used += n;
        in += lengths[i];
    }
    ZSTD_freeCCtx(context);
    return (int64_t)used;
}

int glide_payload_decompress(const void *stored, uint32_t stored_length, void *plain, uint32_t plain_length)
{
    if (stored_length == plain_length) {
        memcpy(plain, stored, plain_length);
        return 0;
    }
    size_t n = ZSTD_decompress(plain, plain_length, stored, stored_length);
    return !ZSTD_isError(n) && n == plain_length ? 0 : fail(-EUCLEAN, "a payload does not decompress to its length");
}

void glide_block_overlay(void *block, uint32_t mask, uint32_t zero_mask, const void *sectors)
{
    const char *from = sectors;
    char *to = block;

    for (uint32_t i = 0; i < GLIDE_BLOCK_SECTORS; i++) {
        if (mask >> i & 1) {
            memcpy(to + (size_t)i * GLIDE_SECTOR, from, GLIDE_SECTOR);
            from += GLIDE_SECTOR;
        } else if (zero_mask >> i & 1) {
            memset(to + (size_t)i * GLIDE_SECTOR, 0, GLIDE_SECTOR);
        }
    }
}

void glide_block_extract(const void *block, uint32_t mask, void *out)
{
    char *to = out;

    for (uint32_t i = 0; i < GLIDE_BLOCK_SECTORS; i++) {
        if (mask >> i & 1) {
            memcpy(to, (const char *)block + (size_t)i * GLIDE_SECTOR, GLIDE_SECTOR);
            to += GLIDE_SECTOR;
        }
    }
}
