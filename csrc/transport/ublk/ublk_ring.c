/*
 * Carrying one command to the driver and its answer back.
 *
 * State. A handle is one descriptor of /dev/ublk-control and a list of idle rings. A call takes a ring from the list
 * (or makes one), sends one command on it, waits for its one completion, and puts it back. So calls of many
 * threads never wait for each other: a START_DEV which waits for a slow server does not hold up the others. The
 * lock guards the two lists and nothing else; it is never held across a system call that waits.
 *
 * Memory. The kernel reads and writes a command's payload until the completion arrives, in a worker thread of its
 * own. The payload therefore lives in the ring's struct, not on the caller's stack: when the time is up and the
 * command cannot be cancelled either (the driver sleeps uninterruptibly, for instance in a partition scan that
 * nobody serves), the whole ring is set aside on the `stuck` list, and the caller gets its answer. A stuck
 * ring is never freed before its completion was seen; one that is still stuck at close is leaked on purpose.
 *
 * Time. Waiting uses the ring's own timeout. When that is over the command is cancelled: the kernel interrupts the
 * worker, START_DEV and its like return EINTR, and that completion is waited for a little longer. A command
 * that turns out to have succeeded in that moment counts as a success.
 */
#include "transport/ublk/ublk_ring.h"

#include "base/util.h"

#include <assert.h>
#include <fcntl.h>
#include <liburing.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define CTRL_PATH "/dev/ublk-control"

enum { TAG_COMMAND = 1, TAG_CANCEL = 2 };

struct ublk_ring {
    struct io_uring uring;
    struct ublk_ring *next;
    union {
        struct ublk_dev_info info;
        struct ublk_params params;
        uint64_t features;
    } payload;
};

static int ring_new(struct ublk_ring **out)
{
    struct ublk_ring *ring = calloc(1, sizeof(*ring));
    int err;

    if (!ring)
        return -ENOMEM;
    /* A command and its cancellation are all that is ever in it. */
    err = io_uring_queue_init(4, &ring->uring, IORING_SETUP_SQE128);
    if (err < 0) {
        free(ring);
        return err;
    }
    *out = ring;
    return 0;
}

static void ring_free(struct ublk_ring *ring)
{
    io_uring_queue_exit(&ring->uring);
    free(ring);
}

static int ring_get(struct ublk_rings *rings, struct ublk_ring **out)
{
    struct ublk_ring *ring;

    pthread_mutex_lock(&rings->lock);
    ring = rings->idle;
    if (ring)
        rings->idle = ring->next;
    pthread_mutex_unlock(&rings->lock);
    if (!ring)
        return ring_new(out);
    *out = ring;
    return 0;
}

static void ring_put(struct ublk_rings *rings, struct ublk_ring *ring, bool stuck)
{
    struct ublk_ring **list = stuck ? &rings->stuck : &rings->idle;

    pthread_mutex_lock(&rings->lock);
    ring->next = *list;
    *list = ring;
    pthread_mutex_unlock(&rings->lock);
}

static int ring_submit(struct ublk_ring *ring)
{
    int n;

    do
        n = io_uring_submit(&ring->uring);
    while (n == -EINTR || n == -EAGAIN);
    return n < 0 ? n : 0;
}

/* A cleared SQE of 128 bytes (liburing clears neither payload nor second half); NULL if the ring is full. */
static struct io_uring_sqe *ring_sqe(struct ublk_ring *ring)
{
    struct io_uring_sqe *sqe = io_uring_get_sqe(&ring->uring);

    return sqe ? memset(sqe, 0, 2 * sizeof(*sqe)) : NULL;
}

static int ring_push_command(struct ublk_ring *ring, int fd, const struct ublk_command *c)
{
    struct io_uring_sqe *sqe = ring_sqe(ring);
    struct ublk_ctrl_cmd *cmd;

    if (!sqe)
        return -EBUSY;
    assert(c->len <= sizeof(ring->payload));
    sqe->opcode = IORING_OP_URING_CMD;
    sqe->fd = fd;
    /* As 64 bits: the padding beside cmd_op must be zero. */
    sqe->off = c->op;
    sqe->user_data = TAG_COMMAND;
    cmd = (struct ublk_ctrl_cmd *)sqe->cmd;
    cmd->dev_id = c->dev_id;
    cmd->queue_id = 0xffff;
    cmd->data = c->data;
    if (c->len) {
        memcpy(&ring->payload, c->buf, c->len);
        cmd->addr = (uint64_t)(uintptr_t)&ring->payload;
        cmd->len = (uint16_t)c->len;
    }
    return ring_submit(ring);
}

static int ring_push_cancel(struct ublk_ring *ring)
{
    struct io_uring_sqe *sqe = ring_sqe(ring);

    if (!sqe)
        return -EBUSY;
    sqe->opcode = IORING_OP_ASYNC_CANCEL;
    sqe->fd = -1;
    sqe->addr = TAG_COMMAND;
    sqe->user_data = TAG_CANCEL;
    return ring_submit(ring);
}

/*
 * Waits for the completions whose tags are in `tags`, a bit each; all that come are noted in *seen and, for the
 * command, its result in *res. False: the time was up.
 */
static bool ring_wait(struct ublk_ring *ring, unsigned tags, int64_t deadline, unsigned *seen, int *res)
{
    while ((*seen & tags) != tags) {
        struct io_uring_cqe *cqe = NULL;
        int64_t left = deadline - now_ms();
        struct __kernel_timespec ts;
        int err;

        if (left < 0)
            left = 0;
        ts.tv_sec = left / 1000;
        ts.tv_nsec = left % 1000 * 1000000;
        err = io_uring_wait_cqe_timeout(&ring->uring, &cqe, &ts);
        if (err == -EINTR || err == -EAGAIN)
            continue;
        if (err < 0 || !cqe)
            return false;
        *seen |= 1u << cqe->user_data;
        if (cqe->user_data == TAG_COMMAND)
            *res = cqe->res;
        io_uring_cqe_seen(&ring->uring, cqe);
    }
    return true;
}

/* Frees the stuck rings whose completion has come by now. */
static void reap_stuck(struct ublk_rings *rings)
{
    struct ublk_ring **at, *done = NULL;

    pthread_mutex_lock(&rings->lock);
    for (at = &rings->stuck; *at;) {
        struct ublk_ring *ring = *at;
        struct io_uring_cqe *cqe;
        bool finished = false;

        while (io_uring_peek_cqe(&ring->uring, &cqe) == 0) {
            finished |= cqe->user_data == TAG_COMMAND;
            io_uring_cqe_seen(&ring->uring, cqe);
        }
        if (finished) {
            *at = ring->next;
            ring->next = done;
            done = ring;
        } else {
            at = &ring->next;
        }
    }
    pthread_mutex_unlock(&rings->lock);
    while (done) {
        struct ublk_ring *next = done->next;

        ring_free(done);
        done = next;
    }
}

int ublk_rings_run(struct ublk_rings *rings, const struct ublk_command *c, int64_t deadline, bool *cancelled)
{
    const unsigned command_bit = 1u << TAG_COMMAND, cancel_bit = 1u << TAG_CANCEL;
    struct ublk_ring *ring;
    unsigned seen = 0;
    int res = 0, err;

    *cancelled = false;
    reap_stuck(rings);
    err = ring_get(rings, &ring);
    if (err < 0)
        return err;
    err = ring_push_command(ring, rings->fd, c);
    if (err < 0) {
        /* What is queued but not submitted would go out with the next command. */
        ring_free(ring);
        return err;
    }
    if (!ring_wait(ring, command_bit, deadline, &seen, &res)) {
        unsigned wanted = command_bit;

        *cancelled = true;
        if (ring_push_cancel(ring) == 0)
            wanted |= cancel_bit;
        if (!ring_wait(ring, wanted, now_ms() + UBLK_CANCEL_GRACE_MS, &seen, &res) && !(seen & command_bit)) {
            ring_put(rings, ring, true);
            return -ETIMEDOUT;
        }
    }
    if (res >= 0 && c->out)
        memcpy(c->buf, &ring->payload, c->len);
    if (*cancelled)
        ring_free(ring); /* the cancellation's own completion may still be under way */
    else
        ring_put(rings, ring, false);
    return res;
}

int ublk_rings_open(struct ublk_rings *rings)
{
    struct ublk_ring *ring;
    int err;

    rings->idle = rings->stuck = NULL;
    rings->fd = open(CTRL_PATH, O_RDWR | O_CLOEXEC);
    if (rings->fd < 0)
        return -errno;
    /* The first ring now: that io_uring is not allowed should show here, not in the first command. */
    err = ring_new(&ring);
    if (err < 0) {
        close(rings->fd);
        return err;
    }
    pthread_mutex_init(&rings->lock, NULL);
    ring_put(rings, ring, false);
    return 0;
}

void ublk_rings_close(struct ublk_rings *rings)
{
    reap_stuck(rings);
    while (rings->idle) {
        struct ublk_ring *next = rings->idle->next;

        ring_free(rings->idle);
        rings->idle = next;
    }
    /* Rings that are stuck even now stay: the kernel may yet write to their payload. */
    pthread_mutex_destroy(&rings->lock);
    close(rings->fd);
}
