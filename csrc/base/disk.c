#include "base/disk.h"

#include "glide_core_internal.h"
#include "base/util.h"

#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* ---- test hooks --------------------------------------------------------------------- */

static pthread_mutex_t hook_lock = PTHREAD_MUTEX_INITIALIZER;
static _Atomic(FILE *) trace_file;
static atomic_int injecting; /* fast check: any injection armed */
static struct {
    int err;
    uint32_t skip, count;
} injection[DISK_KINDS];

int glide_disk_trace(const char *path)
{
    FILE *f = NULL;

    if (path && !(f = fopen(path, "wb")))
        return fail(-errno, "cannot write the trace %s", path);
    pthread_mutex_lock(&hook_lock);
    FILE *old = atomic_exchange(&trace_file, f);
    if (old)
        fclose(old);
    pthread_mutex_unlock(&hook_lock);
    return 0;
}

int glide_disk_inject(int kind, int err, uint32_t skip, uint32_t count)
{
    if (kind < 0 || kind >= DISK_KINDS)
        return -EINVAL;
    pthread_mutex_lock(&hook_lock);
    injection[kind].err = err;
    injection[kind].skip = skip;
    injection[kind].count = count;
    bool any = false;
    for (int i = 0; i < DISK_KINDS; i++)
        any |= injection[i].count > 0;
    atomic_store(&injecting, any);
    pthread_mutex_unlock(&hook_lock);
    return 0;
}

int disk_injected(enum disk_kind kind)
{
    int err = 0;

    if (!atomic_load_explicit(&injecting, memory_order_relaxed))
        return 0;
    pthread_mutex_lock(&hook_lock);
    if (injection[kind].count) {
        if (injection[kind].skip) {
            injection[kind].skip--;
        } else {
            injection[kind].count--;
            err = -injection[kind].err;
        }
    }
    pthread_mutex_unlock(&hook_lock);
    return err;
}

static void trace(enum disk_kind kind, const char *path, uint64_t offset, const struct iovec *iov, int count)
{
    if (!atomic_load_explicit(&trace_file, memory_order_relaxed))
        return;
    pthread_mutex_lock(&hook_lock);
    FILE *f = atomic_load(&trace_file);
    if (f) {
        uint64_t length = 0;
        for (int i = 0; i < count; i++)
            length += iov[i].iov_len;
        struct {
            uint8_t kind, pad;
            uint16_t name;
            uint32_t pad2;
            uint64_t offset, length;
        } head = {(uint8_t)kind, 0, (uint16_t)strlen(path), 0, offset, length};
        fwrite(&head, sizeof(head), 1, f);
        fwrite(path, head.name, 1, f);
        for (int i = 0; i < count; i++)
            fwrite(iov[i].iov_base, iov[i].iov_len, 1, f);
        fflush(f);
    }
    pthread_mutex_unlock(&hook_lock);
}

/* What a write that fails may leave: some of its bytes. */
static void write_some(struct disk_file *f, const struct iovec *iov, uint64_t offset)
{
    struct iovec half = {iov->iov_base, iov->iov_len / 2};

    if (pwritev(f->fd, &half, 1, (off_t)offset) == (ssize_t)half.iov_len)
        trace(DISK_WRITE, f->path, offset, &half, 1);
}

bool disk_full(int err) { return err == -ENOSPC || err == -EDQUOT || err == -EFBIG; }

/* ---- operations ------------------------------------------------------------------------ */

int disk_open_fd(const char *path, int flags)
{
    int fd = open(path, flags | O_CLOEXEC | O_NONBLOCK, 0600);
    struct stat st;

    if (fd < 0)
        return -errno;
    int err = fstat(fd, &st) ? -errno : S_ISREG(st.st_mode) || S_ISDIR(st.st_mode) ? 0 : -EUCLEAN;
    /* Only the opening is not to wait. */
    if (!err && fcntl(fd, F_SETFL, 0))
        err = -errno;
    if (err)
        close(fd);
    return err ? err : fd;
}

int disk_open(struct disk_file *f, const char *path, int flags)
{
    f->path = strdup(path);
    if (!f->path)
        return -ENOMEM;
    f->fd = disk_open_fd(path, flags);
    if (f->fd >= 0)
        return 0;
    int err = f->fd;
    free(f->path);
    *f = (struct disk_file){.fd = -1};
    return err;
}

int disk_create(struct disk_file *f, const char *path)
{
    int err = disk_injected(DISK_CREATE);

    f->fd = -1;
    f->path = NULL;
    if (!err)
        err = disk_open(f, path, O_CREAT | O_EXCL | O_RDWR);
    if (!err)
        trace(DISK_CREATE, path, 0, NULL, 0);
    return err;
}

int disk_open_or_create(struct disk_file *f, const char *path, bool *made)
{
    int err = disk_open(f, path, O_CREAT | O_EXCL | O_RDWR);

    *made = !err;
    if (*made)
        trace(DISK_CREATE, path, 0, NULL, 0);
    return err == -EEXIST ? disk_open(f, path, O_RDWR) : err;
}

void disk_close(struct disk_file *f)
{
    if (f->fd >= 0)
        close(f->fd);
    free(f->path);
    f->fd = -1;
    f->path = NULL;
}

int disk_pwritev(struct disk_file *f, struct iovec *iov, int count, uint64_t offset)
{
    int err = disk_injected(DISK_WRITE);

    if (err) {
        write_some(f, iov, offset);
        return err;
    }
    trace(DISK_WRITE, f->path, offset, iov, count);
    while (count) {
        ssize_t n = pwritev(f->fd, iov, count, (off_t)offset);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return n ? -errno : -EIO;
        offset += (uint64_t)n;
        while (count && (size_t)n >= iov->iov_len) {
            n -= (ssize_t)iov->iov_len;
            iov++;
            count--;
        }
        if (count) {
            iov->iov_base = (char *)iov->iov_base + n;
            iov->iov_len -= (size_t)n;
        }
    }
    return 0;
}

int disk_pread(int fd, void *buf, uint64_t length, uint64_t offset, uint64_t *got)
{
    for (*got = 0; *got < length;) {
        ssize_t n = pread(fd, (char *)buf + *got, length - *got, (off_t)(offset + *got));
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return n ? -errno : 0;
        *got += (uint64_t)n;
    }
    return 0;
}

int disk_read(const struct disk_file *f, void *buf, uint64_t length, uint64_t offset, uint64_t *got)
{
    int err = 0;

    *got = 0;
    for (uint32_t tries = 0; tries < DISK_TRIES; tries++) {
        uint64_t more = 0;
        err = disk_injected(DISK_READ);
        if (!err)
            err = disk_pread(f->fd, (char *)buf + *got, length - *got, offset + *got, &more);
        *got += more;
        if (err != -EIO)
            break;
    }
    return err;
}

int disk_allocate(struct disk_file *f, uint64_t length)
{
    int err = disk_injected(DISK_ALLOCATE);

    return err ? err : fallocate(f->fd, 0, 0, (off_t)length) ? -errno : 0;
}

int disk_unlink(const char *path)
{
    if (unlink(path) && errno != ENOENT)
        return -errno;
    trace(DISK_UNLINK, path, 0, NULL, 0);
    return 0;
}

int disk_rename(struct disk_file *f, const char *path)
{
    char *copy = strdup(path);
    struct iovec iov = {copy, copy ? strlen(copy) : 0};

    if (!copy)
        return -ENOMEM;
    if (rename(f->path, path)) {
        int err = -errno;
        free(copy);
        return err;
    }
    trace(DISK_RENAME, f->path, 0, &iov, 1);
    free(f->path);
    f->path = copy;
    return 0;
}

void disk_sync_begin(struct disk_file *f, enum disk_kind kind) { trace(kind, f->path, 0, NULL, 0); }

int disk_sync_end(struct disk_file *f, enum disk_kind kind, int result)
{
    int err = disk_injected(kind);

    if (!err)
        err = result;
    if (!err)
        trace(kind + 1, f->path, 0, NULL, 0);
    else
        trace(kind == DISK_DIR_BEGIN ? DISK_DIR_FAILED : DISK_SYNC_FAILED, f->path, 0, NULL, 0);
    return err;
}

int disk_sync(struct disk_file *f, enum disk_kind kind)
{
    disk_sync_begin(f, kind);
    int result = kind == DISK_DIR_BEGIN ? fsync(f->fd) : fdatasync(f->fd);
    return disk_sync_end(f, kind, result ? -errno : 0);
}
