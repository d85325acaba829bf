/*
 * What a gather gives to the rest of the core; glide_packs.h has the calls of Python.
 */
#ifndef GLIDE_GATHER_H
#define GLIDE_GATHER_H

#include "glide_core_internal.h"

/*
 * Read sectors of a block, ascending, to `out`: those of `mask`, which an entry has all of. Each is verified as it is
 * read. Any number of threads. 0, -EUCLEAN with the file's name in the text, or -errno.
 */
int gather_read(const struct gather *g, uint64_t block, uint32_t mask, uint8_t *out);

#endif
