/*
 * XXH3-64 of data: the same value on every CPU, computed with AVX2 if the CPU has it. With the instructions that all of
 * x86-64 has, hashing took a seventh of the CPU time of a large write.
 */
#ifndef GLIDE_DATA_HASH_H
#define GLIDE_DATA_HASH_H

#include <stddef.h>
#include <stdint.h>

uint64_t data_hash(const void *data, size_t length);
/* The hash of a log record's data: for one sector its data_hash, for more the data_hash of the sectors' hashes. Those
 * are put into `sums`, so one pass gives what a read of any sector is checked with. */
uint64_t record_hash(const void *data, uint32_t sectors, uint64_t *sums);
/* The same from hashes that are known. */
uint64_t sums_hash(const uint64_t *sums, uint32_t sectors);

#ifdef __x86_64__
uint64_t data_hash_avx2(const void *data, size_t length); /* only where the CPU has it */
#endif

#endif
