/* What ublk_null's devices read as: every 8 bytes hold their own byte offset on the disk. */
#ifndef PATTERN_H
#define PATTERN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

static void fill_pattern(unsigned char *buf, uint64_t start, size_t len)
{
	for (size_t i = 0; i < len; i += 8)
		memcpy(buf + i, &(uint64_t){start + i}, 8);
}

static bool is_pattern(const unsigned char *buf, uint64_t start, size_t len)
{
	for (size_t i = 0; i < len; i += 8)
		if (memcmp(buf + i, &(uint64_t){start + i}, 8))
			return false;
	return true;
}

#endif
