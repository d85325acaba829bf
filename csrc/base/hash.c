#include "base/hash.h"

#include "glide_core_internal.h"
#include "base/util.h"

#include <sys/random.h>
#include <unistd.h>

uint64_t hash_secret[3];

static uint64_t spread(uint64_t seed) { return hash_fold(seed ^ 0xa0761d6478bd642fu, 0xe7037ed1a0b428dbu); }

__attribute__((constructor)) static void draw(void)
{
    if (getrandom(hash_secret, sizeof(hash_secret), GRND_NONBLOCK) != (ssize_t)sizeof(hash_secret)) {
        /* seccomp, or a boot that has no randomness yet: hard to guess, if not a secret */
        hash_secret[0] = spread(clock_ns(CLOCK_REALTIME) ^ (uint64_t)(uintptr_t)&hash_secret);
        hash_secret[1] = spread(hash_secret[0] ^ (uint64_t)getpid());
        hash_secret[2] = spread(hash_secret[1]);
    }
    hash_secret[1] |= 1; /* a factor: not 0 */
}

uint64_t glide_hash(uint64_t key) { return hash_u64(key); }
