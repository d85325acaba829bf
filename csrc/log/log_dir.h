/* The directory of a log. */
#ifndef GLIDE_LOG_DIR_H
#define GLIDE_LOG_DIR_H

#include "base/disk.h"
#include "log/witness.h"

/*
 * Open the directory at `path`. What is missing is made: the directories above it, the log's witness file beside it,
 * and the directory itself. The entry of each is synced. -errno, with a text that names the path. `path` is changed
 * while this runs.
 */
int log_dir_open(struct disk_file *dir, char *path, struct witness_file *witness);

#endif
