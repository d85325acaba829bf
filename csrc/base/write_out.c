#include "glide_core_internal.h"

#include <errno.h>
#include <fcntl.h>

int glide_write_out(int fd) { return sync_file_range(fd, 0, 0, SYNC_FILE_RANGE_WRITE) ? -errno : 0; }
