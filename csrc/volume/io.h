/*
 * Requests: what transports hand to a volume, and how they are carried out.
 * Everything here runs on the volume's worker.
 */
#ifndef GLIDE_IO_H
#define GLIDE_IO_H

#include "glide_core_internal.h"
#include "base/util.h"
#include "loop/worker.h"

struct volume;
struct rmw;
struct changed;

#define IO_SHARED 0x10 /* READ: others may change buf, or take it away, meanwhile: it is no evidence against a disk */
#define IO_HERE 0x20   /* READ: ENODATA, not a fault, for what is neither in the log nor in the cache */
#define IO_LOCAL 0x40  /* FLUSH: the local disk is enough, whatever the volume's flush option */
/* Made by the core itself, or neither READ, WRITE, FLUSH nor ZERO: not counted as a guest's request. */
#define IO_INTERNAL 0x80

/* An op beside those of enum glide_op: buf is a struct io_extents, to be filled. */
#define IO_STATUS GLIDE_OPS
/* Of such a request, at most, what is answered: there is a look for each 64 blocks, in one step of the worker. */
#define IO_STATUS_BYTES ((uint64_t)1 << 40)

/* What an IO_STATUS asks of the parts of a range, from its beginning on; neighbours differ. It may end before the range
 * does. */
struct io_extents {
    uint32_t max, count; /* of list; max is the submitter's */
    struct io_extent {
        uint64_t length; /* bytes */
        uint64_t is;     /* 1: zeros, or changed since the snapshot. 0: not, or not known to be zeros */
    } list[];
};

struct io_req {
    struct list link;
    struct volume *volume;
    uint8_t *buf;            /* WRITE: data; READ: where to put it; valid until done(), but see own() */
    uint64_t offset, length; /* bytes, multiples of 512, within the volume */
    const void *tag;         /* chosen by the submitter, for io_cancel */
    uint8_t op;              /* enum glide_op, or IO_STATUS */
    uint8_t flags;           /* GLIDE_FUA and the flags above */
    void (*done)(struct io_req *req, int err); /* 0 or a positive errno; may free the request */
    /*
     * A WRITE that must wait calls this once: move the data to memory that lives until done() and update
     * buf. 0 or -errno (the request then fails). NULL: buf lives long enough as it is.
     */
    int (*own)(struct io_req *req);

    /*
     * READ, if not NULL: a bit for each sector that the range touches, clear at first. Where it is set at the end,
     * the request's part of the sector is zeros, and buf was not written.
     */
    uint64_t *holes;
    struct changed *changed; /* IO_STATUS: what may have changed is asked, of this; NULL: what is zeros */

    /* ---- private to io.c, io_read.c and sync.c ---- */
    uint64_t start_ns;
    uint64_t progress; /* bytes of a WRITE or ZERO that are in the log */
    uint64_t need_seq; /* flush = "store": the segment whose commit it waits for */
    uint32_t pending;  /* parts of a READ under way */
    int err;
    bool owned;
    struct rmw *rmw; /* an unaligned WRITE that was started: io_unaligned.c */
    void *filtered;  /* the filter's, of a READ (filter.h) */
};

static inline bool io_unaligned(const struct io_req *req) { return (req->offset | req->length) % 4096 != 0; }

/*
 * Take a request over. READs may be done before this returns; WRITEs and ZEROs are collected and appended
 * together by io_flush. Bounds and read-only are checked here: EINVAL (READ beyond the end, misaligned),
 * ENOSPC (WRITE beyond the end), EPERM, EIO and so on go to done().
 */
void io_submit(struct io_req *req);

/* Append what was collected, start the sync that was asked for. Called at the end of a batch by whoever
 * submitted it, else at the end of the worker's round. On return no WRITE refers to its first buf. */
void io_flush(struct volume *v);

/* Fail, with a positive errno, the requests with this tag that wait for space, for the store or for a commit. */
void io_cancel(struct volume *v, const void *tag, int err);

/* All of a WRITE or ZERO is in the log: it waits for a sync or a commit only. */
bool io_logged(const struct io_req *req);

/* ---- between the parts of the request code ---- */

void io_finish(struct io_req *req, int err);
/* Make buf outlive the submitter's call. False: the request was finished with an error. */
bool io_own(struct io_req *req);

/* io_read.c: start a READ (pieces by block). */
void io_read(struct io_req *req);
/* A piece of a READ is done. */
void io_piece_done(struct io_req *req, int err);
/* Look a block up (again) for a request. */
void io_read_piece(struct io_req *req, uint64_t block);

/* io_status.c: carry out an IO_STATUS, from its beginning. */
void io_status(struct io_req *req);
/* One more extent of `length` bytes; false: there is no room for it. */
bool io_add_extent(struct io_extents *out, uint64_t length, bool is);

/* io_unaligned.c. Carry out an unaligned ZERO as up to three aligned requests. -ENOMEM: not started. */
int io_zero_split(struct io_req *req);
/* An unaligned WRITE at the head of the batch. True: its merged sectors may be appended now, in one step with this
 * call. False: it was taken out of the batch to read. */
bool io_merge(struct io_req *req);
/* The merged sectors of such a WRITE. */
const uint8_t *io_merged(const struct io_req *req);
void io_merge_free(struct io_req *req);

/* sync.c: done() when everything acknowledged so far is durable as the volume's flush option says. */
void sync_join(struct io_req *req);
/* Start a sync if somebody waits for one and none runs. */
void sync_kick(struct volume *v);
/* Segments up to committed_seq are in the store now. */
void sync_committed(struct volume *v);
void sync_fail_waiters(struct volume *v, int err);
void sync_cancel(struct volume *v, const void *tag, int err);

/* Fail everything that waits, with a positive errno. */
void io_fail_parked(struct volume *v, int err);

#endif
