/*
 * BLAKE3 (O'Connor, Aumasson, Neves, Wilcox-O'Hearn, "BLAKE3: one function, fast everywhere", 2020), as much of it as
 * payloads and keys of the block cache need: one call for data that is all here, 16 bytes of output. The same value
 * as Python's blake3 gives (tests/core/test_blake3.py).
 */
#ifndef GLIDE_BLAKE3_H
#define GLIDE_BLAKE3_H

#include <stddef.h>
#include <stdint.h>

#define BLAKE3_MAX (128u << 10) /* longest input, bytes */

/* The hash of at most BLAKE3_MAX bytes. */
void blake3_hash(const void *data, size_t length, uint8_t out[16]);
/* The same in key-derivation mode, for the key that `context` gives. */
struct blake3_key {
    uint32_t words[8];
};
void blake3_context(const char *context, struct blake3_key *out);
void blake3_derive(const struct blake3_key *key, const void *data, size_t length, uint8_t out[16]);

#endif
