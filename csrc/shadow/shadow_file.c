#include "shadow/shadow_file.h"

#include "base/disk.h"
#include "base/util.h"
#include "log/segment.h"

#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static uint64_t bitmap_bytes(uint64_t sectors) { return div_up(sectors, 64) * sizeof(uint64_t); }

int shadow_file_open(struct shadow_file *f, int fd, uint64_t sectors)
{
    f->sectors = sectors;
    f->fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    if (f->fd < 0)
        return -errno;
    void *map = mmap(NULL, bitmap_bytes(sectors), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                     -1, 0);
    if (map == MAP_FAILED) {
        int err = -errno;
        close(f->fd);
        return err;
    }
    madvise(map, bitmap_bytes(sectors), MADV_NOHUGEPAGE);
    f->known = map;
    return 0;
}

void shadow_file_close(struct shadow_file *f)
{
    munmap(f->known, bitmap_bytes(f->sectors));
    close(f->fd);
}

int shadow_file_grow(struct shadow_file *f, uint64_t sectors)
{
    if (sectors <= f->sectors)
        return 0;
    void *map = mremap(f->known, bitmap_bytes(f->sectors), bitmap_bytes(sectors), MREMAP_MAYMOVE);
    if (map == MAP_FAILED)
        return -errno;
    f->known = map;
    f->sectors = sectors;
    return 0;
}

void shadow_file_learn(struct shadow_file *f, uint64_t sector, uint64_t count)
{
    uint64_t end = count < f->sectors ? min_u64(sector + count, f->sectors) : f->sectors;

    while (sector < end) {
        if (sector % 64 == 0 && end - sector >= 64) {
            uint64_t words = (end - sector) / 64;
            memset(&f->known[sector / 64], 0xff, words * sizeof(uint64_t));
            sector += words * 64;
        } else {
            f->known[sector / 64] |= 1ull << sector % 64;
            sector++;
        }
    }
}

int shadow_file_put(struct shadow_file *f, const uint8_t *data, uint64_t offset, uint64_t length)
{
    while (length) {
        ssize_t n = pwrite(f->fd, data, length, (off_t)offset);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return n ? -errno : -EIO;
        data += n;
        offset += (uint64_t)n;
        length -= (uint64_t)n;
    }
    return 0;
}

int shadow_file_punch(struct shadow_file *f, uint64_t offset, uint64_t length)
{
    int mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;

    return length && fallocate(f->fd, mode, (off_t)offset, (off_t)length) ? -errno : 0;
}

int shadow_file_get(const struct shadow_file *f, uint8_t *buf, uint64_t offset, uint64_t length)
{
    uint64_t got;
    int err = disk_pread(f->fd, buf, length, offset, &got);

    if (!err)
        memset(buf + got, 0, length - got);
    return err;
}
