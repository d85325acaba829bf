/*
 * Where a key lands in a hash table. Guests choose block numbers and content, clients choose requests: with a known
 * function they could choose keys that all land in one place, and every look-up would walk them. So it depends on a
 * secret that each process draws when the core is loaded.
 */
#ifndef GLIDE_HASH_H
#define GLIDE_HASH_H

#include <stdint.h>

extern uint64_t hash_secret[3];

/* Folded multiplication, as in wyhash (Wang Yi): every bit of key and secret reaches every bit of the result. */
static inline uint64_t hash_fold(uint64_t a, uint64_t b)
{
    unsigned __int128 product = (unsigned __int128)a * b;

    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

static inline uint64_t hash_u64(uint64_t key)
{
    return hash_fold(hash_fold(key ^ hash_secret[0], hash_secret[1]) ^ hash_secret[2], 0x9e3779b97f4a7c15u);
}

#endif
