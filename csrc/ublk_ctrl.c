/*
 * Control commands of ublk.
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
#include "ublk_ctrl.h"

#include <errno.h>
#include <fcntl.h>
#include <liburing.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define CTRL_PATH "/dev/ublk-control"
/* How long a cancelled command may take to come back. */
#define CANCEL_GRACE_MS 2000
#define RECOVERY_STEP_MS 1
#define CANCEL_WORK_MS 10
#define OPEN_STEP_MS 10
#define OPEN_TIMEOUT_MS 3000

enum { TAG_COMMAND = 1, TAG_CANCEL = 2 };

struct ctrl_ring {
    struct io_uring uring;
    struct ctrl_ring *next;
    union {
        struct ublk_dev_info info;
        struct ublk_params params;
        uint64_t features;
    } payload;
};

struct ublk_ctrl {
    int fd;
    pthread_mutex_t lock;
    struct ctrl_ring *idle;
    struct ctrl_ring *stuck;
};

/* One command, apart from the ring that carries it. */
struct command {
    uint32_t op;
    uint32_t dev_id;
    uint64_t data;
    void *buf; /* payload, copied in and, if it is `out`, back */
    size_t len;
    bool out;
    unsigned timeout_ms;
};

static int64_t now_ms(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (int64_t)ts.tv_sec * 1000 + ts.tv_nsec / 1000000;
}

static void sleep_ms(long ms)
{
    struct timespec ts = {.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000};

    nanosleep(&ts, NULL);
}

static int64_t deadline_of(unsigned timeout_ms) { return now_ms() + (timeout_ms ? timeout_ms : UBLK_CTRL_TIMEOUT_MS); }

/* ---- rings ---- */

static int ring_new(struct ctrl_ring **out)
{
    struct ctrl_ring *ring = calloc(1, sizeof(*ring));
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

static void ring_free(struct ctrl_ring *ring)
{
    io_uring_queue_exit(&ring->uring);
    free(ring);
}

static int ring_get(struct ublk_ctrl *ctrl, struct ctrl_ring **out)
{
    struct ctrl_ring *ring;

    pthread_mutex_lock(&ctrl->lock);
    ring = ctrl->idle;
    if (ring)
        ctrl->idle = ring->next;
    pthread_mutex_unlock(&ctrl->lock);
    if (!ring)
        return ring_new(out);
    *out = ring;
    return 0;
}

static void ring_put(struct ublk_ctrl *ctrl, struct ctrl_ring *ring, bool stuck)
{
    struct ctrl_ring **list = stuck ? &ctrl->stuck : &ctrl->idle;

    pthread_mutex_lock(&ctrl->lock);
    ring->next = *list;
    *list = ring;
    pthread_mutex_unlock(&ctrl->lock);
}

static int ring_submit(struct ctrl_ring *ring)
{
    int n;

    do
        n = io_uring_submit(&ring->uring);
    while (n == -EINTR || n == -EAGAIN);
    return n < 0 ? n : 0;
}

/* A cleared SQE of 128 bytes (liburing clears neither payload nor second half); NULL if the ring is full. */
static struct io_uring_sqe *ring_sqe(struct ctrl_ring *ring)
{
    struct io_uring_sqe *sqe = io_uring_get_sqe(&ring->uring);

    return sqe ? memset(sqe, 0, 2 * sizeof(*sqe)) : NULL;
}

static int ring_push_command(struct ctrl_ring *ring, int fd, const struct command *c)
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

static int ring_push_cancel(struct ctrl_ring *ring)
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
 * Waits for the completion tagged `tag`; those of other tags are noted in *seen (a bit per tag) and, for the command,
 * its result in *res. False: the time was up.
 */
static bool ring_wait(struct ctrl_ring *ring, unsigned tags, int64_t deadline, unsigned *seen, int *res)
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
static void reap_stuck(struct ublk_ctrl *ctrl)
{
    struct ctrl_ring **at, *done = NULL;

    pthread_mutex_lock(&ctrl->lock);
    for (at = &ctrl->stuck; *at;) {
        struct ctrl_ring *ring = *at;
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
    pthread_mutex_unlock(&ctrl->lock);
    while (done) {
        struct ctrl_ring *next = done->next;

        ring_free(done);
        done = next;
    }
}

/* ---- commands ---- */

/* Sends the command once. *cancelled tells an EINTR of our own making from one of a signal. */
static int command_once(struct ublk_ctrl *ctrl, const struct command *c, int64_t deadline, bool *cancelled)
{
    const unsigned command_bit = 1u << TAG_COMMAND, cancel_bit = 1u << TAG_CANCEL;
    struct ctrl_ring *ring;
    unsigned seen = 0;
    int res = 0, err;

    err = ring_get(ctrl, &ring);
    if (err < 0)
        return err;
    err = ring_push_command(ring, ctrl->fd, c);
    if (err < 0) {
        /* What is queued but not submitted would go out with the next command. */
        ring_free(ring);
        return err;
    }
    *cancelled = false;
    if (!ring_wait(ring, command_bit, deadline, &seen, &res)) {
        unsigned wanted = command_bit;

        *cancelled = true;
        if (ring_push_cancel(ring) == 0)
            wanted |= cancel_bit;
        if (!ring_wait(ring, wanted, now_ms() + CANCEL_GRACE_MS, &seen, &res) && !(seen & command_bit)) {
            ring_put(ctrl, ring, true);
            return -ETIMEDOUT;
        }
    }
    if (res >= 0 && c->out)
        memcpy(c->buf, &ring->payload, c->len);
    if (*cancelled)
        ring_free(ring); /* the cancellation's own completion may still be under way */
    else
        ring_put(ctrl, ring, false);
    return res;
}

static int command(struct ublk_ctrl *ctrl, const struct command *c)
{
    int64_t deadline = deadline_of(c->timeout_ms);
    bool cancelled;
    int res;

    reap_stuck(ctrl);
    do
        res = command_once(ctrl, c, deadline, &cancelled);
    while (res == -EINTR && !cancelled && now_ms() < deadline);
    if (res == -EINTR || res == -ECANCELED)
        return -ETIMEDOUT;
    return res;
}

static int simple_command(struct ublk_ctrl *ctrl, uint32_t op, uint32_t id, uint64_t data, unsigned timeout_ms)
{
    struct command c = {.op = op, .dev_id = id, .data = data, .timeout_ms = timeout_ms};
    int res = command(ctrl, &c);

    return res < 0 ? res : 0;
}

int ublk_ctrl_features(struct ublk_ctrl *ctrl, uint64_t *features)
{
    struct command c = {.op = UBLK_CMD_GET_FEATURES, .dev_id = UBLK_DEV_ID_ANY, .buf = features, .out = true};

    *features = 0;
    c.len = sizeof(*features);
    return command(ctrl, &c);
}

int ublk_ctrl_add(struct ublk_ctrl *ctrl, struct ublk_dev_info *info)
{
    struct command c = {.op = UBLK_CMD_ADD_DEV, .dev_id = info->dev_id, .buf = info, .out = true};

    c.len = sizeof(*info);
    return command(ctrl, &c);
}

int ublk_ctrl_set_params(struct ublk_ctrl *ctrl, uint32_t id, const struct ublk_params *params)
{
    struct ublk_params copy = *params;
    struct command c = {.op = UBLK_CMD_SET_PARAMS, .dev_id = id, .buf = &copy, .len = sizeof(copy)};

    copy.len = sizeof(copy);
    copy.types &= ~UBLK_PARAM_TYPE_DEVT;
    return command(ctrl, &c);
}

int ublk_ctrl_get_params(struct ublk_ctrl *ctrl, uint32_t id, struct ublk_params *params)
{
    struct command c = {.op = UBLK_CMD_GET_PARAMS, .dev_id = id, .buf = params, .out = true};

    memset(params, 0, sizeof(*params));
    params->len = sizeof(*params);
    c.len = sizeof(*params);
    return command(ctrl, &c);
}

int ublk_ctrl_get_info(struct ublk_ctrl *ctrl, uint32_t id, struct ublk_dev_info *info)
{
    struct command c = {.op = UBLK_CMD_GET_DEV_INFO, .dev_id = id, .buf = info, .out = true};

    memset(info, 0, sizeof(*info));
    c.len = sizeof(*info);
    return command(ctrl, &c);
}

int ublk_ctrl_start(struct ublk_ctrl *ctrl, uint32_t id, pid_t pid, unsigned timeout_ms)
{
    return simple_command(ctrl, UBLK_CMD_START_DEV, id, (uint64_t)pid, timeout_ms);
}

int ublk_ctrl_stop(struct ublk_ctrl *ctrl, uint32_t id, unsigned timeout_ms)
{
    return simple_command(ctrl, UBLK_CMD_STOP_DEV, id, 0, timeout_ms);
}

int ublk_ctrl_del(struct ublk_ctrl *ctrl, uint32_t id, unsigned timeout_ms)
{
    struct command c = {.op = UBLK_CMD_DEL_DEV, .dev_id = id, .timeout_ms = timeout_ms};
    int64_t deadline = deadline_of(timeout_ms);
    bool cancelled, repeated = false;
    int res;

    /* An interrupted DEL_DEV goes on in the kernel, so the repetition may find nothing left to delete. */
    reap_stuck(ctrl);
    for (;;) {
        res = command_once(ctrl, &c, deadline, &cancelled);
        if (res != -EINTR || cancelled || now_ms() >= deadline)
            break;
        repeated = true;
    }
    if (res == -ENODEV && repeated)
        return 0;
    if (res == -EINTR || res == -ECANCELED)
        return -ETIMEDOUT;
    return res < 0 ? res : 0;
}

int ublk_ctrl_del_async(struct ublk_ctrl *ctrl, uint32_t id)
{
    return simple_command(ctrl, UBLK_CMD_DEL_DEV_ASYNC, id, 0, 0);
}

/*
 * Up to Linux 6.14 a work item of the driver marks the device QUIESCED, lets its lock go, and then cancels the
 * commands of the dead server once more. A recovery that begins in between gets its own commands cancelled, or the
 * kernel oopses; whoever waits for the lock begins just then. So the state is watched without the lock, and the work
 * item gets time to end: nothing tells when it has.
 */
static int wait_quiesced(struct ublk_ctrl *ctrl, uint32_t id, int64_t deadline)
{
    struct ublk_dev_info info;
    uint64_t features = 0;
    int err = ublk_ctrl_get_info(ctrl, id, &info);

    while (!err && info.state == UBLK_S_DEV_LIVE) {
        if (now_ms() >= deadline)
            return -EBUSY;
        sleep_ms(RECOVERY_STEP_MS);
        err = ublk_ctrl_get_info(ctrl, id, &info);
    }
    if (!err && (ublk_ctrl_features(ctrl, &features) || !(features & UBLK_F_QUIESCE)))
        sleep_ms(CANCEL_WORK_MS);
    return err;
}

int ublk_ctrl_start_recovery(struct ublk_ctrl *ctrl, uint32_t id, unsigned timeout_ms)
{
    int64_t deadline = deadline_of(timeout_ms);
    int res = wait_quiesced(ctrl, id, deadline);

    if (res)
        return res;
    for (;;) {
        int64_t left = deadline - now_ms();

        res = simple_command(ctrl, UBLK_CMD_START_USER_RECOVERY, id, 0, left > 1 ? (unsigned)left : 1);
        if (res != -EBUSY || now_ms() >= deadline)
            return res;
        sleep_ms(RECOVERY_STEP_MS);
    }
}

int ublk_ctrl_end_recovery(struct ublk_ctrl *ctrl, uint32_t id, pid_t pid, unsigned timeout_ms)
{
    return simple_command(ctrl, UBLK_CMD_END_USER_RECOVERY, id, (uint64_t)pid, timeout_ms);
}

int ublk_ctrl_update_size(struct ublk_ctrl *ctrl, uint32_t id, uint64_t sectors)
{
    return simple_command(ctrl, UBLK_CMD_UPDATE_SIZE, id, sectors, 0);
}

int ublk_ctrl_quiesce(struct ublk_ctrl *ctrl, uint32_t id, unsigned timeout_ms)
{
    if (!timeout_ms)
        timeout_ms = UBLK_CTRL_TIMEOUT_MS;
    /* The kernel has its own limit; ours is the later one, for a kernel that does not keep to it. */
    return simple_command(ctrl, UBLK_CMD_QUIESCE_DEV, id, timeout_ms, timeout_ms + CANCEL_GRACE_MS);
}

/* ---- handle and character device ---- */

int ublk_ctrl_open(struct ublk_ctrl **out)
{
    struct ublk_ctrl *ctrl = calloc(1, sizeof(*ctrl));
    struct ctrl_ring *ring;
    int err;

    if (!ctrl)
        return -ENOMEM;
    ctrl->fd = open(CTRL_PATH, O_RDWR | O_CLOEXEC);
    if (ctrl->fd < 0) {
        err = -errno;
        free(ctrl);
        return err;
    }
    /* The first ring now: that io_uring is not allowed should show here, not in the first command. */
    err = ring_new(&ring);
    if (err < 0) {
        close(ctrl->fd);
        free(ctrl);
        return err;
    }
    pthread_mutex_init(&ctrl->lock, NULL);
    ring_put(ctrl, ring, false);
    *out = ctrl;
    return 0;
}

void ublk_ctrl_close(struct ublk_ctrl *ctrl)
{
    if (!ctrl)
        return;
    reap_stuck(ctrl);
    while (ctrl->idle) {
        struct ctrl_ring *next = ctrl->idle->next;

        ring_free(ctrl->idle);
        ctrl->idle = next;
    }
    /* Rings that are stuck even now stay: the kernel may yet write to their payload. */
    pthread_mutex_destroy(&ctrl->lock);
    close(ctrl->fd);
    free(ctrl);
}

int ublk_open_char(uint32_t id)
{
    int64_t deadline = now_ms() + OPEN_TIMEOUT_MS;
    char path[32];

    snprintf(path, sizeof(path), "/dev/ublkc%u", id);
    for (;;) {
        int fd = open(path, O_RDWR | O_CLOEXEC), err = errno;

        if (fd >= 0)
            return fd;
        if (err == EINTR)
            continue;
        if ((err != ENOENT && err != ENXIO && err != EACCES) || now_ms() >= deadline)
            return -err;
        sleep_ms(OPEN_STEP_MS);
    }
}
