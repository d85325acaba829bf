/*
 * BLAKE3-128, the hash of content in packs and in the block cache. Only the official implementation, csrc/blake3.
 */
#ifndef GLIDE_PAYLOAD_HASH_H
#define GLIDE_PAYLOAD_HASH_H

#include <stddef.h>
#include <stdint.h>

#define PAYLOAD_HASH 16

void payload_hash(const void *data, size_t length, uint8_t out[PAYLOAD_HASH]);
/* The same in key-derivation mode: of other data, or with another context, it is another hash. */
void payload_derive(const char *context, const void *data, size_t length, uint8_t out[PAYLOAD_HASH]);

#endif
