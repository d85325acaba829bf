#include "base/space.h"

#include "base/util.h"

#include <sys/statvfs.h>

#define STEP (1u << 20) /* bytes between two looks: many logs may take so much at once */
#define MARGIN_MAX (64ull << 20)
#define MARGIN_SHARE 16 /* of a small file system */
#define FILES_LEFT 16

bool space_has(int fd, uint64_t need, unsigned margins, uint64_t *room)
{
    struct statvfs st;

    if ((room && need <= *room) || fstatvfs(fd, &st))
        return true;
    uint64_t total = (uint64_t)st.f_blocks * st.f_frsize, free = (uint64_t)st.f_bavail * st.f_frsize;
    uint64_t margin = margins * min_u64(MARGIN_MAX, total / MARGIN_SHARE);
    uint64_t left = free > margin ? free - margin : 0;
    if (room)
        *room = min_u64(left, max_u64(need, STEP));
    return need <= left || !total;
}

bool space_has_files(int fd)
{
    struct statvfs st;

    return fstatvfs(fd, &st) || !st.f_files || st.f_favail >= FILES_LEFT;
}
