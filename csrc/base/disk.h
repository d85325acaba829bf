/*
 * Every change to write-log files passes here, so that tests can record what
 * reached the disk in which order (power cuts), and make it fail. Both switches
 * are process-wide and off in production, where each costs one relaxed load.
 *
 * Trace record, little-endian: u8 kind, u8 0, u16 name length, u32 0, u64 offset,
 * u64 data length, name, data. Names are full paths.
 */
#ifndef GLIDE_DISK_H
#define GLIDE_DISK_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>

enum disk_kind {
    DISK_CREATE = 1, /* a file was created */
    DISK_WRITE,      /* data at offset */
    DISK_SYNC_BEGIN, /* fdatasync of a file was started... */
    DISK_SYNC_END,   /* ...and succeeded: what was written before BEGIN is durable */
    DISK_DIR_BEGIN,  /* the same for the entries of a directory */
    DISK_DIR_END,
    DISK_UNLINK,
    DISK_RENAME,      /* data = the new path */
    DISK_SYNC_FAILED, /* a sync of a file that was begun failed: what it covered may be lost for good */
    DISK_DIR_FAILED,  /* the same for a directory */
    DISK_READ,        /* a read of the log; this one and those that follow are only made to fail, not traced */
    DISK_CACHE_READ,  /* a guest's read of the block cache */
    DISK_CACHE_WRITE, /* a block is put into the block cache */
    DISK_CACHE_SYNC,  /* the block cache is synced */
    DISK_ALLOCATE,    /* a file of the log gets its blocks before it is written */
    DISK_KINDS
};

/* How often the log is read before an error of the disk counts. */
#define DISK_TRIES 8

/* A file or directory of a write log. */
struct disk_file {
    int fd;
    char *path;
};

/* O_CREAT | O_EXCL. 0 or -errno; on success close with disk_close. */
int disk_create(struct disk_file *f, const char *path);
/* For reading and writing; *made = it was not there. Tests inject no errors here. */
int disk_open_or_create(struct disk_file *f, const char *path, bool *made);
/* -EUCLEAN for what is neither file nor directory: a FIFO under a name of ours is damage, and not waited for. */
int disk_open(struct disk_file *f, const char *path, int flags);
int disk_open_fd(const char *path, int flags);
void disk_close(struct disk_file *f);
/* Write all of iov (which it may change) at offset. 0 or -errno: how much was written is then unknown. */
int disk_pwritev(struct disk_file *f, struct iovec *iov, int count, uint64_t offset);
/* Read up to `length` bytes at offset of any file. *got is fewer at the end of the file or after an error. 0 or
 * -errno. */
int disk_pread(int fd, void *buf, uint64_t length, uint64_t offset, uint64_t *got);
/* The same for a file of a log, which tests can make fail. An error of the disk is tried again, up to DISK_TRIES times
 * in all: one that passes must not cost data that is nowhere else. */
int disk_read(const struct disk_file *f, void *buf, uint64_t length, uint64_t offset, uint64_t *got);
/* Blocks for the first `length` bytes, which read as zeros. 0 or -errno. */
int disk_allocate(struct disk_file *f, uint64_t length);
int disk_unlink(const char *path);
/* Rename an open file; on success f->path is the new path. */
int disk_rename(struct disk_file *f, const char *path);

/* Whether an error says that there is no room, rather than that the disk fails. */
bool disk_full(int err);
/* For operations that do not go through this file: 0, or the error that a test injects. */
int disk_injected(enum disk_kind kind);

/* A sync that the caller issues itself: call begin, sync, then end with the result, which it returns
 * (or an injected error). kind = DISK_SYNC_BEGIN or DISK_DIR_BEGIN. */
void disk_sync_begin(struct disk_file *f, enum disk_kind kind);
int disk_sync_end(struct disk_file *f, enum disk_kind kind, int result);
/* begin, fsync, end in one blocking call. */
int disk_sync(struct disk_file *f, enum disk_kind kind);

#endif
