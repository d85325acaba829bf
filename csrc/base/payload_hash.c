#include "base/payload_hash.h"

#include "blake3/blake3.h"
#include "glide_core_internal.h"

void payload_hash(const void *data, size_t length, uint8_t out[PAYLOAD_HASH])
{
    blake3_hasher hasher;

    blake3_hasher_init(&hasher);
    blake3_hasher_update(&hasher, data, length);
    blake3_hasher_finalize(&hasher, out, PAYLOAD_HASH);
}

void payload_derive(const char *context, const void *data, size_t length, uint8_t out[PAYLOAD_HASH])
{
    blake3_hasher hasher;

    blake3_hasher_init_derive_key(&hasher, context);
    blake3_hasher_update(&hasher, data, length);
    blake3_hasher_finalize(&hasher, out, PAYLOAD_HASH);
}

void glide_payload_hash(const void *data, uint64_t length, const char *context, uint8_t *out)
{
    if (context)
        payload_derive(context, data, length, out);
    else
        payload_hash(data, length, out);
}

/* The library notes what the CPU has at its first call, and without a lock: that call is made before there are threads.
 */
__attribute__((constructor)) static void choose_by_cpu(void)
{
    uint8_t out[PAYLOAD_HASH];

    payload_hash("", 0, out);
}
