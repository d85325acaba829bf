/*
 * Room on the file system of a log or of the block cache, which may be smaller
 * than its settings, or hold other files. The core leaves a margin: what gives
 * space back (a copy of a manifest, a record, the metadata of an unlink) needs a
 * little of it first.
 */
#ifndef GLIDE_SPACE_H
#define GLIDE_SPACE_H

#include <stdbool.h>
#include <stdint.h>

/* Whether `need` bytes may be taken with `margins` margins left. *room (NULL = none) is what may be taken before the
 * next look at the file system, by the caller's account; this call renews it. A file system that cannot be asked has
 * room. */
bool space_has(int fd, uint64_t need, unsigned margins, uint64_t *room);
/* Whether another file may be made. */
bool space_has_files(int fd);

#endif
