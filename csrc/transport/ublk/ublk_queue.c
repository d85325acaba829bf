#include "transport/ublk/ublk_queue.h"

#include "volume/fault.h"
#include "volume/volume.h"

#include <linux/capability.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

static void on_command(struct ring_op *op, int res, uint32_t flags);

static void submit_command(struct ublk_tag *t, uint32_t op, int32_t result)
{
    struct ublk_device *d = t->device;
    struct io_uring_sqe *sqe = worker_sqe(d->worker, &t->op);
    struct ublk_io_cmd *cmd = (struct ublk_io_cmd *)sqe->cmd;

    sqe->opcode = IORING_OP_URING_CMD;
    sqe->fd = d->cdev;
    sqe->off = op; /* cmd_op, and the padding beside it */
    sqe->user_data = (uint64_t)(uintptr_t)&t->op;
    *cmd = (struct ublk_io_cmd){.tag = t->tag, .result = result};
}

/* Without CAP_SYS_ADMIN at the first fetches the driver takes the server for an unprivileged user's, and does not look
 * for partitions. So a table that a guest wrote makes no devices on the host; partx(8) makes them when asked to. */
struct privilege {
    struct __user_cap_header_struct header;
    struct __user_cap_data_struct had[_LINUX_CAPABILITY_U32S_3];
};

static void drop(struct privilege *p)
{
    p->header = (struct __user_cap_header_struct){.version = _LINUX_CAPABILITY_VERSION_3};
    if (syscall(SYS_capget, &p->header, p->had)) {
        p->header.version = 0;
        return;
    }
    struct __user_cap_data_struct less[_LINUX_CAPABILITY_U32S_3];
    memcpy(less, p->had, sizeof(less));
    less[CAP_TO_INDEX(CAP_SYS_ADMIN)].effective &= ~CAP_TO_MASK(CAP_SYS_ADMIN);
    syscall(SYS_capset, &p->header, less);
}

static void restore(struct privilege *p)
{
    if (p->header.version)
        syscall(SYS_capset, &p->header, p->had);
}

void ublk_queue_start(struct ublk_device *d)
{
    struct privilege p;

    drop(&p);
    for (uint32_t i = 0; i < d->info.queue_depth; i++) {
        d->tags[i].op.complete = on_command;
        submit_command(&d->tags[i], UBLK_IO_FETCH_REQ, 0);
    }
    worker_submit(d->worker);
    restore(&p);
}

static struct ublk_device *device_of(const struct transport *t)
{
    return container_of(t, struct ublk_device, transport);
}

void ublk_queue_let_go(struct transport *t)
{
    struct ublk_device *d = device_of(t);

    d->releasing = d->dropping = true;
}

bool ublk_queue_idle(const struct transport *t) { return !device_of(t)->busy; }

void ublk_queue_check(struct ublk_device *d)
{
    worker_stop_check(d->worker);
    if (!d->waiting || (d->releasing ? d->busy > 0 : d->gone < d->info.queue_depth))
        return;
    struct call *call = d->waiting;
    d->waiting = NULL;
    call_done(call, 0);
}

/* ---- one request ---------------------------------------------------------------------------- */

/* Move the data of a request between the kernel and t->buf. */
static int user_copy(struct ublk_tag *t, bool from_kernel, uint64_t length)
{
    for (uint64_t done = 0; done < length;) {
        off_t at = (off_t)UBLK_USER_COPY_POS(0, t->tag, done);
        ssize_t n = from_kernel ? pread(t->device->cdev, t->buf + done, length - done, at)
                                : pwrite(t->device->cdev, t->buf + done, length - done, at);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return EIO;
        done += (uint64_t)n;
    }
    return 0;
}

/* The block layer knows these; everything else is EIO to it. */
static int32_t block_result(int err, uint64_t length)
{
    switch (err) {
    case 0:
        return (int32_t)length;
    case ENOSPC:
    case EINVAL:
        return -err;
    default:
        return -EIO;
    }
}

static void commit(struct ublk_tag *t, int err, uint64_t length)
{
    struct ublk_device *d = t->device;

    free(t->buf);
    t->buf = NULL;
    d->busy--;
    if (!(err && d->dropping))
        submit_command(t, UBLK_IO_COMMIT_AND_FETCH_REQ, block_result(err, length));
    ublk_queue_check(d);
}

static void on_done(struct io_req *io, int err)
{
    struct ublk_tag *t = container_of(io, struct ublk_tag, io);
    bool data = io->op == GLIDE_READ || io->op == GLIDE_WRITE;

    if (!err && io->op == GLIDE_READ)
        err = user_copy(t, false, io->length);
    commit(t, err, data ? io->length : 0);
}

static int operation(const struct ublk_io_desc *desc)
{
    switch (UBLK_IO_OP(desc)) {
    case UBLK_IO_OP_READ:
        return GLIDE_READ;
    case UBLK_IO_OP_WRITE:
        return GLIDE_WRITE;
    case UBLK_IO_OP_FLUSH:
        return GLIDE_FLUSH;
    case UBLK_IO_OP_DISCARD:
    case UBLK_IO_OP_WRITE_ZEROES:
        return GLIDE_ZERO;
    default:
        return -EOPNOTSUPP;
    }
}

static void start(struct ublk_tag *t)
{
    struct ublk_device *d = t->device;
    const struct ublk_io_desc *desc = &d->descriptors[t->tag];
    int op = operation(desc);
    bool data = op == GLIDE_READ || op == GLIDE_WRITE;
    uint64_t length = op == GLIDE_FLUSH ? 0 : (uint64_t)desc->nr_sectors * 512;

    d->busy++;
    if (op < 0 || d->refusing || (data && length > d->info.max_io_buf_bytes)) {
        commit(t, EIO, 0);
        return;
    }
    if (data && !(t->buf = malloc(length))) {
        commit(t, ENOMEM, 0);
        return;
    }
    if (op == GLIDE_WRITE && user_copy(t, true, length)) {
        commit(t, EIO, 0);
        return;
    }
    t->io = (struct io_req){.volume = d->volume,
                            .buf = t->buf,
                            .offset = op == GLIDE_FLUSH ? 0 : desc->start_sector * 512,
                            .length = length,
                            .tag = d,
                            .op = (uint8_t)op,
                            .flags = desc->op_flags & UBLK_IO_F_FUA ? GLIDE_FUA : 0,
                            .done = on_done};
    io_submit(&t->io);
}

static void on_command(struct ring_op *op, int res, uint32_t flags)
{
    struct ublk_tag *t = container_of(op, struct ublk_tag, op);
    struct ublk_device *d = t->device;

    (void)flags;
    if (res == UBLK_IO_RES_OK) {
        t->held = d->volume->frozen;
        if (!t->held && !d->releasing)
            start(t);
        return;
    }
    /* -ENODEV: the slot was retired. Any other answer to FETCH or COMMIT means that we cannot serve it either. */
    d->gone++;
    if (d->gone == d->info.queue_depth)
        event_post(d->volume->engine, d->volume->cookie, GLIDE_EV_UBLK_DOWN, d->info.dev_id,
                   res == -ENODEV ? 0 : (uint64_t)-res);
    ublk_queue_check(d);
}

void ublk_queue_unfreeze(struct transport *t)
{
    struct ublk_device *d = device_of(t);

    for (uint32_t i = 0; i < d->info.queue_depth; i++) {
        struct ublk_tag *tag = &d->tags[i];
        if (tag->held && !d->releasing)
            start(tag);
        tag->held = false;
    }
}
