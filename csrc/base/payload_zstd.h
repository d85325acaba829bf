/* Compression of a payload, which is the part of a block that a pack holds. */
#ifndef GLIDE_PAYLOAD_ZSTD_H
#define GLIDE_PAYLOAD_ZSTD_H

#include <stdint.h>
#include <zstd.h>

/* Compress `length` bytes to `to`, which has `room` bytes. Returns how many it takes; 0 if it does not shrink or has no
 * room: then it is stored raw. What is at `to` beyond that is undefined. */
uint64_t payload_zstd(ZSTD_CCtx *context, int level, void *to, uint64_t room, const void *plain, uint64_t length);

#endif
